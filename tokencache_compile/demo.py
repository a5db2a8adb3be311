"""The demo: images from the reference DiT, uncached, cached, refined by LoRA, and with as few steps as the cached run's MACs would buy.

All start from the same noise and run through graphs of the same backend: the uncached runs are the same transform with
ratio 0, every step in full. Latency is that of whole runs, measured in turn so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from tokencache_compile.api import transform
from tokencache_compile.errors import ConfigError
from tokencache_compile.metrics import deviation_per_step, psnr
from tokencache_compile.plan import CacheConfig
from tokencache_compile.runtime import Dispatcher, StepReport, Summary
from tokencache_compile.sampling import Conditions, sample

DEFAULT_MODEL = Path(__file__).resolve().parent / "reference" / "dit"
DEFAULT_PLAN = DEFAULT_MODEL.parent / "cache"
DEFAULT_REFINED = DEFAULT_MODEL.parent / "cache_lora"
FASHION_MNIST = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SCHEDULER_CONFIG: dict[str, Any] = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, prediction_type="epsilon"
)  # fmt: skip
COLUMNS = 10  # of the picture: one sample a class


@dataclass(frozen=True)
class DemoSettings:
    """What to run; see ``tokencache demo --help``.

    ``plan`` is an artefact directory; without one the default settings run. ``refined`` is one with an adapter (LoRA), which is run
    beside it; without one there is no such run.
    """

    model: Path = DEFAULT_MODEL
    plan: Path | None = None
    backend: str = "inductor"
    steps: int = 50
    guidance: float = 2.5
    ratio: float = 0.9
    samples: int = 2
    repeats: int = 3
    seed: int = 0
    refined: Path | None = None

    def __post_init__(self) -> None:
        CacheConfig(self.ratio)  # refuses a ratio out of range before anything is loaded
        for name in ("steps", "samples", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} was asked for; at least 1 is needed.")


@dataclass(frozen=True)
class Run:
    """One way to sample, with what it cost and how close it came to the uncached run.

    Attributes:
        images: [B, C, H, W], clamped to [-1, 1].
        predictions: pred_x0 of every step, each [B, C, H, W].
        kinds: "I" or "P" for every step.
        summary: the dispatcher's counts over the run.
        seconds: wall-clock time of each timed repetition.
        psnr_db: of ``images`` to the uncached run's.
    """

    images: Tensor
    predictions: tuple[Tensor, ...]
    kinds: str
    summary: Summary
    seconds: tuple[float, ...]
    psnr_db: float

    @property
    def steps(self) -> int:
        return self.summary.full_steps + self.summary.cached_steps

    @property
    def latency(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class DemoResult:
    """The runs, and what the table and the JSON say of them.

    Attributes:
        plan: the cached run's, in words.
        refined: the run whose P-steps have an adapter in their last ``refined_blocks`` blocks; None where none was asked for.
    """

    settings: DemoSettings
    class_names: tuple[str, ...]
    plan: str
    uncached: Run
    cached: Run
    fewer: Run
    refined: Run | None = None
    refined_blocks: int = 0

    @property
    def runs(self) -> dict[str, Run]:
        runs = {"uncached": self.uncached, "cached": self.cached, "refined": self.refined, "fewer_steps": self.fewer}
        return {name: run for name, run in runs.items() if run is not None}

    @property
    def titles(self) -> dict[str, str]:
        """What the figures call each run."""
        refined = f"cached, last {self.refined_blocks} blocks refined by LoRA"
        return {"uncached": "uncached", "cached": "cached", "refined": refined, "fewer_steps": "fewer steps"}

    @property
    def margin_db(self) -> float:
        """By how much the cached run is closer to the uncached one than the run with fewer steps; NaN if both are equal to it."""
        return self.cached.psnr_db - self.fewer.psnr_db

    @property
    def deviations(self) -> dict[str, list[float]]:
        """Mean |Δ pred_x0| to the uncached run, per step, of the runs that take its steps with caches."""
        runs = {name: run for name, run in self.runs.items() if name in ("cached", "refined")}
        return {name: deviation_per_step(run.predictions, self.uncached.predictions) for name, run in runs.items()}


def machine() -> dict[str, Any]:
    """What a latency depends on besides the settings."""
    import diffusers

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def load_reference(folder: Path) -> Any:
    """The DiT in ``folder``, as ``save_pretrained`` wrote it.

    Raises:
        ConfigError: there is none, or its output is not an image.
    """
    from diffusers import DiTTransformer2DModel

    if not (folder / "config.json").is_file():
        raise ConfigError(f"a model was looked for in {folder} and there is no config.json. Name the folder of a trained DiT with --model.")
    try:
        model = DiTTransformer2DModel.from_pretrained(folder).eval()
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"the DiT in {folder} cannot be loaded: {error}") from error
    if model.config.in_channels not in (1, 3):
        raise ConfigError(
            f"the model in {folder} has {model.config.in_channels} channels; the demo draws pixels, so it takes a DiT of 1 or 3."
        )
    return model


def name_classes(count: int) -> tuple[str, ...]:
    """Fashion-MNIST's names for its ten classes, numbers for any others."""
    return FASHION_MNIST if count == len(FASHION_MNIST) else tuple(f"class {index}" for index in range(count))


def steps_for_macs(macs: int, macs_per_step: int) -> int:
    """The fewest full steps that cost at least ``macs``."""
    return -(-macs // macs_per_step)


class _Sampler:
    """Samples the same noise again and again, through one dispatcher."""

    def __init__(self, model: Any, settings: DemoSettings, plan: Path | None, ratio: float, labels: Tensor, noise: Tensor) -> None:
        from diffusers import DDIMScheduler

        self.settings, self.labels, self.noise = settings, labels, noise
        self.null_label = int(model.config.num_embeds_ada_norm)
        self.scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
        self.dispatcher: Dispatcher = transform(model, plan, ratio=ratio, backend=settings.backend, scheduler=self.scheduler)

    def compile(self) -> None:
        """Capture and compile every graph; each of them runs once."""
        self.dispatcher.prepare({
            "hidden_states": torch.cat([self.noise, self.noise]),
            "timestep": torch.full((2 * len(self.labels),), SCHEDULER_CONFIG["num_train_timesteps"] - 1),
            "class_labels": torch.cat([self.labels, torch.full_like(self.labels, self.null_label)]),
        })  # fmt: skip

    def run(self, steps: int, advance: Callable[[], object]) -> Run:
        """One whole run, timed."""
        predictions: list[Tensor] = []
        kinds: list[str] = []

        def on_call(report: StepReport) -> None:
            kinds.append(report.kind)

        def on_step(index: int, prediction: Tensor) -> None:
            predictions.append(prediction)
            advance()

        self.dispatcher.step_callback = on_call
        start = time.perf_counter()
        conditions = Conditions.of_labels(self.labels, self.null_label, self.settings.guidance)
        images = sample(self.dispatcher, self.scheduler, self.noise, steps, conditions, on_step)
        seconds = time.perf_counter() - start
        return Run(images.clamp(-1, 1), tuple(predictions), "".join(kinds), self.dispatcher.summary(), (seconds,), math.inf)


def _joined(repetitions: Sequence[Run], reference: Tensor) -> Run:
    """One run from its repetitions: they differ in time alone."""
    first = repetitions[0]
    seconds = tuple(run.seconds[0] for run in repetitions)
    return Run(first.images, first.predictions, first.kinds, first.summary, seconds, psnr(first.images, reference))


def run_demo(settings: DemoSettings, console: Console) -> DemoResult:
    """Load, compile, sample and measure, with progress on ``console``.

    Raises:
        ConfigError: there is no such model, or a setting does not fit it.
    """
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        loading = progress.add_task("load the model", total=1)
        model = load_reference(settings.model)
        classes = int(model.config.num_embeds_ada_norm)
        labels = torch.arange(min(classes, COLUMNS)).repeat(settings.samples)
        shape = (len(labels), model.config.in_channels, model.config.sample_size, model.config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
        samplers = {
            "uncached": _Sampler(model, settings, None, 0.0, labels, noise),
            "cached": _Sampler(model, settings, settings.plan, settings.ratio, labels, noise),
        }
        if settings.refined is not None:
            samplers["refined"] = _Sampler(model, settings, settings.refined, settings.ratio, labels, noise)
        progress.advance(loading)

        compiling = progress.add_task(f"capture and compile ({settings.backend})", total=len(samplers))
        for sampler in samplers.values():
            sampler.compile()
            progress.advance(compiling)

        warming = progress.add_task("warm up", total=len(samplers) * min(settings.steps, 5))
        for sampler in samplers.values():
            sampler.run(min(settings.steps, 5), lambda: progress.advance(warming))

        kinds = len(samplers) + 1
        sampling = progress.add_task(f"{settings.repeats} x {kinds} runs of {len(labels)} images: steps", total=None)
        rounds: list[dict[str, Run]] = []
        for _ in range(settings.repeats):

            def advance() -> None:
                progress.advance(sampling)

            runs = {name: sampler.run(settings.steps, advance) for name, sampler in samplers.items()}
            fewer_steps = steps_for_macs(runs["cached"].summary.macs, runs["uncached"].summary.macs // settings.steps)
            progress.update(sampling, total=settings.repeats * (len(samplers) * settings.steps + fewer_steps))
            rounds.append(runs | {"fewer": samplers["uncached"].run(fewer_steps, advance)})

    images = rounds[0]["uncached"].images
    joined = {name: _joined([runs[name] for runs in rounds], images) for name in rounds[0]}
    names = name_classes(classes)[: min(classes, COLUMNS)]
    refined_blocks = samplers["refined"].dispatcher.plan.last_k if "refined" in samplers else 0
    return DemoResult(settings, names, str(samplers["cached"].dispatcher.plan), **joined, refined_blocks=refined_blocks)


# -- the picture ------------------------------------------------------------------------------------------------------


def amplification(differences: Sequence[Tensor]) -> int:
    """The largest power of two, up to 64, that leaves 99 % of the pixels of ``differences`` (values in [0, 1]) below white."""
    top = max(float(d.float().flatten().quantile(0.99)) for d in differences)
    return 1 << max(0, min(6, math.floor(math.log2(1.0 / max(top, 1e-6)))))


def _picture(image: Tensor, size: int) -> Image.Image:
    """An image [C, H, W] in [0, 1] as a picture of ``size`` pixels."""
    values = image.clamp(0, 1).mul(255).round().byte().expand(3, -1, -1).permute(1, 2, 0)
    return Image.fromarray(values.contiguous().numpy()).resize((size, size), Image.Resampling.BICUBIC)


def draw_grid(result: DemoResult, zoom: int = 4) -> Image.Image:
    """One column a class; one row a run, and below every run but the uncached one what differs from that."""
    columns = len(result.class_names)
    images = {name: run.images[:columns].add(1).div(2) for name, run in result.runs.items()}
    uncached = images.pop("uncached")
    differences = {name: (other - uncached).abs() for name, other in images.items()}
    factor = amplification(list(differences.values()))
    steps, ratio = f"{result.settings.steps} steps", f"ratio {result.settings.ratio:g}"
    labels = {
        "cached": ("cached", f"{steps}, {ratio}"),
        "refined": ("cached, LoRA", f"{steps}, last {result.refined_blocks} blocks"),
        "fewer_steps": ("fewer steps", f"{result.fewer.steps} steps, uncached"),
    }
    rows: list[tuple[tuple[str, ...], Tensor]] = [(("uncached", steps, f"{_gmacs(result.uncached)} GMACs"), uncached)]
    for name, other in images.items():
        run = result.runs[name]
        rows.append(((*labels[name], f"{_gmacs(run)} GMACs", _db(run)), other))
        rows.append((("difference", "to uncached,", f"amplified {factor} times"), differences[name] * factor))
    size, gap, left, top = int(uncached.shape[-1]) * zoom, 6, 200, 40
    sheet = Image.new("RGB", (left + columns * (size + gap) + gap, top + len(rows) * (size + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    heading, text = ImageFont.load_default(20), ImageFont.load_default(16)
    for column, name in enumerate(result.class_names):
        pen.text((left + column * (size + gap) + size // 2, top // 2), name, "black", text, anchor="mm")
    for row, (label, pictures) in enumerate(rows):
        y = top + row * (size + gap)
        line = y + size // 2 - 11 * (len(label) - 1)
        for index, words in enumerate(label):
            pen.text((14, line + 22 * index), words, "black" if index == 0 else "#555555", heading if index == 0 else text, anchor="lm")
        for column, image in enumerate(pictures):
            sheet.paste(_picture(image, size), (left + column * (size + gap), y))
    return sheet


# -- the figures ------------------------------------------------------------------------------------------------------


def _gmacs(run: Run) -> str:
    return f"{run.summary.macs / 1e9:.1f}"


def _db(run: Run) -> str:
    return f"{run.psnr_db:.1f} dB" if math.isfinite(run.psnr_db) else "exact"


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def to_json(result: DemoResult) -> dict[str, Any]:
    """Everything the table shows, and what it depends on. A PSNR of null means equal images."""
    runs, deviations = {}, result.deviations
    for name, run in result.runs.items():
        runs[name] = {
            "title": result.titles[name],
            "steps": run.steps,
            "full_steps": run.summary.full_steps,
            "cached_steps": run.summary.cached_steps,
            "kinds": run.kinds,
            "latency_seconds": run.latency,
            "latency_seconds_each": list(run.seconds),
            "speed_up": result.uncached.latency / run.latency,
            "macs": run.summary.macs,
            "macs_per_image": run.summary.macs / len(run.images),
            "cache_bytes": run.summary.cache_bytes,
            "psnr_db": _finite(run.psnr_db),
            "mean_deviation_pred_x0": statistics.mean(deviations[name]) if name in deviations else None,
        }
    own, per_step = result.settings, deviations["cached"]
    folders = {"model": own.model, "plan": own.plan, "refined": own.refined}
    paths = {name: None if path is None else str(path) for name, path in folders.items()}
    settings = asdict(own) | paths | {"scheduler": {"class": "DDIMScheduler"} | SCHEDULER_CONFIG}
    return {
        "settings": settings,
        "images": len(result.uncached.images),
        "classes": list(result.class_names),
        "plan": result.plan,
        "runs": runs,
        "margin_db": _finite(result.margin_db),
        "deviation_pred_x0": {"mean": statistics.mean(per_step), "max": max(per_step), "per_step": per_step},
        "machine": machine(),
    }


def sparkline(values: Sequence[float]) -> str:
    """One bar a value, from 0 to the largest."""
    bars, top = "▁▂▃▄▅▆▇█", max(values)
    return "".join(bars[min(int(value / top * len(bars)), len(bars) - 1)] if top else bars[0] for value in values)


def report(result: DemoResult) -> Group:
    """The figures as a table, with what they mean below it."""
    images, facts, deviations = len(result.uncached.images), machine(), result.deviations
    settings = result.settings
    title = f"{settings.steps} DDIM steps, {images} images, guidance {settings.guidance:g}, cache ratio {settings.ratio:g}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for heading in ("steps", "latency", "speed-up", "GMACs", "PSNR", "|Δ pred_x0|"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run in result.runs.items():
        kinds = f"{run.summary.full_steps} I + {run.summary.cached_steps} P" if run.summary.cached_steps else f"{run.steps} I"
        deviation = f"{statistics.mean(deviations[name]):.4f}" if name in deviations else "-"
        quality = "-" if name == "uncached" else _db(run)
        speed_up = f"{result.uncached.latency / run.latency:.2f}x"
        title = "cached, LoRA" if name == "refined" else result.titles[name]  # 80 columns hold no longer one
        table.add_row(title, kinds, f"{run.latency:.2f} s", speed_up, _gmacs(run), quality, deviation)
    per_step = deviations["cached"]
    peak = max(range(len(per_step)), key=per_step.__getitem__)
    margin = result.margin_db
    verdict = "closer to" if margin > 0 else "further from"
    comparison = (
        f"At the same MACs, the cached run is {abs(margin):.1f} dB {verdict} the uncached images than a run of {result.fewer.steps} steps."
        if math.isfinite(margin)
        else "No margin: a run here equals the uncached one."
    )
    note = [f"cached, LoRA: {result.titles['refined']}."] if result.refined is not None else []
    sides = "torch.compile (inductor) on both sides" if settings.backend == "inductor" else "eager graphs on both sides"
    return Group(
        table,
        *note,
        f"Mean |Δ pred_x0| of the cached from the uncached run, per step (largest {per_step[peak]:.4f} at step {peak}; I: a step in full):",
        "  " + sparkline(per_step),
        "  " + result.cached.kinds.replace("P", "·"),
        comparison,
        f"Latency: whole runs, median of {settings.repeats} measured in turn after a warm-up; {sides}.",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} thread(s), load {facts['load_average']}; "
        f"torch {facts['torch']}, diffusers {facts['diffusers']}, Python {facts['python']}.",
    )


def write_files(result: DemoResult, out: Path) -> tuple[Path, Path]:
    """Write ``demo.png`` and ``demo.json`` into ``out``; returns both paths."""
    out.mkdir(parents=True, exist_ok=True)
    picture, figures = out / "demo.png", out / "demo.json"
    draw_grid(result).save(picture)
    figures.write_text(json.dumps(to_json(result), indent=2, allow_nan=False) + "\n")
    return picture, figures
