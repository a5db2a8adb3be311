"""Tuning: which settings reach a speed-up, or a fidelity, at the least loss; every candidate is measured, none is guessed.

    for speed-up ≥ 2.0   the candidate of the highest PSNR to the uncached run
    for PSNR ≥ 30 dB     the candidate of the highest speed-up

Speed-up is that of MACs, or with ``measure_latency`` that of the clock, uncached and cached compiled alike. Measurements are kept in
a JSON file, so a stopped search goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from tokencache_compile.api import transform
from tokencache_compile.errors import ConfigError
from tokencache_compile.metrics import psnr
from tokencache_compile.plan import CacheConfig, Context
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.samplers import default_config
from tokencache_compile.sampling import Conditions, sample, seeded
from tokencache_compile.schedule import Schedule

_FORMAT = 1


@dataclass(frozen=True)
class Goal:
    """What the plan must reach: exactly one of a speed-up over the uncached run, and a PSNR to it in dB."""

    speedup: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.psnr is None):
            raise ConfigError(f"speedup={self.speedup} and psnr={self.psnr} were asked for; name exactly one of them.")
        if self.speedup is not None and self.speedup < 1.0:
            raise ConfigError(f"speedup={self.speedup} was asked for; it is a factor of 1 or more.")


@dataclass(frozen=True)
class Candidate:
    """One measured setting. ``speedup`` is that of MACs; ``latency_speedup`` that of the clock, where it was measured."""

    config: CacheConfig
    psnr: float
    speedup: float
    latency_speedup: float | None = None

    @property
    def speed(self) -> float:
        """The speed-up that counts: measured, else that of MACs."""
        return self.speedup if self.latency_speedup is None else self.latency_speedup


@dataclass(frozen=True)
class TuneResult:
    """All candidates measured, the Pareto front among them (fastest first), and the one that was asked for."""

    candidates: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    best: Candidate


def pareto_front(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Candidates that no other beats in both speed and PSNR, fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.speed, -c.psnr)):
        if not front or candidate.psnr > front[-1].psnr:
            front.append(candidate)
    return tuple(front)


def search_space(base: CacheConfig, steps: int, last_ks: Sequence[int] = (0, 2)) -> list[CacheConfig]:
    """Ratio (1.0 included: nothing recomputed), K, forecast order, context and the I-steps of ``steps`` around ``base``.

    In order of promise, so that a small budget sees the best first: what recomputes nothing costs least and has no context.
    """
    even = [Schedule(every=every) for every in (4, 3, 2)]
    last = [Schedule.with_last(steps, one.every) for one in even]
    denser = [Schedule.denser_late(steps, len(one.full)) for one in last if one.full is not None and len(one.full) > 1]
    usual = [*even, *last, *denser]
    spacings = [*usual, *(Schedule(every=every) for every in (5, 6, 8))]
    bare = [
        replace(base, ratio=1.0, last_k=last_k, forecast=order, schedule=schedule)
        for order, last_k, schedule in itertools.product((2, 1, 0), last_ks, spacings)
    ]
    contexts: tuple[Context, ...] = ("reuse", "full")
    recomputing = [
        replace(base, ratio=ratio, last_k=last_k, context=context, schedule=schedule)
        for context, ratio, last_k, schedule in itertools.product(contexts, (0.9, 0.7), last_ks, usual)
    ]
    both = [config for pair in itertools.zip_longest(bare, recomputing) for config in pair if config is not None]
    return list(dict.fromkeys([base, *both]))


def choose(candidates: Iterable[Candidate], goal: Goal) -> Candidate:
    """The candidate that meets ``goal`` best.

    Raises:
        ConfigError: none meets it; says how far the nearest is.
    """
    measured = list(candidates)
    asked, wanted, sought, maximised = (
        ("speedup", goal.speedup, "speed", "psnr") if goal.psnr is None else ("psnr", goal.psnr, "psnr", "speed")
    )
    reaches = attrgetter(sought)
    fitting = [c for c in measured if wanted is not None and reaches(c) >= wanted]
    if not fitting:
        nearest = max(measured, key=reaches)
        raise ConfigError(
            f"{asked}={wanted} was asked for; the nearest of {len(measured)} settings reaches {nearest.speed:.2f}x at "
            f"{nearest.psnr:.1f} dB. Ask for less, or allow a larger budget."
        )
    return max(fitting, key=attrgetter(maximised))


def tune(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    conditions: Conditions,
    steps: int,
    goal: Goal,
    out: Path,
    base: CacheConfig | None = None,
    predictor: CachePredictor | None = None,
    budget: int = 60,
    measure_latency: bool = False,
    space: Sequence[CacheConfig] | None = None,
) -> TuneResult:
    """Measure candidates on ``noise`` until the budget is spent or the space is; return the front and the choice.

    Args:
        model: the uncached transformer; ``predictor`` scores its tokens if given, else the scorer of ``base``.
        noise: [B, C, …], with the conditions of each row; the same for all candidates.
        steps: sampling steps of the deployment.
        base: settings that the candidates vary; what :func:`transform` takes with this scheduler if left out.
        out: JSON file of the measurements; found there, the search goes on with it.
        budget: candidates measured in all, those of an earlier search included.
        measure_latency: compile every candidate (inductor) and time whole runs in turn with the uncached model, compiled alike.
        space: the candidates; :func:`search_space` if left out.

    Raises:
        ConfigError: nothing meets the goal, or ``out`` holds another search's measurements.
    """
    base = base or default_config(scheduler)
    if predictor is not None:
        base = replace(base, scorer="predictor")
    candidates = list(space if space is not None else search_space(base, steps))[:budget]
    runner = _Runner(model, scheduler, noise, conditions, steps, predictor, measure_latency)
    log = _Log(out, dict(steps=steps, samples=len(noise), guidance=conditions.guidance, latency=measure_latency, noise=_digest(noise)))
    with Progress() as bar:
        for config in bar.track(candidates, description="settings measured"):
            if log.get(config) is None:
                log.add(runner.measure(config))
    measured = tuple(row for row in map(log.get, candidates) if row is not None)
    return TuneResult(measured, pareto_front(measured), choose(measured, goal))


class _Runner:
    """Runs candidates on one set of noises beside the uncached model."""

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        noise: Tensor,
        conditions: Conditions,
        steps: int,
        predictor: CachePredictor | None,
        clock: bool,
    ) -> None:
        self.model, self.scheduler, self.noise, self.conditions, self.steps = model, scheduler, noise, conditions, steps
        self.predictor, self.clock = predictor, clock
        self.reference = self._run(model)
        self.uncached: Any = model
        if clock:  # the same graphs and kernels, every step in full
            self.uncached = transform(model, ratio=0.0, backend="inductor", scheduler=scheduler)
            self._run(self.uncached)

    def _run(self, transformer: Any) -> Tensor:
        with seeded(0):
            return sample(transformer, self.scheduler, self.noise, self.steps, self.conditions)

    def measure(self, config: CacheConfig) -> Candidate:
        """PSNR, MACs and, if asked for, the clock of one candidate."""
        predictor = self.predictor if config.scorer == "predictor" else None
        backend = "inductor" if self.clock else "eager"
        cached = transform(self.model, config=config, predictor=predictor, backend=backend, scheduler=self.scheduler)
        images = self._run(cached)
        summary = cached.summary()
        scale = float(self.reference.abs().max())  # latents have no fixed range
        fidelity = psnr(images, self.reference, data_range=2 * scale)
        return Candidate(config, fidelity, summary.macs_uncached / summary.macs, self._latency(cached) if self.clock else None)

    def _latency(self, cached: Any) -> float:
        """Median ratio of three pairs of runs, uncached over cached."""
        ratios = []
        for _ in range(3):
            times = []
            for transformer in (self.uncached, cached):
                start = time.perf_counter()
                self._run(transformer)
                times.append(time.perf_counter() - start)
            ratios.append(times[0] / times[1])
        return statistics.median(ratios)


def _digest(noise: Tensor) -> list[float]:
    flat = noise.double().flatten()
    return [float(flat.sum()), float(flat.square().sum())]


class _Log:
    """Measured candidates in a JSON file, rewritten whole after every one."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, {"format": _FORMAT, **settings}
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            saved = json.loads(path.read_text())
            if saved.get("settings") != self.settings:
                raise ConfigError(
                    f"{path} holds measurements of {saved.get('settings')}, and asked for is {self.settings}. Name another file."
                )
            self.rows = saved["rows"]

    def get(self, config: CacheConfig) -> Candidate | None:
        row = self.rows.get(_key(config))
        return None if row is None else Candidate(config, **row)

    def add(self, candidate: Candidate) -> None:
        row = {"psnr": candidate.psnr, "speedup": candidate.speedup, "latency_speedup": candidate.latency_speedup}
        self.rows[_key(candidate.config)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".partial")
        aside.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))
        os.replace(aside, self.path)


def _key(config: CacheConfig) -> str:
    return json.dumps(asdict(config), sort_keys=True)
