"""Step weights: the forecast of every P-step, fitted to the images at the end of the run.

    the best polynomial's weights ─▶ run ─▶ images ─Gauss-Newton on all weights at once─▶ CacheConfig.step_weights

An extrapolation by step numbers knows nothing of the sampler's times, and what it errs the later steps add up. Here all weights of a run,
three a P-step, are fitted together, to what comes out of it. They are few, so a few noises suffice. The derivative of the images by each
weight is a difference of two runs: whatever model, engine or sampler makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokencache_compile.api import transform
from tokencache_compile.errors import ConfigError, InputError
from tokencache_compile.metrics import psnr
from tokencache_compile.passes.cache_ops import forecast_weights
from tokencache_compile.passes.cached_step import STEP_WEIGHTS
from tokencache_compile.plan import CacheConfig
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.sampling import Conditions, sample, seeded
from tokencache_compile.schedule import Schedule

HELD_OUT = 0.25  # share of the noises that the fit does not see, by which the best iteration is chosen
_STEP, _DAMPINGS = 1e-2, (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_LEAST = 0.01  # of the mean damping, for every weight: one that the images hardly show stays about where it is
OnRun = Callable[[], None]
_Given = tuple[Any, Tensor, int, Conditions]


@dataclass(frozen=True)
class StepWeights:
    """What a fit found.

    Attributes:
        config: the settings with the weights, and the schedule that they are for.
        polynomial_db: PSNR in dB of the held-out images to the uncached ones under the best order of the forecast by step numbers.
        fitted_db: the same under the weights.
    """

    config: CacheConfig
    polynomial_db: float
    fitted_db: float


def polynomial(config: CacheConfig, order: int, steps: int) -> Tensor:
    """The weights [steps, forecast + 1] of a forecast of ``order`` by step numbers; I-steps, which use none, hold."""
    table = torch.zeros(steps, config.forecast + 1)
    table[:, 0] = 1.0
    placed = replace(config, step_weights=tuple((0.0,) * (config.forecast + 1) for _ in range(steps)))
    for step in range(1, steps):
        if order and not config.schedule_of(steps).is_full(step):
            stamps = torch.tensor(placed.nodes(step), dtype=torch.float32)[None, None]
            table[step, : order + 1] = torch.cat([w.flatten() for w in forecast_weights(stamps, torch.tensor(float(step)), order)])
    return table


def fit_step_weights(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    conditions: Conditions,
    steps: int,
    config: CacheConfig,
    predictor: CachePredictor | None = None,
    iterations: int = 4,
    on_run: OnRun = lambda: None,
    backend: str = "eager",
) -> StepWeights:
    """Fit the forecast of every P-step of a run of ``steps`` steps by Gauss-Newton with damping (Levenberg, Marquardt).

    An iteration takes a run for each weight: forecast + 1 a P-step, or as many as there are I-steps before it. ``on_run`` is called after
    each run.

    Args:
        noise: [n, C, ...]; the last quarter is held out, and by it the best iteration is chosen.
        conditions: of as many samples.
        config: settings with ``history="full_steps"`` and a forecast of order 1 or 2.
        backend: of the runs, as for ``transform``: "eager" or "inductor".

    Raises:
        ConfigError: fewer than 4 noises, no P-step, or a ``config`` without such a forecast.
    """
    held_out = max(1, round(HELD_OUT * len(noise)))
    full = [step for step in range(steps) if config.schedule_of(steps).is_full(step)]
    if len(noise) < 4 or len(full) == steps:
        raise ConfigError(f"{len(noise)} noises and {steps - len(full)} P-steps were given; a fit takes 4 noises and a P-step at least.")
    config = replace(config, schedule=Schedule(config.schedule_of(steps).every, tuple(full)), step_weights=())
    table = polynomial(config, config.forecast, steps)
    placed = replace(config, step_weights=_rows(table))
    runs = _Runs(model, placed, predictor, (scheduler, noise, steps, conditions), held_out, on_run, backend)
    starts = [runs.of(polynomial(config, order, steps)) for order in range(config.forecast + 1)]
    current = best = max(starts, key=lambda run: run.seen_db)
    polynomial_db = max(run.held_out_db for run in starts)
    for _ in range(iterations):
        before, current = current, runs.improved(current)
        if current is before:
            break
        best = max(best, current, key=lambda run: run.held_out_db)
    return StepWeights(replace(config, step_weights=_rows(best.table)), polynomial_db, best.held_out_db)


def _rows(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


@dataclass(frozen=True)
class _Run:
    """A run under weights ``table`` [steps, m+1]: its images, and their PSNR to the uncached ones, of those that are fitted and others."""

    table: Tensor
    images: Tensor
    seen_db: float
    held_out_db: float


class _Runs:
    """Runs of one compiled plan under other and other weights, all of what :func:`sample` is ``given`` beside the model."""

    def __init__(
        self,
        model: nn.Module,
        config: CacheConfig,
        predictor: CachePredictor | None,
        given: _Given,
        held_out: int,
        on_run: OnRun,
        backend: str,
    ) -> None:
        scheduler, noise, steps, _ = self._given = given
        self.seen, self._on_run = len(noise) - held_out, on_run
        uncached = transform(model, ratio=0.0, backend=backend, scheduler=scheduler)
        self.net = transform(model, config=config, predictor=predictor, backend=backend, scheduler=scheduler)
        self.reference = self._images(uncached)
        self.range = 2.0 * float(self.reference.abs().max())
        self._images(self.net)  # builds the steps
        is_full = config.schedule_of(steps).is_full
        self.places = [
            (step, place) for step in range(steps) if not is_full(step) for place, node in enumerate(config.nodes(step)) if node >= 0
        ]

    def of(self, table: Tensor) -> _Run:
        for step in self.net.steps.cached:
            step.module.get_buffer(STEP_WEIGHTS).copy_(table)
        images = self._images(self.net)
        seen, held_out = (psnr(images[part], self.reference[part], self.range) for part in (slice(None, self.seen), slice(self.seen, None)))
        return _Run(table, images, seen, held_out)

    def improved(self, run: _Run) -> _Run:
        """The best of the steps of Gauss-Newton from ``run`` under several dampings, by the images fitted; ``run`` if none is better."""
        columns = []
        for step, place in self.places:
            table = run.table.clone()
            table[step, place] += _STEP
            columns.append((self.of(table).images - run.images)[: self.seen].flatten().double() / _STEP)
        jacobian = torch.stack(columns)
        error = (run.images - self.reference)[: self.seen].flatten().double()
        normal, gradient = jacobian @ jacobian.T, jacobian @ error
        floor = _LEAST * normal.diagonal().mean()
        candidates = [run]
        for damping in _DAMPINGS:
            change = torch.linalg.solve(normal + torch.diag(damping * (normal.diagonal() + floor)), -gradient)
            table = run.table.clone()
            for (step, place), value in zip(self.places, change.tolist(), strict=True):
                table[step, place] += value
            with suppress(InputError):  # far too long a step: the model's input is NaN
                candidates.append(self.of(table))
        return max(candidates, key=lambda candidate: candidate.seen_db)

    def _images(self, net: Any) -> Tensor:
        scheduler, noise, steps, conditions = self._given
        with seeded(0):
            images = sample(net, scheduler, noise, steps, conditions)
        self._on_run()
        return images.float().cpu()
