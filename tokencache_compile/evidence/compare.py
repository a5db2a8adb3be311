"""What a bench says: points of speed and quality, the front among them, and who loses to simply taking fewer steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokencache_compile.evidence.methods import FEWER, OURS, SPEED_UPS

NEAR = 0.97  # a speed-up that counts as the one asked for: latencies of equal runs differ by as much


@dataclass(frozen=True)
class Metric:
    """A figure of quality: its key in a row, its name for people, and whether more is better."""

    key: str
    title: str
    higher: bool
    digits: int

    def better(self, one: float, other: float) -> bool:
        return one > other if self.higher else one < other

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


METRICS = (
    Metric("psnr_db", "PSNR to uncached (dB)", True, 1),
    Metric("ssim", "SSIM to uncached", True, 4),
    Metric("pred_x0_mae", "deviation of pred_x0", False, 4),
    Metric("frechet", "Fréchet distance", False, 2),
)


@dataclass(frozen=True)
class Point:
    """One method at one setting that did not fail.

    Attributes:
        speed_up: over the compiled uncached run on the clock, in the backend that is fastest; that of MACs where no clock was read.
        backend: which backend that is; None for MACs.
        quality: the row's figures, those of judges among them.
    """

    name: str
    family: str
    steps: int
    speed_up: float
    backend: str | None
    quality: Mapping[str, Any]

    def value(self, metric: Metric) -> float | None:
        value = self.quality.get(metric.key)
        return None if value is None else float(value)


def points(result: Mapping[str, Any]) -> list[Point]:
    """All methods of a ``bench.json`` with figures of quality. One with no latency, where others have some, is left out."""
    rows: Mapping[str, Any] = result["rows"]
    timed = any(_speed_ups(row) for row in rows.values())
    found = []
    for name, row in rows.items():
        quality, speeds, judged = row["quality"], _speed_ups(row), row.get("judges", {})
        if quality is None or "failed" in quality or (timed and not speeds):
            continue
        if "failed" not in judged:
            quality = {**quality, **judged}
        backend = max(speeds, key=speeds.__getitem__) if speeds else None
        speed = speeds[backend] if backend is not None else 1.0 / quality["macs_share"]
        found.append(Point(name, row["family"], row["steps"], speed, backend, quality))
    return found


def _speed_ups(row: Mapping[str, Any]) -> dict[str, float]:
    return {backend: figures["speed_up"] for backend, figures in row["latency"].items() if "failed" not in figures}


def failures(result: Mapping[str, Any]) -> dict[str, str]:
    """Why each failed method failed, by its name and what failed."""
    found: dict[str, str] = {}
    for name, row in result["rows"].items():
        parts = {"quality": row["quality"] or {}} | {f"latency, {backend}": figures for backend, figures in row["latency"].items()}
        parts["judges"] = row.get("judges", {})
        found |= {f"{name} ({part})": figures["failed"] for part, figures in parts.items() if "failed" in figures}
    return found


def front(of: Iterable[Point], metric: Metric) -> list[Point]:
    """The points that no other beats in both speed and quality, fastest first."""
    found: list[Point] = []
    for point in sorted((p for p in of if p.value(metric) is not None), key=lambda p: -p.speed_up):
        if not found or metric.better(_known(point, metric), _known(found[-1], metric)):
            found.append(point)
    return found


def fewer_steps_at(of: Sequence[Point], metric: Metric, speed_up: float) -> float | None:
    """What fewer steps reach at ``speed_up``: interpolated between measured counts, or the best of those that are faster still.

    None where no measured count is as fast. (More steps can be further off: half of them lie on the uncached run's timesteps.)
    """
    plain = sorted((p.speed_up, _known(p, metric)) for p in of if p.family == FEWER and p.value(metric) is not None)
    faster = [point for point in plain if point[0] >= speed_up]
    if not faster:
        return None
    values = [value for _, value in faster]
    if slower := [point for point in plain if point[0] < speed_up]:
        (low, first), (high, second) = slower[-1], faster[0]
        values.append(first + (second - first) * (speed_up - low) / (high - low))
    return max(values) if metric.higher else min(values)


def margin(point: Point, of: Sequence[Point], metric: Metric) -> float | None:
    """By how much ``point`` is better than fewer steps of its speed-up; negative where it loses."""
    own, other = point.value(metric), fewer_steps_at(of, metric, point.speed_up)
    if own is None or other is None or point.family == FEWER:
        return None
    return own - other if metric.higher else other - own


def warnings(of: Sequence[Point]) -> list[str]:
    """One line for each setting whose images are further from the uncached ones than fewer steps' of the same speed."""
    metric = METRICS[0]
    lost = [(point, margin(point, of, metric)) for point in of]
    return [
        f"{point.name} loses to fewer steps by {-by:.1f} dB at {point.speed_up:.2f}×: take fewer steps instead."
        for point, by in lost
        if by is not None and by < 0
    ]


def best_at(of: Iterable[Point], metric: Metric, speed_up: float) -> Point | None:
    """The best of the points that are at least about as fast as ``speed_up``."""
    fast = [p for p in of if p.value(metric) is not None and p.speed_up >= NEAR * speed_up]
    if not fast:
        return None
    return (max if metric.higher else min)(fast, key=lambda p: _known(p, metric))


def families(found: Iterable[Point]) -> dict[str, int]:
    """Each family with its number, which says its colour and shape: this package's first, the others in the order of the methods."""
    names = sorted(dict.fromkeys(p.family for p in found), key=lambda name: name != OURS)
    return {name: index for index, name in enumerate(names)}


def at_speed_ups(found: Sequence[Point], metric: Metric) -> list[tuple[str, list[Point | None]]]:
    """For each family its best setting at each speed-up that methods are compared at."""
    return [
        (family, [best_at([p for p in found if p.family == family], metric, speed) for speed in SPEED_UPS]) for family in families(found)
    ]


def compared_at_speed_ups(found: Sequence[Point]) -> set[str]:
    """The names of the settings that are some family's closest to the uncached run at one of the speed-ups, by any metric."""
    chosen = (best for metric in METRICS for _, row in at_speed_ups(found, metric) for best in row)
    return {point.name for point in chosen if point is not None}


def _known(point: Point, metric: Metric) -> float:
    value = point.value(metric)
    assert value is not None
    return value
