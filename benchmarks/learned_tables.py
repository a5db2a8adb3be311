"""Tables in the shape of the paper's VI to IX on the reference DiT: selectors, ratios, schedules, K, contexts and forecasts.

    python benchmarks/learned_tables.py --artefact tokencache_compile/reference/cache --out benchmarks/results/learned_tables.json

Every row is one guided 50-step DDIM run of the same fixed noises: MSE and PSNR of the final images and the mean |Δ pred_x0| over the steps
to the uncached run, the share of images that a classifier takes for the class asked for, and the run's MACs. Rows are kept as they
come, so a stopped run goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel
from fashion_mnist import load_fashion_mnist
from judge_reference import classify, machine, train_classifier
from selectors_on_equal_terms import ScoredRun
from torch import Tensor
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

import tokencache_compile as tc
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.learn.calibration import Calibration, GuidedCall
from tokencache_compile.learn.interval_errors import interval_errors
from tokencache_compile.learn.schedules import by_mass, optimal, reverse
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.metrics import deviation_per_step, psnr
from tokencache_compile.passes.pipeline import build_steps
from tokencache_compile.plan import CacheConfig
from tokencache_compile.sampling import Conditions, sample

STEPS, FULL_STEPS = 50, 12


class Bench:
    """One set of noises, its uncached run, and the rows measured against it."""

    def __init__(self, out: Path, model: Path, artefact: Path, samples: int, guidance: float) -> None:
        self.out = out
        self.net = DiTTransformer2DModel.from_pretrained(model).eval()
        self.artefact = CacheArtefact.from_pretrained(artefact, self.net)
        self.labels = torch.arange(samples) % 10
        self.noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(4321))
        null = NULL_LABEL if guidance != 1.0 else None
        self.conditions = (
            Conditions.of_labels(self.labels, null, guidance) if null is not None else Conditions({"class_labels": self.labels})
        )
        images, classes = load_fashion_mnist("train")
        self.classifier = train_classifier(images[:20_000], classes[:20_000], 3, 0)
        self.result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
        self.result["settings"] = dict(samples=samples, steps=STEPS, full_steps=FULL_STEPS, guidance=guidance, seed=4321)
        self.result["machine"] = machine()
        self.reference, self.predictions = self._run(self.net, STEPS)
        call = dict(hidden_states=torch.cat([self.noise] * self._copies), timestep=torch.full((samples * self._copies,), 500))
        self.call = {**call, **self.conditions.rows}
        self.stack = BlockStack(self.net, self.call)
        self._keep("uncached", lambda: (self.reference, self.predictions, float(STEPS)))

    @property
    def _copies(self) -> int:
        return 1 if self.conditions.null is None else 2

    def _run(self, transformer: Any, steps: int, scheduler: Any = None) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []
        scheduler = scheduler or DDIMScheduler(**SCHEDULER_CONFIG)
        images = sample(transformer, scheduler, self.noise, steps, self.conditions, lambda _, x: seen.append(x))
        return images.clamp(-1, 1), seen

    def _keep(self, name: str, run: Callable[[], tuple[Tensor, list[Tensor], float]]) -> None:
        if name in self.result["rows"]:
            return
        start = time.monotonic()
        images, predictions, cost = run()
        named_right = (classify(self.classifier, images) == self.labels).double().mean()
        row: dict[str, Any] = dict(full_step_equivalents=cost, accuracy=float(named_right))
        if name != "uncached":
            row |= dict(mse=float((images - self.reference).double().square().mean()), psnr_db=psnr(images, self.reference))
        if len(predictions) == STEPS and name != "uncached":
            deviation = deviation_per_step(predictions, self.predictions)
            row["pred_x0_mae"] = sum(deviation) / len(deviation)
        self.result["rows"][name] = row
        self.out.parent.mkdir(parents=True, exist_ok=True)
        aside = self.out.with_suffix(".partial")
        aside.write_text(json.dumps(self.result, indent=1) + "\n")
        os.replace(aside, self.out)
        print(f"{name:50s}", {k: round(v, 6) for k, v in row.items()}, f"{time.monotonic() - start:.0f} s", flush=True)

    def config(self, name: str, config: CacheConfig) -> None:
        """A row of the dispatcher under ``config``."""

        def run() -> tuple[Tensor, list[Tensor], float]:
            scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
            predictor = self.artefact.predictor if config.scorer == "predictor" else None
            cached = tc.transform(self.net, config, predictor=predictor, backend="eager", scheduler=scheduler)
            images, predictions = self._run(cached, STEPS, scheduler)
            summary = cached.summary()
            return images, predictions, summary.macs / summary.macs_uncached * STEPS

        self._keep(name, run)

    def fewer_steps(self, steps: int) -> None:
        self._keep(f"fewer steps: {steps}", lambda: (*self._run(self.net, steps), float(steps)))

    def selector(self, name: str, config: CacheConfig) -> None:
        """A row of Table VI: the selector's scores in the graphs of ``config``."""
        plain = replace(config, scorer="random")

        def run() -> tuple[Tensor, list[Tensor], float]:
            steps = build_steps(self.net, self.call, plain, None)
            scored = ScoredRun(self.net, steps, name, self.artefact.predictor, self.stack)
            images, predictions = self._run(scored, STEPS)
            full = sum(plain.schedule.is_full(i) for i in range(STEPS))
            return images, predictions, full + (STEPS - full) * steps.macs_cached[0] / steps.macs_full

        self._keep(f"VI selector: {name}", run)


def main(
    out: Annotated[Path, typer.Option(help="JSON file, appended to.")],
    artefact: Annotated[Path, typer.Option(help="The reference DiT's artefact.")] = Path("tokencache_compile/reference/cache"),
    model: Annotated[Path, typer.Option(help="Folder of the reference DiT.")] = Path("tokencache_compile/reference/dit"),
    samples: int = 256,
    guidance: float = 2.5,
    threads: int = 2,
    tables: Annotated[str, typer.Option(help="Which tables, commas between.")] = "VI,VII,VIII,IX,contexts",
) -> None:
    """Measure the rows of the tables asked for."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    bench = Bench(out, model, artefact, samples, guidance)
    trained = replace(bench.artefact.config, keep=None, groups=(), schedule=tc.Schedule.uniform(STEPS, FULL_STEPS))
    wanted = tables.split(",")
    if "VI" in wanted:
        for name in ("random", "norm", "change", "tome", "toca", "predictor"):
            bench.selector(name, trained)
    if "IX" in wanted:
        for last_k in (0, 1, 2, 3, 4):
            bench.config(f"IX K = {last_k}", replace(trained, last_k=last_k))
    if "VIII" in wanted:
        for name, schedule in schedules(bench, artefact, trained).items():
            bench.config(f"VIII schedule: {name}", replace(trained, schedule=schedule))
    if "VII" in wanted:
        for ratio in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            for scorer in ("predictor", "random") if ratio < 1.0 else ("random",):
                bench.config(f"VII ratio {ratio}: {scorer}", replace(trained, ratio=ratio, scorer=scorer))  # type: ignore[arg-type]
        for steps in (12, 17, 20, 25, 30):
            bench.fewer_steps(steps)
    if "contexts" in wanted:
        for context in ("kept", "cached", "full", "reuse"):
            for forecast in (0, 1, 2):
                bench.config(f"context {context}, forecast {forecast}", replace(trained, context=context, forecast=forecast))  # type: ignore[arg-type]
        for every in (2, 3, 4):
            bench.config(f"every {every}, nothing recomputed, K = 0", CacheConfig(ratio=1.0, last_k=0, schedule=tc.Schedule(every)))
            bench.config(f"every {every}, predictor at 0.9, K = 0", replace(trained, last_k=0, schedule=tc.Schedule(every)))


def schedules(bench: Bench, artefact: Path, trained: CacheConfig) -> dict[str, tc.Schedule]:
    """The strategies of Table VIII at 12 I-steps of 50, and the regular spacings beside them."""
    found = {"uniform": tc.Schedule.uniform(STEPS, FULL_STEPS), "every 4 (13 I-steps)": tc.Schedule(4)}
    file = artefact / "calibration.safetensors"
    if file.exists():
        calibration = Calibration.load(file)
        alpha = calibration.mean_alpha.tolist()
        for beta in (-1.0, 1.0):
            mass = by_mass(alpha, FULL_STEPS, beta, relative=True)
            found[f"Eq. 13 mass, β = {beta:g} std"] = mass
            found[f"reverse of mass, β = {beta:g} std"] = reverse(mass, STEPS)
        found["Eq. 13 accumulated, β = -1 std"] = by_mass(alpha, FULL_STEPS, -1.0, accumulated=True, relative=True)
    labels = torch.arange(4)
    conditions = Conditions.of_labels(labels, NULL_LABEL, 2.5)
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    scheduler.set_timesteps(STEPS)
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(7))
    stack = BlockStack(bench.net, GuidedCall(bench.net, conditions).kwargs(noise, scheduler.timesteps[0]))
    costs = interval_errors(stack, scheduler, noise, conditions, STEPS, trained.last_k or 0, trained.forecast, 8)
    found["optimal (interval errors)"] = optimal(costs, STEPS, FULL_STEPS)
    return found


if __name__ == "__main__":
    typer.run(main)
