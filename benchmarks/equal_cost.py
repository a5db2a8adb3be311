"""Caching against the plain sampler with fewer steps at equal MACs and at equal latency, on the reference DiT.

    python benchmarks/equal_cost.py --out benchmarks/results/equal_cost.json

Three parts, all with the trained predictor: the contexts and forecast orders, guided and not; their latency, whole compiled runs in turn;
and what MACs buy, for 20, 50 and 100 sampling steps: recomputed tokens (ratio) or more I-steps (spacing). Each row's ``margin_db`` is
its PSNR to the uncached run minus the best of the plain sampler with at most as many steps as its MACs pay for, interpolated between
measured numbers of steps. Rows are kept as they come, so a stopped run goes on.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel
from judge_reference import machine
from torch import Tensor
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

import tokencache_compile as tc
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.engine import Engine, make_engines
from tokencache_compile.learn.calibration import GuidedCall
from tokencache_compile.metrics import psnr
from tokencache_compile.passes.pipeline import StepPrograms, build_steps
from tokencache_compile.plan import CacheConfig, Context
from tokencache_compile.sampling import Conditions, sample

MODEL, ARTEFACT = Path("tokencache_compile/reference/dit"), Path("tokencache_compile/reference/cache")
GUIDANCE = 2.5
SHARES = (0.24, 0.26, 0.3, 0.34, 0.38, 0.42, 0.46, 0.5, 0.56, 0.62, 0.68, 0.74)  # of the steps, that plain runs are measured at
LATENCY_ROUNDS = 3


class Cached:
    """The step graphs of one config, run on any schedule and step count: they are the same for all."""

    def __init__(self, net: Any, noise: Tensor, conditions: Conditions, config: CacheConfig, predictor: Any, backend: str) -> None:
        call = GuidedCall(net, conditions).kwargs(noise, torch.tensor(500))
        self.steps: StepPrograms = build_steps(net, call, config, predictor if config.scorer == "predictor" else None)
        self.engines: Sequence[Engine] = make_engines(backend, self.steps)
        self.schedule, self.step, self.caches = tc.Schedule(1), 0, list[Tensor]()

    def begin(self, schedule: tc.Schedule) -> Cached:
        """Stand in for the transformer in one run on ``schedule``."""
        self.schedule, self.step, self.caches = schedule, 0, self.steps.initial_caches(torch.device("cpu"))
        return self

    def __call__(self, rows: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        engine = self.engines[0 if self.schedule.is_full(self.step) else 1]
        outputs, self.caches = engine([rows, timestep, class_labels], self.steps.step_inputs(self.step, rows.device), self.caches)
        self.step += 1
        return (outputs[0],)

    def cost(self, schedule: tc.Schedule, steps: int) -> float:
        """MACs of a run in those of full steps."""
        full = sum(schedule.is_full(step) for step in range(steps))
        return full + (steps - full) * self.steps.macs_cached[0] / self.steps.macs_full


class Bench:
    """One set of noises, and the rows measured on it."""

    def __init__(self, out: Path, samples: int) -> None:
        self.out = out
        self.net = DiTTransformer2DModel.from_pretrained(MODEL).eval()
        self.artefact = CacheArtefact.from_pretrained(ARTEFACT, self.net)
        self.noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(1234))
        self.labels = torch.arange(samples) % 10
        self.result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"plain": {}, "rows": {}, "latency": {}}
        self.result["settings"] = dict(samples=samples, guidance=GUIDANCE, seed=1234)
        self.result["machine"] = machine()
        self.scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
        self.plain_runs: dict[float, Any] = {}
        self.references: dict[tuple[float, int], Tensor] = {}

    def conditions(self, guidance: float) -> Conditions:
        if guidance == 1.0:
            return Conditions({"class_labels": self.labels})
        return Conditions.of_labels(self.labels, NULL_LABEL, guidance)

    def run(self, transformer: Any, steps: int, guidance: float) -> Tensor:
        return sample(transformer, self.scheduler, self.noise, steps, self.conditions(guidance)).clamp(-1, 1)

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        aside = self.out.with_suffix(".partial")
        aside.write_text(json.dumps(self.result, indent=1) + "\n")
        os.replace(aside, self.out)

    def uncached(self, guidance: float) -> Any:
        """The plain model, compiled."""
        if guidance not in self.plain_runs:
            self.plain_runs[guidance] = tc.transform(self.net, ratio=0.0, scheduler=self.scheduler)
        return self.plain_runs[guidance]

    def reference(self, guidance: float, steps: int) -> Tensor:
        if (guidance, steps) not in self.references:
            self.references[guidance, steps] = self.run(self.uncached(guidance), steps, guidance)
        return self.references[guidance, steps]

    def plain(self, guidance: float, steps: int, count: float) -> float:
        """PSNR to the plain run of ``steps`` steps that ``count`` steps pay for: interpolated between measured counts, or that of fewer.

        Fewer steps can be closer: half of them lie on the same timesteps, a few more do not.
        """
        known = self.result["plain"].setdefault(f"guidance {guidance:g}, {steps} steps", {})
        for few in sorted({round(share * steps) for share in SHARES}):
            if str(few) not in known:
                known[str(few)] = psnr(self.run(self.uncached(guidance), few, guidance), self.reference(guidance, steps))
                self.save()
        measured = {float(few): value for few, value in known.items()}
        below, above = max(n for n in measured if n <= count), min(n for n in measured if n >= count)
        share = (count - below) / (above - below) if above > below else 0.0
        interpolated = measured[below] + share * (measured[above] - measured[below])
        return float(max(interpolated, *(value for n, value in measured.items() if n <= count)))

    def cached(self, config: CacheConfig, guidance: float, backend: str) -> Cached:
        config = replace(config, selection="sample" if guidance == 1.0 else "pair")
        return Cached(self.net, self.noise, self.conditions(guidance), config, self.artefact.predictor, backend)

    def keep(self, name: str, cached: Cached, schedule: tc.Schedule, guidance: float, steps: int, **fields: Any) -> None:
        value = psnr(self.run(cached.begin(schedule), steps, guidance), self.reference(guidance, steps))
        cost = cached.cost(schedule, steps)
        margin = value - self.plain(guidance, steps, cost)
        self.result["rows"][name] = dict(
            fields, guidance=guidance, steps=steps, psnr_db=value, full_step_equivalents=cost, margin_db=margin
        )
        self.save()
        print(f"{name:60s} {cost:6.2f} of {steps} steps' MACs  {value:6.2f} dB  {margin:+6.2f} dB", flush=True)

    def contexts(self, guidance: float) -> None:
        """The contexts and forecasts on the predictor at ratio 0.9, an I-step every 4th step of 50."""
        base, schedule = replace(self.artefact.config, keep=None, groups=()), tc.Schedule(4)
        for context in get_args(Context):
            for forecast in (2, 1, 0):
                name = f"guidance {guidance:g}: {context}, forecast {forecast}"
                if name not in self.result["rows"]:
                    cached = self.cached(replace(base, context=context, forecast=forecast), guidance, "eager")
                    self.keep(name, cached, schedule, guidance, 50, part="contexts", context=context, forecast=forecast)

    def spend(self, steps: int) -> None:
        """What MACs buy: recomputed tokens, or more I-steps."""
        base = replace(self.artefact.config, keep=None, groups=())
        for ratio in (1.0, 0.9, 0.7, 0.5):
            names = {every: f"{steps} steps: ratio {ratio:g}, every {every}" for every in (2, 3, 4)}
            if all(name in self.result["rows"] for name in names.values()):
                continue
            config = replace(base, ratio=ratio, scorer="random" if ratio == 1.0 else "predictor")
            cached = self.cached(config, GUIDANCE, "inductor")
            for every, name in names.items():
                self.keep(name, cached, tc.Schedule(every), GUIDANCE, steps, part="spend", ratio=ratio, every=every)

    def latency(self, guidance: float) -> None:
        """Whole runs of 50 steps, compiled, in turn with the compiled uncached model's; the margin is over fewer steps of that latency.

        Seconds are those of the CPU: on one thread that is what an idle machine's clock shows, and other work does not count.
        """
        base = replace(self.artefact.config, keep=None, groups=())
        settings = {f"{context}, forecast {base.forecast}": replace(base, context=context) for context in get_args(Context)}
        settings["kept, forecast 0"] = replace(base, context="kept", forecast=0)
        settings["nothing recomputed, forecast 2"] = replace(base, ratio=1.0, scorer="random")
        for setting, config in settings.items():
            name = f"guidance {guidance:g}: {setting}"
            if name in self.result["latency"]:
                continue
            cached, uncached, schedule = self.cached(config, guidance, "inductor"), self.uncached(guidance), tc.Schedule(4)
            value = psnr(self.run(cached.begin(schedule), 50, guidance), self.reference(guidance, 50))
            ratios = []
            for _ in range(LATENCY_ROUNDS):
                seconds = []
                for transformer in (uncached, cached.begin(schedule)):
                    start = time.process_time()
                    self.run(transformer, 50, guidance)
                    seconds.append(time.process_time() - start)
                ratios.append(seconds[1] / seconds[0])
            ratio = statistics.median(ratios)
            margin, cost = value - self.plain(guidance, 50, 50 * ratio), cached.cost(schedule, 50)
            row = dict(latency_ratio=ratio, ratios=ratios, psnr_db=value, margin_db=margin, full_step_equivalents=cost)
            row["margin_at_macs_db"] = value - self.plain(guidance, 50, cost)
            self.result["latency"][name] = row
            self.save()
            print(f"latency {name:40s} {ratio:.3f}  {value:6.2f} dB  {margin:+6.2f} dB", flush=True)


def main(
    out: Annotated[Path, typer.Option(help="JSON file, appended to.")],
    samples: int = 20,
    threads: int = 1,
    parts: Annotated[
        str, typer.Option(help="Which parts, commas between.")
    ] = "guided,latency,spend-50,unguided,latency-unguided,spend-20,spend-100",
) -> None:
    """Measure the rows that are missing."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    bench = Bench(out, samples)
    measure = {"guided": lambda: bench.contexts(GUIDANCE), "unguided": lambda: bench.contexts(1.0)}
    measure |= {"latency": lambda: bench.latency(GUIDANCE), "latency-unguided": lambda: bench.latency(1.0)}
    measure |= {f"spend-{steps}": partial(bench.spend, steps) for steps in (20, 50, 100)}
    for part in parts.split(","):
        measure[part]()


if __name__ == "__main__":
    typer.run(main)
