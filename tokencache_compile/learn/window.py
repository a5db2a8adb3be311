"""Windows: a stretch of sampling as inference will run it, from real data, ending in the P-step to learn from.

    x at the oldest I-step of the forecast's history ~ q(· | x_0)
    I-steps run in full and enter the history, P-steps between them take the forecast
    at the P-step itself: what would be reused, and the uncached model's stream as the target

With forecast 0 and the I-step just before, this is Alg. 1 of the paper: x_(t+1) ~ q, one solver step, the gated pass at t.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.ir import Block
from tokencache_compile.learn.deployed import Cached, DeployedBlocks
from tokencache_compile.learn.gated import GatedStep
from tokencache_compile.passes.cache_ops import extrapolate, forecast_weights
from tokencache_compile.plan import CacheConfig
from tokencache_compile.sampling import guided

MakeCall = Callable[[Tensor, Tensor], Mapping[str, Any]]  # (sample, timestep) -> keyword arguments of the model
Predict = Callable[[int, Mapping[str, Any]], Tensor]  # (sampling step, keyword arguments of the model) -> the model's output


def history_of(config: CacheConfig, step: int, steps: int) -> tuple[int, ...]:
    """The I-steps whose updates P-step ``step`` of ``steps`` uses, newest first: up to order + 1 of them."""
    full = [i for i in range(step) if config.schedule_of(steps).is_full(i)]
    return tuple(reversed(full[-(config.forecast + 1) :]))


def reused_values(history: list[list[Cached]], stamps: list[int], step: int, config: CacheConfig) -> list[Cached]:
    """Each cached block's held or forecast values at ``step``. ``history``: per I-step, newest first, computed at ``stamps``."""
    known = stamps[: config.forecast + 1]
    times = torch.tensor([[known + [-1] * (config.forecast + 1 - len(known))]], dtype=torch.float32)
    weights = [w.to(history[0][0].update.device) for w in forecast_weights(times, torch.tensor(float(step)), config.forecast)[: len(known)]]
    found = []
    for block in zip(*history[: len(known)], strict=True):
        context = block[0].context
        if config.context == "reuse" and config.history == "full_steps":
            context = tuple(extrapolate(values, weights) for values in zip(*(cached.context for cached in block), strict=True))
        found.append(Cached(extrapolate([cached.update for cached in block], weights), context))
    return found


def solve(
    scheduler: Any,
    clean: Tensor,
    noise: Tensor,
    steps: range,
    make_call: MakeCall,
    predict: Predict,
    generators: list[torch.Generator],
    guidance: float = 1.0,
) -> Mapping[str, Any]:
    """Noise ``clean`` [B, C, …] to the first of the sampling ``steps`` and run the solver through them.

    Args:
        scheduler: its timesteps set; left as it is.
        predict: the model's output [B, ≥ C, …] at a step, for the call that ``make_call`` made; with ``guidance`` of 2B rows.
        generators: a stochastic solver's, one a row.

    Returns:
        The call of the model at the step after the last.
    """
    scheduler = copy.deepcopy(scheduler)
    timesteps = scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(steps.start)
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = scheduler.add_noise(clean, noise, timesteps[steps.start].expand(len(clean)))
    for step in steps:
        output = predict(step, make_call(scheduler.scale_model_input(x, timesteps[step]), timesteps[step]))
        predicted = output[:, : clean.shape[1]]
        if guidance != 1.0:
            predicted = guided(predicted, guidance)
        x = scheduler.step(predicted, timesteps[step], x, **extra).prev_sample
    return make_call(scheduler.scale_model_input(x, timesteps[steps.stop]), timesteps[steps.stop])


class Window:
    """Runs one window on the model of ``blocks`` and returns its :class:`GatedStep`.

    Args:
        scheduler: the deployment's solver, its timesteps set.
        num_cached: L − K blocks that are cached.
    """

    def __init__(self, blocks: DeployedBlocks, scheduler: Any, config: CacheConfig, num_cached: int, guidance: float = 1.0) -> None:
        self.blocks, self.config, self.num_cached, self.guidance = blocks, config, num_cached, guidance
        self.scheduler = scheduler

    @torch.no_grad()
    def run(self, clean: Tensor, noise: Tensor, step: int, make_call: MakeCall, generators: list[torch.Generator]) -> GatedStep:
        """The gated step at P-step ``step`` of samples ``clean`` [B, C, …] noised by ``noise``. ``generators``: the solver's, one a row."""
        wanted = history_of(self.config, step, len(self.scheduler.timesteps))
        history: list[list[Cached]] = []
        stamps: list[int] = []

        def predict(index: int, call: Mapping[str, Any]) -> Tensor:
            if index not in wanted:
                return self._forecast_step(call, reused_values(history, stamps, index, self.config))
            output, cached = self._full_step(call)
            history.insert(0, cached)
            stamps.insert(0, index)
            return output

        call = solve(self.scheduler, clean, noise, range(wanted[-1], step), make_call, predict, generators, self.guidance)
        output, streams, first = self.blocks.stack.updates(call)
        return GatedStep(call, first, reused_values(history, stamps, step, self.config), streams[-1], output[:, : clean.shape[1]])

    def _full_step(self, call: Mapping[str, Any]) -> tuple[Tensor, list[Cached]]:
        """An I-step: the model's output, and what it caches of every cached block."""
        found: list[Cached] = []

        def visit(block: Block, inputs: list[Tensor]) -> Tensor:
            if block.index >= self.num_cached:
                return self.blocks.stack.compute(block, inputs)
            stream, cached = self.blocks.full(block, inputs)
            found.append(cached)
            return stream

        return self.blocks.stack.run(call, visit), found

    def _forecast_step(self, call: Mapping[str, Any], reused: list[Cached]) -> Tensor:
        """A P-step that recomputes no token."""
        stack = self.blocks.stack

        def visit(block: Block, inputs: list[Tensor]) -> Tensor:
            if block.index < self.num_cached:
                return stack.stream_of(block, inputs) + reused[block.index].update
            return stack.compute(block, inputs)

        return stack.run(call, visit)
