"""What it costs to leave a step uncomputed: the error of every P-step for every position of its I-steps.

Measured along the full run: at each step the cached blocks' summed update is forecast from earlier true ones, the rest of
the model and the scheduler run on it, and the next sample is compared with the true one. One step's own error, in other words,
not what it grows into. :func:`tokencache_compile.learn.schedules.optimal` chooses a schedule by it.

Measured on the reference DiT (50 steps, forecast 1 and 2, K = 0): the schedule of least summed error put long intervals early and
lost 0.6 to 7.3 dB in PSNR to every 2nd, 3rd, 4th or 5th step, equally many. Compare a schedule that comes of it in whole runs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.ir import Block
from tokencache_compile.learn.calibration import GuidedCall, OnIndex, check_run
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.passes.cache_ops import add_forecast, forecast_weights
from tokencache_compile.plan import CacheConfig, resolve_plan
from tokencache_compile.sampling import Conditions
from tokencache_compile.schedule import is_ints

Parts = tuple[tuple[int, float], ...]  # the steps a forecast is made from, newest first, each with its weight


def _parts(step: int, newest: int, gap: int, order: int) -> Parts:
    """What a forecast to ``step`` uses of I-steps at ``newest``, ``newest`` − gap, … (gap 0: there is but one)."""
    nodes = [newest - back * gap if back == 0 or gap else -1 for back in range(order + 1)]
    stamps = torch.tensor([[[max(node, -1) for node in nodes]]], dtype=torch.float32)
    weights = [float(weight) for weight in forecast_weights(stamps, torch.tensor(float(step)), order)] or [1.0]
    return tuple((node, weight) for node, weight in zip(nodes, weights, strict=True) if weight)


def interval_errors(
    stack: BlockStack,
    scheduler: Any,
    noise: Tensor,
    conditions: Conditions,
    steps: int,
    last_k: int,
    forecast: int,
    max_gap: int,
    on_step: OnIndex | None = None,
) -> Tensor:
    """Mean squared error of the next sample for every P-step that a schedule with gaps up to ``max_gap`` can have.

    Nothing is recomputed (ratio 1): blocks 0 … L−K−1 only add their forecast, the last K run. About T·G² / 2 partial passes.

    Args:
        stack: of the model, in eval mode, for B rows, or 2B with guidance.
        scheduler: a diffusers scheduler; ``set_timesteps`` is called on it. Trials step copies of it, with the same noise where a
            step draws some.
        noise: [B, C, …], standard normal.
        last_k: K, as in :class:`CacheConfig`.
        forecast: order of the forecast.
        max_gap: G, the largest distance between I-steps.
        on_step: called after every step with its index.

    Returns:
        [T, G+1, G], float64: ``[i, g, d]`` for the P-step ``d`` steps after I-step ``i``, with I-steps ``g`` and ``2 g`` before
        ``i`` as far as the run has them; g = 0 stands for no earlier I-step. Distance 0 is the I-step itself: 0. Infinite where
        there is no such step (i + d ≥ T, i − g < 0).

    Raises:
        ConfigError: a setting is out of range.
        InputError: noise and conditions do not fit the stack.
    """
    if not is_ints((steps, max_gap)) or min(steps, max_gap) < 1:
        raise ConfigError(f"steps={steps!r} and max_gap={max_gap!r} were asked for; both are at least 1.")
    check_run(stack.model, noise, conditions)
    stream = stack.program.known_stream
    plan = resolve_plan(CacheConfig(last_k=last_k, forecast=forecast), stack.num_blocks, stream.tokens, False, stream.batch)
    call = GuidedCall(stack.model, conditions)
    scheduler.set_timesteps(steps, device=noise.device)
    images: Tensor = noise * scheduler.init_noise_sigma
    devices = [noise.device] if noise.device.type == "cuda" else []
    updates: dict[int, Tensor] = {}
    count = len(scheduler.timesteps)
    errors = torch.full((count, max_gap + 1, max_gap), torch.inf, dtype=torch.float64)
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            kwargs = call.kwargs(scheduler.scale_model_input(images, timestep), timestep)
            trials: dict[Parts, Tensor] = {}
            wanted: list[tuple[int, int, Parts]] = []
            for newest in range(max(0, step - max_gap + 1), step):
                for gap in range(min(max_gap, newest) + 1):
                    parts = _parts(step, newest, gap, forecast)
                    wanted.append((newest, gap, parts))
                    if parts not in trials:
                        output = _forecast_pass(stack, kwargs, plan.num_cached, [updates[node] for node, _ in parts], parts)
                        with torch.random.fork_rng(devices):
                            result = copy.deepcopy(scheduler).step(call.guided(output, images), timestep, images)
                        trials[parts] = result.prev_sample
            output, updates[step] = _full_pass(stack, kwargs, plan.num_cached)
            images = scheduler.step(call.guided(output, images), timestep, images).prev_sample
            found = {parts: float((trial.double() - images.double()).square().mean()) for parts, trial in trials.items()}
            errors[step, : min(max_gap, step) + 1, 0] = 0.0
            for newest, gap, parts in wanted:
                errors[newest, gap, step - newest] = found[parts]
            updates.pop(step - 3 * max_gap + 1, None)  # the next step's oldest is step + 1 - (G - 1) - 2 G
            if on_step is not None:
                on_step(step)
    return errors


def _full_pass(stack: BlockStack, kwargs: dict[str, Any], cached: int) -> tuple[Tensor, Tensor]:
    """The model's output, and the sum of the first ``cached`` blocks' updates [rows, N, C]."""
    ends: list[Tensor] = []

    def visit(block: Block, inputs: list[Tensor]) -> Tensor:
        if block.index == 0:
            ends.append(stack.stream_of(block, inputs))
        result = stack.compute(block, inputs)
        if block.index == cached - 1:
            ends.append(result)
        return result

    output = stack.run(kwargs, visit)
    return output, ends[1] - ends[0]


def _forecast_pass(stack: BlockStack, kwargs: dict[str, Any], cached: int, updates: list[Tensor], parts: Parts) -> Tensor:
    """The model's output with the forecast in place of the first ``cached`` blocks."""

    def visit(block: Block, inputs: list[Tensor]) -> Tensor:
        if block.index >= cached:
            return stack.compute(block, inputs)
        stream = stack.stream_of(block, inputs)
        if block.index < cached - 1:
            return stream
        return add_forecast(stream, updates, [torch.tensor(weight, device=stream.device) for _, weight in parts])

    return stack.run(kwargs, visit)
