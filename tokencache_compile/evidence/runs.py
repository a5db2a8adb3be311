"""Measures methods on a subject, in phases that may run apart: ``quality`` on a busy machine, ``latency`` on a quiet one, and then what the
subject's ``judges`` say of the settings that are compared at equal speed.

Every figure is kept in ``bench.json`` as soon as it is there, so a run that was stopped goes on. A method that fails is a row that says so.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from tokencache_compile.demo import machine
from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.compare import compared_at_speed_ups, points
from tokencache_compile.evidence.latency import Clock
from tokencache_compile.evidence.methods import FEWER, RANDOM, Method
from tokencache_compile.evidence.quality import BACKEND, Samples, compared, draw_samples
from tokencache_compile.evidence.shards import Shards, draw_shards
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.pixels import to_bytes

Phase = Literal["quality", "latency", "judges"]
PHASES: tuple[Phase, ...] = ("quality", "latency", "judges")
UNCACHED = Method("uncached", "uncached", None)
FILE, PICTURED = "bench.json", 10
DRAWN = "drawn"  # folder of the samples that judges see
_FORMAT = 1


@dataclass(frozen=True)
class BenchSettings:
    """How much is measured.

    Attributes:
        samples: noises of the quality phase, drawn ``chunk`` at a time.
        batch: samples of a timed run, and ``rounds`` of them for each figure.
        backend: of the uncached model that speed-ups are over, and of what is drawn for the judges.
        judged: samples that the judges see.
    """

    samples: int = 64
    chunk: int = 32
    batch: int = 4
    rounds: int = 5
    backend: str = "inductor"
    judged: int = 1000

    def __post_init__(self) -> None:
        for name in ("samples", "chunk", "batch", "rounds", "judged"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} was asked for; at least 1 is needed.")


class Results:
    """``bench.json`` in a folder: read at the start, rewritten whole after every figure.

    Raises:
        ConfigError: it holds figures of another subject or other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, dict[str, Any]]) -> None:
        self.path = folder / FILE
        self.content: dict[str, Any] = {"format": _FORMAT, "settings": {}, "environment": {}, "rows": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
        held = self.content["settings"]
        for part, wanted in settings.items():
            wanted = json.loads(json.dumps(wanted))
            if held.setdefault(part, wanted) != wanted:
                raise ConfigError(
                    f"{self.path} holds figures of {held[part]}, and asked for is {wanted}. Name another folder, or delete it."
                )

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = self.content["rows"]
        return rows

    def row(self, method: Method, steps: int) -> dict[str, Any]:
        """The row of ``method``, made if there is none."""
        new = {"family": method.family, "steps": method.steps or steps, "note": method.note, "quality": None, "latency": {}, "judges": {}}
        row: dict[str, Any] = self.rows.setdefault(method.name, new)
        return row

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".partial")
        aside.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n")
        os.replace(aside, self.path)


def run_bench(
    subject: Subject, methods: Sequence[Method], out: Path, phases: Sequence[Phase], settings: BenchSettings, console: Console
) -> dict[str, Any]:
    """Measure what is missing in ``out``; returns the content of its ``bench.json``.

    Raises:
        ConfigError: two methods share a name, fewer steps or random tokens are not among them, or ``out`` holds other measurements.
    """
    names = [method.name for method in methods]
    if len(set(names)) < len(names) or not {FEWER, RANDOM} <= {method.family for method in methods}:
        raise ConfigError(
            f"methods {names} were given; each needs a name of its own, and {FEWER!r} and {RANDOM!r} must be among the families: "
            "caching is judged by them."
        )
    parts: dict[str, dict[str, Any]] = {"subject": {"model": subject.name, "steps": subject.steps, **subject.settings}}
    if "quality" in phases:
        parts["quality"] = {"samples": settings.samples, "chunk": settings.chunk, "backend": BACKEND}
    if "latency" in phases:
        parts["latency"] = {"batch": settings.batch, "rounds": settings.rounds, "uncached": settings.backend}
    if "judges" in phases and subject.judges:
        parts["judges"] = {"of": list(subject.judges), "samples": settings.judged, "chunk": settings.chunk, "backend": settings.backend}
    results = Results(out, parts)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        for phase in phases:
            _MEASURES[phase](subject, methods, results, settings, progress)
    return results.content


def _quality_phase(subject: Subject, methods: Sequence[Method], results: Results, settings: BenchSettings, progress: Progress) -> None:
    missing = [method for method in methods if results.row(method, subject.steps)["quality"] is None]
    bar = progress.add_task("quality: methods", total=len(methods), completed=len(methods) - len(missing))
    if not missing:
        return
    chunks = -(-settings.samples // settings.chunk)

    def draw(method: Method) -> Samples:
        each = progress.add_task(f"  {method.name}: chunks", total=chunks)
        try:
            return draw_samples(subject, method, settings.samples, settings.chunk, lambda: progress.advance(each))
        finally:
            progress.remove_task(each)

    def figures(name: str, got: Samples) -> dict[str, Any]:
        return compared(subject, got, reference) | {"picture": _picture(subject, got.images, results.path.parent, name)}

    reference = draw(UNCACHED)
    results.content["environment"]["quality"] = machine()
    results.content["uncached"] = figures(UNCACHED.name, reference)
    for method in missing:
        measured = _or_failed(lambda method: figures(method.name, draw(method)), method, progress)
        results.row(method, subject.steps)["quality"] = measured
        results.save()
        progress.advance(bar)


def latency_phase(subject: Subject, methods: Sequence[Method], results: Results, settings: BenchSettings, progress: Progress) -> None:
    """Time what ``results`` lacks of ``methods``."""
    rows = [(method, backend) for method in methods for backend in method.backends]
    missing = [(method, backend) for method, backend in rows if backend not in results.row(method, subject.steps)["latency"]]
    bar = progress.add_task("latency: methods", total=len(rows), completed=len(rows) - len(missing))
    if not missing:
        return
    clock = Clock(subject, settings.batch, settings.rounds, settings.backend)
    results.content["environment"]["latency"] = machine()
    for method, backend in missing:
        figures = _or_failed(partial(clock.measure, backend=backend), method, progress)
        results.row(method, subject.steps)["latency"][backend] = figures
        results.save()
        progress.advance(bar)


def _judges_phase(subject: Subject, methods: Sequence[Method], results: Results, settings: BenchSettings, progress: Progress) -> None:
    """Have the judges see the uncached model and what is best at some speed. The samples stay in files, so a stopped method goes on."""
    if not subject.judges:
        return
    results.content["floors"] = dict(subject.floors)
    compared_now = compared_at_speed_ups(points(results.content))
    chosen = [method for method in methods if method.name in compared_now]
    missing = [method for method in chosen if not results.row(method, subject.steps).get("judges")]
    bar = progress.add_task("judges: methods", total=1 + len(chosen), completed=len(chosen) - len(missing))

    def judged(method: Method) -> dict[str, Any]:
        shards = Shards(results.path.parent / DRAWN / file_name(method.name), settings.judged, settings.chunk)
        each = progress.add_task(f"  {method.name}: chunks", total=len(shards), completed=len(shards) - len(shards.missing()))
        try:
            torch.compiler.reset()  # as in Clock.measure
            draw_shards(subject, method, shards, settings.backend, advance=lambda: progress.advance(each))
            images = torch.cat(list(shards))
        finally:
            progress.remove_task(each)
        return {name: judge(images) for name, judge in subject.judges.items()}

    if not subject.judges.keys() <= results.content.get("uncached", {}).keys():
        results.content.setdefault("uncached", {}).update(judged(UNCACHED))
        results.content["environment"]["judges"] = machine()
        results.save()
    progress.advance(bar)
    for method in missing:
        results.row(method, subject.steps)["judges"] = _or_failed(judged, method, progress)
        results.save()
        progress.advance(bar)


_MEASURES = {"quality": _quality_phase, "latency": latency_phase, "judges": _judges_phase}


def _or_failed(measure: Callable[[Method], dict[str, Any]], method: Method, progress: Progress) -> dict[str, Any]:
    """What ``measure`` finds, or why it failed: a method of others may raise anything."""
    try:
        return measure(method)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        progress.console.print(f"failed: {method.name}: {type(error).__name__}: {first}", markup=False, highlight=False)
        return {"failed": f"{type(error).__name__}: {first}"}


def file_name(name: str) -> str:
    """A method's name as that of a file or folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _picture(subject: Subject, images: Tensor, folder: Path, name: str) -> str | None:
    """The first images side by side as a PNG in ``folder``; its path there. None where samples are no pictures."""
    if not subject.pixels or images.ndim != 4:
        return None
    strip = to_bytes(images[:PICTURED]).permute(2, 0, 3, 1).flatten(1, 2)  # [H, n·W, C]
    path = Path("samples", file_name(name) + ".png")
    (folder / path.parent).mkdir(parents=True, exist_ok=True)
    Image.fromarray(strip.squeeze(-1).numpy()).save(folder / path)
    return str(path)
