"""The learning commands of ``tokencache``: train, calibrate, tune and plot. Each ends in an artefact directory or pictures."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tokencache_compile.clean_errors import clean_errors
from tokencache_compile.errors import ConfigError
from tokencache_compile.plan import CacheConfig, Context, Selection
from tokencache_compile.schedule import Schedule

Strategy = Literal["every", "uniform", "mass", "accumulated", "reverse", "optimal"]

_DEFAULTS = CacheConfig()
_Model = Annotated[Path, typer.Argument(help="Folder of a diffusers pipeline, or of its transformer.")]
_Data = Annotated[Path, typer.Option(help="safetensors file: sample, conditions by argument name, null.<name>; see docs/learning.md.")]
_Scheduler = Annotated[Path | None, typer.Option(help="Folder with a scheduler_config.json; the pipeline's own if left out.")]
_Steps = Annotated[int, typer.Option(help="Sampling steps of the deployment.")]
_Guidance = Annotated[float, typer.Option(help="Weight of classifier-free guidance; 1 is none.")]
_Seed = Annotated[int, typer.Option(help="Of everything random.")]


def _versions() -> dict[str, str]:
    import diffusers
    import torch

    return {"torch": torch.__version__, "diffusers": diffusers.__version__}


def train(
    model: _Model,
    data: _Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; the artefact is written into its subfolder artefact.")],
    scheduler: _Scheduler = None,
    steps: _Steps = 50,
    train_steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40_000,
    batch: Annotated[int, typer.Option(help="Samples a step, over all processes.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-5,
    cost_weight: Annotated[float | None, typer.Option(help="λ of the paper's Eq. 9; a fixed budget a block if left out.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance of the deployment; other than 1 trains on pairs with one selection.")] = 1.0,
    label_dropout: Annotated[float, typer.Option(help="Share of samples that see the null conditions; without guidance.")] = 0.1,
    ema_decay: Annotated[float | None, typer.Option(help="Decay of the weight average; none if left out.")] = None,
    mixed_precision: Annotated[str, typer.Option(help="accelerate's: no, bf16 or fp16.")] = "no",
    ratio: Annotated[float, typer.Option(help="Share of the cached blocks' tokens that a P-step does not recompute.")] = _DEFAULTS.ratio,
    last_k: Annotated[int, typer.Option(help="The last K blocks run in full on every step.")] = _DEFAULTS.last_k,
    context: Annotated[Context, typer.Option(help="What a kept token attends to.")] = _DEFAULTS.context,
    forecast: Annotated[int, typer.Option(help="Order of the forecast of what is not recomputed.")] = _DEFAULTS.forecast,
    every: Annotated[int | None, typer.Option(help="An I-step every so many steps; if left out, by the number of steps.")] = None,
    seed: _Seed = 0,
) -> None:
    """Train the cache predictor of a model; a run that was stopped goes on where it was."""
    import torch
    from accelerate import Accelerator

    from tokencache_compile.artefact import CacheArtefact
    from tokencache_compile.fingerprint import fingerprint
    from tokencache_compile.learn.inputs import TensorData, load_model, load_scheduler
    from tokencache_compile.learn.train import TrainingConfig, train_predictor

    with clean_errors():
        selection: Selection = "sample" if guidance == 1.0 else "pair"
        config = CacheConfig(
            ratio=ratio, last_k=last_k, context=context, forecast=forecast, selection=selection,
            schedule=None if every is None else Schedule(every),
        )  # fmt: skip
        training = TrainingConfig(
            steps=train_steps, batch=batch, lr=lr, cost_weight=cost_weight, sampling_steps=steps, guidance=guidance,
            label_dropout=label_dropout if guidance == 1.0 else 0.0, ema_decay=ema_decay, mixed_precision=mixed_precision, seed=seed,
        )  # fmt: skip
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())
        samples, net, solver = TensorData(data), load_model(model).to(accelerator.device), load_scheduler(scheduler or model)
        predictor = train_predictor(net, samples, solver, config, training, out, samples.null_row, accelerator)
        if not accelerator.is_main_process:
            return
        artefact = CacheArtefact(
            config=replace(config, scorer="predictor"), base=fingerprint(net), predictor=predictor, steps=steps,
            provenance={"training": asdict(training), **_versions()},
        )  # fmt: skip
        artefact.save_pretrained(out / "artefact")
        Console().print(f"Written: {out / 'artefact'}", markup=False, highlight=False, soft_wrap=True)


def calibrate(
    model: _Model,
    artefact: Annotated[str, typer.Argument(help="Artefact directory or hub id with a trained predictor.")],
    data: _Data,
    out: Annotated[Path, typer.Option(help="Directory of the calibrated artefact.")],
    scheduler: _Scheduler = None,
    steps: _Steps = 50,
    guidance: _Guidance = 1.0,
    full_steps: Annotated[int, typer.Option(help="Number of I-steps.")] = 13,
    strategy: Annotated[Strategy, typer.Option(help="Where they lie.")] = "every",
    beta: Annotated[float, typer.Option(help="β of Eq. 13, relative to the standard deviation of ᾱ.")] = -1.0,
    groups: Annotated[int, typer.Option(help="P-graphs, each with its own keep counts.")] = 1,
    multiple: Annotated[int, typer.Option(help="Keep counts are multiples of this.")] = 1,
    samples: Annotated[int, typer.Option(help="Trajectories (the paper's B).")] = 256,
    batch: Annotated[int, typer.Option(help="Samples at a time.")] = 16,
    seed: _Seed = 0,
) -> None:
    """Collect α over full trajectories; fix the keep counts (Eq. 12) and the I-steps (Eq. 13 or others)."""
    import tempfile

    from tokencache_compile.artefact import CacheArtefact
    from tokencache_compile.learn.calibration import calibrate as run_calibration
    from tokencache_compile.learn.calibration import to_config
    from tokencache_compile.learn.inputs import TensorData, load_model, load_scheduler

    with clean_errors():
        rows, net, solver = TensorData(data), load_model(model), load_scheduler(scheduler or model)
        trained = CacheArtefact.from_pretrained(artefact, net)
        if trained.predictor is None:
            raise ConfigError(f"{artefact} has no predictor, whose α are what is calibrated. Train one with `tokencache train`.")
        starts = range(0, samples, batch)
        batches = (rows.batch(start, min(batch, samples - start), guidance, seed) for start in starts)
        base = trained.config
        found = run_calibration(net, trained.predictor, solver, batches, steps, base.ratio, base.last_k)
        schedule = _schedule(strategy, found, full_steps, beta, net, solver, rows, guidance, seed, base)
        config = to_config(found, replace(base, keep=None, groups=()), schedule, found.examples.shape[-1], groups, multiple)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "calibration.safetensors"
            found.save(file)
            notes = {"strategy": strategy, "full_steps": full_steps, "beta": beta, "samples": samples, "guidance": guidance}
            provenance = {**trained.provenance, "calibration": notes}
            calibrated = replace(trained, config=config, steps=steps, calibration_path=file, provenance=provenance)
            calibrated.save_pretrained(out)
        Console().print(f"I-steps {config.schedule}\nkeep {config.keep}\nWritten: {out}", markup=False, highlight=False, soft_wrap=True)


def _schedule(
    strategy: Strategy,
    found: Any,
    full_steps: int,
    beta: float,
    net: Any,
    solver: Any,
    rows: Any,
    guidance: float,
    seed: int,
    base: CacheConfig,
) -> Schedule:
    """The I-steps by ``strategy``; ``optimal`` measures interval errors on a few samples first."""
    from tokencache_compile.learn import schedules

    steps: int = found.steps
    if strategy == "every":
        return Schedule(every=max(1, -(-steps // full_steps)))
    if strategy == "uniform":
        return Schedule.uniform(steps, full_steps)
    if strategy in ("mass", "accumulated", "reverse"):
        by_mass = schedules.by_mass(found.mean_alpha.tolist(), full_steps, beta, accumulated=strategy == "accumulated", relative=True)
        return schedules.reverse(by_mass, steps) if strategy == "reverse" else by_mass
    from tokencache_compile.learn.calibration import GuidedCall
    from tokencache_compile.learn.interval_errors import interval_errors
    from tokencache_compile.learn.stack import BlockStack

    noise, conditions = rows.batch(0, 4, guidance, seed)
    solver.set_timesteps(steps)
    stack = BlockStack(net, GuidedCall(net, conditions).kwargs(noise, solver.timesteps[0]))
    costs = interval_errors(stack, solver, noise, conditions, steps, found.last_k, base.forecast, min(steps, 2 * -(-steps // full_steps)))
    return schedules.optimal(costs, steps, full_steps)


def tune(
    model: _Model,
    data: _Data,
    out: Annotated[Path, typer.Option(help="Folder of the search: its measurements, and the chosen plan in its subfolder artefact.")],
    speedup: Annotated[float | None, typer.Option(help="Least speed-up; the closest run that reaches it is chosen.")] = None,
    psnr: Annotated[float | None, typer.Option(help="Least PSNR to the uncached run in dB; the fastest that reaches it is chosen.")] = None,
    artefact: Annotated[str | None, typer.Option(help="Artefact whose predictor scores the tokens.")] = None,
    scheduler: _Scheduler = None,
    steps: _Steps = 50,
    guidance: _Guidance = 1.0,
    samples: Annotated[int, typer.Option(help="Samples that every candidate is measured on.")] = 8,
    budget: Annotated[int, typer.Option(help="Candidates measured.")] = 60,
    latency: Annotated[bool, typer.Option(help="Measure speed-up on the clock, compiled; else it is that of MACs.")] = False,
    fit: Annotated[
        bool, typer.Option(help="Fit the forecast of the chosen plan, step by step, to the images of whole runs.")
    ] = False,
    seed: _Seed = 0,
) -> None:
    """Search ratio, I-steps, K, context and forecast order on measured deviation; show the Pareto front, write the plan."""
    from tokencache_compile.artefact import CacheArtefact
    from tokencache_compile.fingerprint import fingerprint
    from tokencache_compile.learn.inputs import TensorData, load_model, load_scheduler
    from tokencache_compile.learn.tune import Goal
    from tokencache_compile.learn.tune import tune as run_search

    with clean_errors():
        goal = Goal(speedup, psnr)
        rows, net, solver = TensorData(data), load_model(model), load_scheduler(scheduler or model)
        trained = CacheArtefact.from_pretrained(artefact, net) if artefact is not None else None
        predictor = trained.predictor if trained is not None else None
        noise, conditions = rows.batch(0, samples, guidance, seed)
        result = run_search(
            net, solver, noise, conditions, steps, goal, out / "tune.json", predictor=predictor, budget=budget, measure_latency=latency
        )
        table = Table("speed-up", "PSNR", "ratio", "I-steps", "last K", "context", "forecast", title="Pareto front")
        for row in result.front:
            c, schedule = row.config, row.config.schedule_of(steps)
            cells = (f"{row.speed:.2f}x", f"{row.psnr:.1f} dB", f"{c.ratio:g}", str(schedule), str(c.last_k), c.context, str(c.forecast))
            table.add_row(*cells, style="bold" if row is result.best else None)
        Console().print(table)
        best = result.best.config
        used = predictor if best.scorer == "predictor" else None
        notes = {"goal": asdict(goal), "psnr": result.best.psnr, "speedup": result.best.speed, "candidates": len(result.candidates)}
        if fit:
            best, gained = _fitted(net, solver, noise, conditions, steps, best, used)
            notes |= gained
        found = CacheArtefact(config=best, base=fingerprint(net), predictor=used, steps=steps, provenance={"tune": notes, **_versions()})
        found.save_pretrained(out / "artefact")
        Console().print(f"Written: {out / 'artefact'}", markup=False, highlight=False, soft_wrap=True)


def _fitted(
    net: Any, solver: Any, noise: Any, conditions: Any, steps: int, best: CacheConfig, predictor: Any
) -> tuple[CacheConfig, dict[str, float]]:
    """``best`` with step weights, and their PSNR on held-out noises beside that of the best polynomial; as it is where these win."""
    from tokencache_compile.learn.step_weights import fit_step_weights

    with Progress(console=Console()) as progress:
        task = progress.add_task("fit: runs", total=None)
        config = replace(best, forecast=max(best.forecast, 2))
        found = fit_step_weights(net, solver, noise, conditions, steps, config, predictor, on_run=lambda: progress.advance(task))
    line = f"Forecast by step numbers {found.polynomial_db:.1f} dB, fitted {found.fitted_db:.1f} dB, on held-out noises."
    Console().print(line, markup=False, highlight=False, soft_wrap=True)
    better = found.fitted_db > found.polynomial_db
    return found.config if better else best, {"polynomial_db": found.polynomial_db, "fitted_db": found.fitted_db}


def plot(
    artefact: Annotated[Path, typer.Argument(help="Calibrated artefact directory.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/plot"),
) -> None:
    """Draw α over blocks and steps, keep counts, the schedule on the ᾱ curve, and tokens over the images."""
    from tokencache_compile.artefact import read_config
    from tokencache_compile.learn.calibration import Calibration
    from tokencache_compile.plots import write_figures

    with clean_errors():
        file = artefact / "calibration.safetensors"
        if not file.exists():
            raise ConfigError(f"{artefact} has no calibration.safetensors, which the pictures show. Make it with `tokencache calibrate`.")
        config, found = read_config(artefact), Calibration.load(file)
        schedules = {"plan": config.schedule_of(found.steps)}
        for path in write_figures(found, config.keep, found.examples.shape[-1], schedules, out):
            Console().print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)
