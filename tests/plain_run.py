"""Whole sampling runs of the plain loop, and from which noise they tell right from wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plain_loop import PlainLoop
from tiny import LAYERS, TOKENS, Model, conditions, ddim, sample
from torch import Tensor, nn

from tokencache_compile import CacheConfig, CachePredictor

SAFE_MARGIN = 1e-5  # relative; rounding moves a score by about 1e-6


def replaced_run(model: Model, kind: str, steps: int, modules: Sequence[nn.Module], before: Callable[[int, Tensor], None]) -> list[Tensor]:
    """DDIM on the eager model; ``before`` every step, given its number and sample, may replace the ``modules``' forward."""
    own, given = [module.forward for module in modules], conditions(kind)

    def call(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        before(step, x)
        with torch.no_grad():
            output: Tensor = model(x, timestep=timesteps, **given, return_dict=False)[0]
        return output

    try:
        return ddim(call, sample(), steps)
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.forward = forward


def drawn_scores(step: int, cached: int, tokens: int = TOKENS) -> Tensor:
    """What the scorer "random" draws for a step: one set for the whole batch."""
    return torch.rand(cached, tokens, generator=torch.Generator().manual_seed(step))


def first_block_call(model: Model, **given: Any) -> tuple[Any, Any]:
    """What the eager model hands to its first block."""
    calls: list[tuple[Any, Any]] = []
    handle = model.transformer_blocks[0].register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        model(**given, return_dict=False)
    handle.remove()
    return calls[0]


def margin(scores: Sequence[Tensor], keep: Sequence[int], selection: str) -> float:
    """By how much (relatively) the last kept token beats the first one left out, at its smallest."""
    smallest = float("inf")
    for block, count in zip(scores, keep, strict=True):
        means = {"sample": block, "batch": block.mean(0, keepdim=True), "pair": block.unflatten(0, (2, -1)).mean(0)}[selection]
        best = means.sort(dim=1, descending=True).values
        if 0 < count < TOKENS:
            smallest = min(smallest, float(((best[:, count - 1] - best[:, count]) / best[:, count - 1].abs()).min()))
    return smallest


def reference_run(
    model: Model,
    kind: str,
    config: CacheConfig,
    profiles: Sequence[Sequence[int]],
    predictor: CachePredictor | None,
    seed: int,
    steps: int,
    refined: Model = None,
) -> tuple[list[Tensor], float]:
    """A plain run, its P-steps on the ``refined`` model if there is one, and the smallest margin of its selections."""
    external = config.scorer in ("random", "predictor")
    loop = PlainLoop(
        model,
        profiles[0],
        LAYERS - len(profiles[0]),
        config.context,
        config.forecast,
        "external" if external else config.scorer,
        config.selection,
        config.history,
    )
    given, smallest = conditions(kind), float("inf")

    def call(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        nonlocal smallest
        given_now = {"hidden_states": x, "timestep": timesteps, **given}
        scores = None
        if config.scorer == "random":
            scores = drawn_scores(step, len(profiles[0])).expand(x.shape[0], -1, -1)
        elif predictor is not None:
            args, kwargs = first_block_call(model, **given_now)
            with torch.no_grad():
                scores = predictor(*args, **kwargs)[:, : len(profiles[0])]
        loop.keep = list(profiles[config.groups[min(step, len(config.groups) - 1)] if config.groups else 0])
        every, listed = (4, None) if config.schedule is None else (config.schedule.every, config.schedule.full)
        full = (listed is None and step % every == 0) or step in (listed or ())
        loop.model = model if full or refined is None else refined
        if not full:
            seen = [state.score for state in loop.state] if scores is None else list(scores.unbind(1))
            smallest = min(smallest, margin(seen, loop.keep, config.selection))
        return loop.step(step, full, None if full else scores, **given_now)

    return ddim(call, sample(seed=seed), steps), smallest


def assert_close(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert bool(a.isfinite().all()), f"step {step}"
        error, scale = float((a - b).abs().max()), max(1.0, float(b.abs().max()))
        assert error <= tolerance * scale, f"step {step}: off by {error:.1e}, largest value {scale:.1f}"


def safe_run(
    model: Model,
    kind: str,
    config: CacheConfig,
    profiles: Sequence[Sequence[int]],
    predictor: CachePredictor | None = None,
    steps: int = 20,
    refined: Model = None,
) -> tuple[int, list[Tensor]]:
    """The first noise from which no selection hangs on rounding, and the plain run from there."""
    for seed in range(20):
        outputs, smallest = reference_run(model, kind, config, profiles, predictor, seed, steps, refined)
        if smallest > SAFE_MARGIN:
            return seed, outputs
    pytest.fail("every noise made a selection that hangs on rounding")


def make_predictor(model: Model) -> CachePredictor:
    """A predictor whose block and head are its own, so that nothing but them can give its scores."""
    torch.manual_seed(5)
    predictor = CachePredictor(model.transformer_blocks[0], model.config.num_attention_heads * model.config.attention_head_dim, LAYERS)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.15)
    return predictor.eval()
