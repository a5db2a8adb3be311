"""Ideas beyond the paper that a P-step could use, each beside the default: forecasts, early I-steps, token scores, keep counts.

    python benchmarks/beyond.py                # → benchmarks/results/beyond.json, docs/beyond.md

The reference DiT, 50 guided DDIM steps. Fitted forecasts learn from other noises than are measured. Rows are written as they come, so a
stopped run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from diffusers import DDIMScheduler
from selectors_on_equal_terms import ScoredRun
from torch import Tensor
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

from tokencache_compile import CacheConfig, Schedule
from tokencache_compile.demo import DEFAULT_MODEL, load_reference
from tokencache_compile.engine import Engine, TorchEngine
from tokencache_compile.explain import run_macs
from tokencache_compile.export.cpu_kernels import lower_linears
from tokencache_compile.ir import Block
from tokencache_compile.learn.calibration import GuidedCall
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.metrics import mean_abs_deviation, psnr
from tokencache_compile.passes.cache_ops import add_forecast, extrapolate, forecast_weights
from tokencache_compile.passes.pipeline import StepPrograms, build_steps
from tokencache_compile.sampling import Conditions, sample

STEPS, BLOCKS, DAMPING, CPU = 50, 12, 0.8, torch.device("cpu")
MEASURED, FITTED = 1234, 999  # seeds of the noises
RESULTS = Path(__file__).resolve().parent / "results"
PAGE, MARK = RESULTS.parents[1] / "docs" / "beyond.md", "<!-- benchmarks/beyond.py -->"
Forecast = Callable[[int, Sequence[int]], Sequence[float]]  # (step, last I-steps, newest first) -> the weight of each one's update


def damped_weights(stamps: Tensor, step: Tensor, order: int, damping: float = DAMPING) -> list[Tensor]:
    """The package's forecast of order 2, with ``damping`` on what the second difference adds."""
    line, bend = [*forecast_weights(stamps, step, 1), 0.0], forecast_weights(stamps, step, order)
    return [a + damping * (b - a) for a, b in zip(line, bend, strict=True)]


def damped(step: int, nodes: Sequence[int], damping: float) -> list[float]:
    """The same as numbers: ``damping`` 1 is the package's forecast of order 2, 0 that of order 1."""
    stamps = torch.tensor([[[*nodes, *[-1] * (3 - len(nodes))]]], dtype=torch.float32)
    return [float(weight) for weight in damped_weights(stamps, torch.tensor(float(step)), 2, damping)][: len(nodes)]


def fitted(moments: Tensor, step: int, nodes: Sequence[int], damping_only: bool) -> list[float]:
    """Least squares of the update at ``step`` on those at ``nodes``, by the inner products ``moments`` [T, T] of all updates.

    ``damping_only``: the one number that is fitted is the damping of :func:`damped`.
    """
    chosen = torch.eye(STEPS, dtype=torch.float64)[list(nodes)]
    start, ways = torch.zeros(STEPS, dtype=torch.float64), chosen
    if damping_only:
        start, bend = (torch.tensor(damped(step, nodes, value), dtype=torch.float64) @ chosen for value in (0, 1))
        ways = (bend - start)[None]
    target = torch.eye(STEPS, dtype=torch.float64)[step] - start
    share = torch.linalg.lstsq(ways @ moments @ ways.T, ways @ moments @ target, driver="gelsd").solution
    weights: list[float] = (chosen @ (start + share @ ways)).tolist()
    return weights


def engines_of(steps: StepPrograms) -> list[Engine]:
    """Eager engines, the I-step's linears those of the P-steps."""
    full = replace(steps.full, module=lower_linears(steps.full.module))
    return [TorchEngine(step, compiled=False) for step in (full, *steps.cached)]


class ForecastRun:
    """A transformer stand-in that recomputes nothing in P-steps: the blocks' summed update is ``forecast``."""

    def __init__(self, steps: StepPrograms, stack: BlockStack, schedule: Schedule, forecast: Forecast | None) -> None:
        self.steps, self.stack, self.schedule, self.forecast = steps, stack, schedule, forecast
        self.full = engines_of(steps)[0]
        self.caches = steps.initial_caches(CPU)
        self.nodes: list[int] = []
        self.step = -1

    def update(self, back: int) -> Tensor:
        """What the blocks added [rows, N, C] at the last I-step, or ``back`` I-steps before it."""
        (unit,) = self.steps.units
        return self.caches[[spec.name for spec in self.steps.full.caches].index(f"update_{unit.name}_{back}")]

    def __call__(self, rows: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.step += 1
        if self.forecast is None or self.schedule.is_full(self.step):
            self.nodes = [self.step, *self.nodes[:2]]
            outputs, self.caches = self.full([rows, timestep, class_labels], self.steps.step_inputs(self.step, CPU), self.caches)
            return (outputs[0],)
        weights = [torch.tensor(weight) for weight in self.forecast(self.step, self.nodes)]

        def visit(block: Block, inputs: list[Tensor]) -> Tensor:
            stream = self.stack.stream_of(block, inputs)
            return stream if block.index else add_forecast(stream, [self.update(back) for back in range(len(weights))], weights)

        return (self.stack.run(dict(hidden_states=rows, timestep=timestep, class_labels=class_labels), visit),)


class SelectedRun(ScoredRun):
    """P-steps whose tokens are those of the scores called ``name``: :class:`ScoredRun`'s and three more."""

    def __call__(self, rows: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        forecasts = self._forecasts()
        if self.name == "true error" and not self.steps.plan.config.schedule_of(STEPS).is_full(self.step):
            extras = [torch.tensor(float(self.step)), torch.zeros(self.steps.random_shape)]
            _, caches = self.engines[0]([rows, timestep, class_labels], extras, [cache.clone() for cache in self.caches])
            self.missed = self._distances(forecasts, caches)
        step = self.step
        result = super().__call__(rows, timestep, class_labels, return_dict)
        if self.name == "forecast error" and self.steps.plan.config.schedule_of(STEPS).is_full(step):
            self.missed = self._distances(forecasts, self.caches)
        return result

    def _forecasts(self) -> list[Tensor]:
        """The update [rows, N, C] that each block is forecast to have at this step."""
        weights = forecast_weights(self._cache("stamps"), torch.tensor(float(self.step)), 2)
        return [extrapolate([self._cache(f"update_{block:02d}_{back}") for back in range(3)], weights) for block in range(BLOCKS)]

    def _distances(self, forecasts: Sequence[Tensor], caches: Sequence[Tensor]) -> list[Tensor]:
        """Each block's error of ``forecasts`` [rows, N] to the newest updates in ``caches``."""
        names = [spec.name for spec in self.steps.full.caches]
        return [(caches[names.index(f"update_{block:02d}_0")] - one).norm(dim=-1) for block, one in enumerate(forecasts)]

    def _scores(self, kwargs: dict[str, Any], rows: int) -> Sequence[Tensor]:
        if self.name in ("forecast error", "true error"):
            return self.missed
        if self.name == "one draw for all blocks":
            draw = torch.rand(1, self.steps.plan.tokens, generator=torch.Generator().manual_seed(self.step))
            return [draw.expand(rows, -1)] * BLOCKS
        return super()._scores(kwargs, rows)


def draw(samples: int, seed: int) -> tuple[Tensor, Conditions]:
    """Noises, and the ten classes in turn."""
    noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return noise, Conditions.of_labels(torch.arange(samples) % 10, NULL_LABEL, 2.5)


def run(net: Any, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """The images, and pred_x0 of every step."""
    seen: list[Tensor] = []
    noise, conditions = draw(samples, seed)
    images = sample(net, DDIMScheduler(**SCHEDULER_CONFIG), noise, STEPS, conditions, lambda _, x: seen.append(x))
    return images.clamp(-1, 1), torch.stack(seen).clamp(-1, 1)


class Bench:
    """Graphs of one batch size, made once."""

    def __init__(self, net: Any, samples: int) -> None:
        self.net, self.samples = net, samples
        noise, conditions = draw(samples, MEASURED)
        self.call = GuidedCall(net, conditions).kwargs(noise, torch.tensor(500))
        self.stack = BlockStack(net, self.call)
        self.nothing = build_steps(net, self.call, CacheConfig(ratio=1.0), None)

    def forecast(self, schedule: Schedule, forecast: Forecast | None) -> ForecastRun:
        return ForecastRun(self.nothing, self.stack, schedule, forecast)

    def moments(self, seed: int) -> Tensor:
        """Inner products [T, T] of the blocks' summed updates along uncached runs."""
        uncached, updates = self.forecast(Schedule(1), None), []

        def look(rows: Tensor, **given: Any) -> tuple[Tensor]:
            result = uncached(rows, **given)
            updates.append(uncached.update(0).flatten())
            return result

        run(look, self.samples, seed)
        table = torch.stack(updates)
        return (table @ table.T).double()


def rows(bench: Bench, moments: Tensor) -> Iterator[tuple[str, str, Callable[[], tuple[Any, float]]]]:
    """Table, name, and what makes the run and its MACs in full steps."""

    def macs(steps: StepPrograms, schedule: Schedule) -> float:
        plan = replace(steps.plan, config=replace(steps.plan.config, schedule=schedule))
        return run_macs(plan, steps.macs_full, steps.macs_cached, STEPS) / steps.macs_full

    def forecast_row(schedule: Schedule, forecast: Forecast) -> tuple[Any, float]:
        return bench.forecast(schedule, forecast), macs(bench.nothing, schedule)

    def selected(config: CacheConfig, name: str, weights: Any = forecast_weights) -> tuple[Any, float]:
        with patch("tokencache_compile.passes.cached_step.forecast_weights", weights):
            steps = build_steps(bench.net, bench.call, config, None)
        return SelectedRun(bench.net, steps, engines_of(steps), name), macs(steps, config.schedule_of(STEPS))

    forecasts: dict[str, Forecast] = {
        "the default: polynomial": partial(damped, damping=1.0),
        f"second difference times {DAMPING}": partial(damped, damping=DAMPING),
        "damping fitted for every step": partial(fitted, moments, damping_only=True),
        "weights fitted for every step": partial(fitted, moments, damping_only=False),
    }
    for every in (5, 4, 3, 2):
        for name, forecast in forecasts.items():
            yield "forecast", f"every {every}: {name}", partial(forecast_row, Schedule(every), forecast)
        if every == 2:  # is as early already
            continue
        as_many = sum(map(Schedule(every, (0, 2)).is_full, range(STEPS)))
        early = {f"0, 2, then every {every}": Schedule(every, (0, 2)), f"{as_many} spread evenly": Schedule.uniform(STEPS, as_many)}
        for name, schedule in early.items():
            yield "early", f"every {every}: {name}", partial(forecast_row, schedule, forecasts["the default: polynomial"])
    halves, some, none = (*(0,) * (STEPS // 2), 1), (12,) * BLOCKS, (0,) * BLOCKS
    for every in (4, 3):
        config = CacheConfig(schedule=Schedule(every))
        pair = replace(config, selection="pair")
        first, second = (replace(config, keep=keep, groups=halves) for keep in ((some, none), (none, some)))
        tokens: dict[str, Callable[[], tuple[Any, float]]] = {
            "the default: random": partial(selected, config, "random"),
            f"random, second difference times {DAMPING}": partial(selected, config, "random", damped_weights),
            "random, one draw for all blocks": partial(selected, config, "one draw for all blocks"),
            "random, twice as many in the first half of the run": partial(selected, first, "random"),
            "random, twice as many in the second half": partial(selected, second, "random"),
            "largest change": partial(selected, config, "change"),
            "largest change, one selection a guidance pair": partial(selected, pair, "change"),
            "largest forecast error": partial(selected, config, "forecast error"),  # at the last I-step
            "largest forecast error, one selection a guidance pair": partial(selected, pair, "forecast error"),
            "the forecast's true error, known": partial(selected, config, "true error"),  # from the uncached step: a bound, no method
            "the forecast's true error, known, one selection a guidance pair": partial(selected, pair, "true error"),
        }
        for name, make in tokens.items():
            yield "tokens", f"every {every}: {name}", make


def tables(result: dict[str, Any]) -> str:
    """The measured rows, for the page."""
    titles = {
        "forecast": "Forecasts, nothing recomputed",
        "early": "A second I-step at step 2 (polynomial, nothing recomputed)",
        "tokens": "Tokens, ratio 0.9",
    }
    text = f"{result['samples']} noises; fitted on as many others.\n"
    for table, title in titles.items():
        text += f"\n### {title}\n\n| setting | MACs, in full steps of {STEPS} | PSNR to uncached (dB) | deviation of pred_x0 |\n"
        text += "| --- | --- | --- | --- |\n"
        for name, row in result["rows"].items():
            if row["table"] == table:
                text += f"| {name} | {row['macs']:.1f} | {row['psnr_db']:.2f} | {row['pred_x0']:.4f} |\n"
    return text


def main(
    out: Annotated[Path, typer.Option(help="JSON file, appended to.")] = RESULTS / "beyond.json",
    samples: int = 40,
    threads: int = 1,
) -> None:
    """Measure the rows that are missing, and put them into docs/beyond.md."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"samples": samples, "rows": {}}
    bench = Bench(load_reference(DEFAULT_MODEL), samples)
    images, predictions = run(bench.forecast(Schedule(1), None), samples, MEASURED)
    for table, name, make in rows(bench, bench.moments(FITTED)):
        if name in result["rows"]:
            continue
        net, macs = make()
        got, seen = run(net, samples, MEASURED)
        row = dict(table=table, macs=macs, psnr_db=psnr(got, images), pred_x0=mean_abs_deviation(seen, predictions))
        result["rows"][name] = row
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name:60s} {row['macs']:5.1f} {row['psnr_db']:6.2f} {row['pred_x0']:.4f}", flush=True)
    before, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{before}{MARK}\n\n{tables(result)}")


if __name__ == "__main__":
    typer.run(main)
