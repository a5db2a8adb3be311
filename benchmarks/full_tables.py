"""The paper's Tables II to V with published weights and data, row by row; or, with --reference, the same rows on the reference models.

    accelerate launch --num_processes 8 benchmarks/full_tables.py --phase sample --device cuda dit
    python benchmarks/full_tables.py --phase judge --device cuda dit --reference-batch B.npz --inception I.pth
    python benchmarks/full_tables.py --samples 40 dit --reference

Result: for each uncached run a folder with bench.json and the samples, and one table.md. What is there is kept, so a
run that was stopped goes on. See docs/full_tables.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import full_systems as systems
import torch
import typer
from accelerate import PartialState
from full_rows import Learned, Row, groups, read_router, rows_of
from full_systems import Place, SampleSet, System, TextData
from paper_figures import COLUMNS, Printed, figures
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.clean_errors import clean_errors
from tokencache_compile.demo import machine
from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.methods import Method
from tokencache_compile.evidence.quality import draw_samples
from tokencache_compile.evidence.runs import BenchSettings, Results, file_name, latency_phase
from tokencache_compile.evidence.shards import Shards, draw_shards, psnr_of_parts
from tokencache_compile.evidence.subject import Subject

Phase = Literal["sample", "judge", "latency", "all"]
TITLES = {
    "fid": ("FID", 2), "sfid": ("sFID", 2), "inception_score": ("IS", 2), "precision": ("precision", 2), "recall": ("recall", 2),
    "clip": ("CLIP", 2), "parti_clip": ("PartiPrompts CLIP", 2), "image_reward": ("ImageReward", 4), "vbench": ("VBench", 2),
    "seconds": ("seconds", 3),
}  # fmt: skip
BARS = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass(frozen=True)
class Run:
    """What is common to all systems; see ``--help``."""

    out: Path
    phase: Phase
    samples: int | None
    shard: int
    steps: int | None
    plan: str | None
    routers: tuple[Path, ...]
    threshold: float
    backend: Literal["inductor", "eager"]
    batch: int
    rounds: int
    place: Place
    process: int
    processes: int

    def has(self, phase: Phase) -> bool:
        return self.phase in (phase, "all")


app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def common(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the samples and figures.")] = Path("out/full_tables"),
    phase: Annotated[Phase, typer.Option(help="Only sample runs in several processes.")] = "all",
    samples: Annotated[int | None, typer.Option(help="Of each row; as many as in the paper if left out.")] = None,
    shard: Annotated[int, typer.Option(help="Samples drawn together and kept in one file.")] = 50,
    steps: Annotated[int | None, typer.Option(help="Only the rows of the uncached run of so many steps.")] = None,
    plan: Annotated[str | None, typer.Option(help="Artefact whose predictor scores the tokens; random if left out.")] = None,
    router: Annotated[list[Path] | None, typer.Option(help="Learning-to-Cache's router; once for each number of steps.")] = None,
    threshold: Annotated[float, typer.Option(help="Of the router's gates; published is 0.1.")] = 0.1,
    backend: Annotated[Literal["inductor", "eager"], typer.Option(help="Of sampling and latency.")] = "inductor",
    batch: Annotated[int, typer.Option(help="Samples of a timed run; the paper's is 8.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timed runs of each row.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda; of several GPUs each process takes its own.")] = "cpu",
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the published models.")] = "float32",
    seed: int = 0,
) -> None:
    """Options of every system, before its name."""
    state = PartialState(cpu=device == "cpu")
    place = Place(str(state.device), getattr(torch, dtype), seed)
    with clean_errors():
        if state.num_processes > 1 and phase != "sample":
            raise ConfigError(
                f"--phase {phase} was asked for in {state.num_processes} processes; sample in several, then judge and time in one."
            )
        context.obj = Run(
            out, phase, samples, shard, steps, plan, tuple(router or ()), threshold, backend, batch, rounds, place,
            state.process_index, state.num_processes,
        )  # fmt: skip


Reference = Annotated[bool, typer.Option("--reference", help="The shipped reference model, with data that is at hand.")]
Weights = Annotated[str | None, typer.Option(help="Hub id or folder of the pipeline, if it is not the published one's id.")]
InceptionFile = Annotated[Path, typer.Option("--inception", help="weights-inception-2015-12-05-6726825d.pth")]
_INCEPTION = Path("weights-inception-2015-12-05-6726825d.pth")


@app.command()
def dit(
    context: typer.Context,
    size: Annotated[Literal["256", "512"], typer.Option()] = "256",
    weights: Weights = None,
    reference_batch: Annotated[Path, typer.Option(help="The ADM evaluator's reference batch.")] = Path("VIRTUAL_imagenet256_labeled.npz"),
    inception: InceptionFile = _INCEPTION,
    reference: Reference = False,
) -> None:
    """Table II: DiT-XL/2 on ImageNet."""
    run: Run = context.obj
    with clean_errors():
        if reference:
            measure(run, systems.reference_dit(run.samples or 1000, run.place.seed))
        else:
            measure(run, systems.dit(int(size), weights, reference_batch, inception, run.samples or 50_000, run.place))


@app.command()
def pixart(
    context: typer.Context,
    size: Annotated[Literal["256", "1024"], typer.Option()] = "256",
    weights: Weights = None,
    parti: Annotated[Path, typer.Option(help="PartiPrompts.tsv")] = Path("PartiPrompts.tsv"),
    captions: Annotated[Path, typer.Option(help="COCO's captions_val2017.json")] = Path("captions_val2017.json"),
    images: Annotated[Path, typer.Option(help="COCO's val2017")] = Path("val2017"),
    inception: InceptionFile = _INCEPTION,
    clip: Annotated[str, typer.Option(help="CLIP model of the score.")] = "openai/clip-vit-large-patch14",
    image_reward: Annotated[str, typer.Option(help="Name or file of ImageReward.")] = "ImageReward-v1.0",
    reference: Reference = False,
) -> None:
    """Tables III (256²) and IV (1024²): PixArt-α on COCO and PartiPrompts."""
    run: Run = context.obj
    with clean_errors():
        if reference:
            measure(run, systems.reference_pixart(run.samples or 390))
        else:
            data = TextData(parti, clip, captions, images, inception, image_reward)
            measure(run, systems.pixart(int(size), weights, data, run.samples, run.place))


@app.command()
def video(
    context: typer.Context,
    weights: Annotated[Path, typer.Option(help="Folder of LanguageBind/Open-Sora-Plan-v1.3.0.")] = Path("Open-Sora-Plan-v1.3.0"),
    text_encoder: Annotated[str, typer.Option(help="Hub id or folder.")] = "google/mt5-xxl",
    vbench_info: Annotated[Path | None, typer.Option(help="VBench_full_info.json")] = None,
    reference: Reference = False,
) -> None:
    """Table V: Open-Sora-Plan v1.3 on VBench."""
    run: Run = context.obj
    with clean_errors():
        if reference:
            measure(run, systems.reference_video(vbench_info, run.out / "video", run.samples or 20, run.place.seed))
        else:
            information = vbench_info or Path("VBench_full_info.json")
            measure(run, systems.video(weights, text_encoder, information, run.out / "video", run.samples, run.place))


# -- the phases -------------------------------------------------------------------------------------------------------


def measure(run: Run, system: System) -> None:
    """Every phase that is asked for, on every group of rows; then the table."""
    learned = _learned(run, system)
    folder = run.out / file_name(f"{system.name} {system.model}")
    chosen = [group for group in groups(system.model) if run.steps in (None, group[0].steps)]
    if not chosen:
        counts = [group[0].steps for group in groups(system.model)]
        raise ConfigError(f"--steps {run.steps} was asked for; the uncached runs of {system.model} have {counts}.")
    tables = [_Group(run, system, group, rows_of(group, system.blocks, system.tokens, learned, run.backend), folder) for group in chosen]
    judges = {one.name: cache(one.judge) for one in system.sets}
    with Progress(*BARS, console=Console(stderr=True), refresh_per_second=1, disable=run.process > 0) as progress:
        for table in tables:
            if run.has("sample"):
                table.sample(progress)
            if run.has("judge"):
                table.judge(judges, progress)
            if run.has("latency"):
                table.latency(progress)
    if run.phase != "sample":
        page = folder / "table.md"
        page.write_text(table_page(system, [(table.rows, table.results().content) for table in tables]))
        Console().print(f"Written: {page}", markup=False, highlight=False, soft_wrap=True)


def _learned(run: Run, system: System) -> Learned:
    artefact = CacheArtefact.from_pretrained(run.plan, system.sets[0].subject.load()) if run.plan else None
    if artefact is not None and artefact.predictor is None:
        raise ConfigError(f"{run.plan} has no predictor. Train one with `tokencache train`, or leave --plan out for random tokens.")
    return Learned(artefact, tuple(read_router(path) for path in run.routers), run.threshold)


class _Group:
    """The rows that are compared with one uncached run, in a folder of their own."""

    def __init__(self, run: Run, system: System, group: list[Printed], rows: list[Row], folder: Path) -> None:
        self.run, self.system, self.rows = run, system, rows
        self.steps = group[0].steps
        self.folder = folder / f"{self.steps}_steps"

    def methods(self) -> list[Method]:
        return [row.method for row in self.rows if row.method is not None]

    def subject(self, one: SampleSet) -> Subject:
        return replace(one.subject, steps=self.steps)

    def shards(self, one: SampleSet, method: Method) -> Shards:
        return Shards(self.folder / one.name / file_name(method.name), one.count, self.run.shard)

    def results(self) -> Results:
        run, first = self.run, self.system.sets[0].subject
        parts: dict[str, dict[str, Any]] = {"subject": {"model": first.name, "steps": self.steps, **first.settings}}
        if run.has("judge"):
            parts["quality"] = {"samples": {one.name: one.count for one in self.system.sets}, "shard": run.shard, "backend": run.backend}
        if run.has("latency"):
            parts["latency"] = {"batch": run.batch, "rounds": run.rounds, "uncached": run.backend}
        return Results(self.folder, parts)

    def sample(self, progress: Progress) -> None:
        """This process's share of all rows' samples."""
        for one in self.system.sets:
            for method in self.methods():
                shards = self.shards(one, method)
                task = progress.add_task(f"{self.steps} steps, {one.name}: {method.name}", total=len(shards) / self.run.processes)
                torch.compiler.reset()  # of one piece of code, only so many versions are compiled
                advance = partial(progress.advance, task)
                draw_shards(self.subject(one), method, shards, self.run.backend, self.run.process, self.run.processes, advance)
                progress.update(task, visible=False)

    def judge(self, judges: Mapping[str, Callable[[], systems.Judge]], progress: Progress) -> None:
        """Figures of all samples, and what one costs."""
        results, first = self.results(), self.system.sets[0]
        uncached = self.methods()[0]
        for method in progress.track(self.methods(), description=f"{self.steps} steps: judged"):
            row = results.row(method, self.steps)
            if row["quality"] is not None:
                continue
            found = draw_samples(self.subject(first), method, 1, 1, lambda: None)
            quality: dict[str, Any] = {"macs": found.macs, "paper_macs": found.paper_macs, "plan": found.plan}
            for one in self.system.sets:
                quality |= judges[one.name]()(self.shards(one, method))
            decibels = psnr_of_parts(self.shards(first, method), self.shards(first, uncached))
            row["quality"] = quality | {"psnr_db": decibels if math.isfinite(decibels) else None}
            results.content["environment"]["quality"] = machine()
            results.save()

    def latency(self, progress: Progress) -> None:
        """Seconds of whole runs, each in turn with the uncached one."""
        settings = BenchSettings(self.run.batch, self.run.batch, self.run.batch, self.run.rounds, self.run.backend)
        latency_phase(self.subject(self.system.sets[0]), self.methods(), self.results(), settings, progress)


# -- the page ---------------------------------------------------------------------------------------------------------


def table_page(system: System, tables: list[tuple[list[Row], dict[str, Any]]]) -> str:
    """Markdown: every figure with the paper's in brackets."""
    first = next(row.printed for rows, _ in tables for row in rows if row.printed is not None)
    columns = COLUMNS[first.table]
    counts = ", ".join(f"{one.count} {one.name}" for one in system.sets)
    heads = ["method", "steps", *(TITLES[name][0] for name in columns), "TMACs", "PSNR to uncached, dB", "speed-up", "note"]
    lines = [
        f"# Table {first.table} on {system.name}",
        f"Samples: {counts}. In brackets what the paper prints of {system.model}. TMACs are of one guided sample in the paper's "
        "convention, a predictor included.",
    ]
    for rows, content in tables:
        lines.append("\n".join(_markdown(heads, [_cells(row, content["rows"], columns) for row in rows])))
    return "\n\n".join(lines) + "\n"


def _markdown(heads: list[str], rows: list[list[str]]) -> Iterator[str]:
    return ("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def _cells(row: Row, measured: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    printed = {} if row.printed is None else {**figures(row.printed), "tmacs": row.printed.tmacs}
    own = measured.get(row.name, {}) if row.method is not None else {}
    quality = own.get("quality") or {}
    latency: dict[str, Any] = next((one for one in own.get("latency", {}).values() if "failed" not in one), {})

    def cell(name: str, value: float | None, digits: int) -> str:
        shown = "–" if value is None else f"{value:.{digits}f}"
        return f"{shown} ({printed[name]})" if name in printed else shown

    cells = [cell(name, (latency if name == "seconds" else quality).get(name), TITLES[name][1]) for name in columns]
    tmacs, psnr_db, speed = quality.get("paper_macs"), quality.get("psnr_db"), latency.get("speed_up")
    cells.append(cell("tmacs", None if tmacs is None else tmacs / 1e12, 4))
    cells += ["–" if value is None else f"{value:.{digits}f}" for value, digits in ((psnr_db, 1), (speed, 2))]
    return [row.name, str(row.steps), *cells, row.why]


if __name__ == "__main__":
    app()
