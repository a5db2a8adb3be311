"""The commands ``tokencache bench`` and ``tokencache report``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from tokencache_compile.clean_errors import clean_errors

_Out = Annotated[Path, typer.Option(help="Folder of bench.json, the samples and the report; what it holds already is not measured again.")]


def bench(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a diffusers pipeline, or of its transformer; the shipped reference DiT if none.")
    ] = None,
    out: _Out = Path("out/bench"),
    data: Annotated[Path | None, typer.Option(help="Safetensors file of samples and conditions, as for train.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Artefact whose predictor scores tokens; the shipped one with the shipped DiT.")] = None,
    scheduler: Annotated[Path | None, typer.Option(help="Folder of the scheduler, if it is not the model's.")] = None,
    phase: Annotated[Literal["quality", "latency", "both"], typer.Option(help="Quality may be measured on a busy machine.")] = "both",
    methods: Annotated[str, typer.Option(help="Regular expression: which ones beside fewer steps and random tokens.")] = "",
    steps: Annotated[int, typer.Option(help="Sampling steps of the uncached run.")] = 50,
    guidance: Annotated[float, typer.Option(help="Weight of classifier-free guidance; 1 is none.")] = 2.5,
    samples: Annotated[int, typer.Option(help="Noises of the quality phase.")] = 64,
    chunk: Annotated[int, typer.Option(help="Samples drawn together.")] = 32,
    batch: Annotated[int, typer.Option(help="Samples of a timed run.")] = 4,
    rounds: Annotated[int, typer.Option(help="Timed runs of each method.")] = 5,
    backend: Annotated[Literal["inductor", "eager"], typer.Option(help="Of the uncached model that speed-ups are over.")] = "inductor",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """Measure methods side by side on one model: latency, MACs, and how close their samples are to the uncached run's."""
    from tokencache_compile.artefact import CacheArtefact
    from tokencache_compile.demo import DEFAULT_PLAN
    from tokencache_compile.evidence.compare import failures, points, warnings
    from tokencache_compile.evidence.methods import FEWER, RANDOM, standard_methods
    from tokencache_compile.evidence.runs import PHASES, BenchSettings, run_bench
    from tokencache_compile.evidence.subjects import reference_subject, saved_subject

    console = Console()
    with clean_errors():
        settings = BenchSettings(samples, chunk, batch, rounds, backend)
        if model is None:
            subject, plan = reference_subject(samples, steps, guidance, seed, device), plan or DEFAULT_PLAN
        else:
            subject = saved_subject(model, data, scheduler, samples, steps, guidance, seed, device)
        artefact = CacheArtefact.from_pretrained(plan, subject.load()) if plan is not None else None
        chosen = [
            m for m in standard_methods(subject, guidance != 1.0, artefact) if m.family in (FEWER, RANDOM) or re.search(methods, m.name)
        ]
        result = run_bench(subject, chosen, out, PHASES if phase == "both" else (phase,), settings, console)
        console.print(_summary(result))
        lines = warnings(points(result)) + [f"failed: {name}: {why}" for name, why in failures(result).items()]
        for line in [*lines, f"Written: {out / 'bench.json'}. The page: tokencache report {out}"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def report(folder: Annotated[Path, typer.Argument(help="Folder of a bench.")] = Path("out/bench")) -> None:
    """Write the page of a bench, report.html, and its charts as PNGs."""
    from tokencache_compile.evidence.report import write_report

    with clean_errors():
        for path in write_report(folder):
            Console().print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)


def _summary(result: dict[str, Any]) -> Table:
    """All methods by speed."""
    from tokencache_compile.evidence.compare import METRICS, margin, points

    found = points(result)
    metrics = [metric for metric in METRICS if any(p.value(metric) is not None for p in found)]
    table = Table("method", "speed-up", *(metric.title for metric in metrics), "margin over fewer steps, dB")
    for point in sorted(found, key=lambda p: p.speed_up):
        by = margin(point, found, METRICS[0])
        values = [(metric, point.value(metric)) for metric in metrics]
        cells = ["–" if value is None else metric.show(value) for metric, value in values]
        table.add_row(point.name, f"{point.speed_up:.2f}×", *cells, "–" if by is None else f"{by:+.1f}")
    return table
