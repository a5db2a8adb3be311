"""Modules cached apart: whole runs against the eager model with its attentions' and feed-forwards' ``forward`` replaced, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES
from plain_loop import choose, forecast_update, put, take
from plain_run import assert_close, drawn_scores, make_predictor, replaced_run
from tiny import LAYERS, TOKENS, Model, build, call_of, conditions, ddim, inputs, sample
from torch import Tensor

import tokencache_compile
from tokencache_compile import CacheConfig, ConfigError, Schedule, UnsupportedModelError
from tokencache_compile.passes.pipeline import build_steps

STEPS, EVERY = 12, 3
Forward = Callable[..., Tensor]


class Remembered:
    """The ``forward`` of one module: as it is on I-steps; on P-steps a forecast of its outputs, kept tokens fresh."""

    def __init__(self, forward: Forward, order: int, attends: bool) -> None:
        self.forward, self.order, self.attends = forward, order, attends
        self.values: list[Tensor] = []
        self.steps: list[int] = []

    def __call__(self, step: int, index: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if step % EVERY == 0:
            value = self.forward(x, *args, **kwargs)
            self.values, self.steps = [value, *self.values][: self.order + 1], [step, *self.steps][: self.order + 1]
            return value
        stamps = torch.tensor(self.steps, dtype=torch.float32).expand(*x.shape[:2], -1)
        value = forecast_update(self.values, stamps, step)
        if index is None or self.attends:
            return value
        return put(value, index, self.forward(take(x, index), *args, **kwargs))


def plain_run(model: Model, kind: str, order: int, kept: int, cached: int) -> list[Tensor]:
    """DDIM on the eager model, the first ``cached`` blocks with remembered modules."""
    modules = [
        (number, module, Remembered(module.forward, order, name == "attn1"))
        for number, block in enumerate(model.transformer_blocks[:cached])
        for name, module in (("attn1", block.attn1), ("attn2", block.attn2), ("ff", block.ff))
        if module is not None
    ]

    def before(step: int, x: Tensor) -> None:
        scores = drawn_scores(step, cached)
        for number, module, remembered in modules:
            index = choose(scores[number].expand(len(x), -1), kept, "sample") if kept else None
            module.forward = partial(remembered, step, index)

    return replaced_run(model, kind, STEPS, [module for _, module, _ in modules], before)


@pytest.mark.parametrize(
    ("kind", "order", "ratio", "last_k", "backend"),
    [
        ("dit", 0, 1.0, 0, "eager"),
        ("dit", 1, 0.9, 1, "eager"),
        ("dit", 2, 0.75, 0, "eager"),
        ("pixart", 0, 0.9, 0, "eager"),
        ("pixart", 1, 1.0, 1, "eager"),
        ("pixart_masked", 2, 0.75, 0, "eager"),
        ("pixart", 2, 0.75, 1, "inductor"),  # a graph break would be an error
    ],
)
def test_whole_runs(kind: str, order: int, ratio: float, last_k: int, backend: str) -> None:
    model = build(kind)
    expected = plain_run(model, kind, order, int((1 - ratio) * TOKENS + 0.5), LAYERS - last_k)
    config = CacheConfig(ratio=ratio, last_k=last_k, forecast=order, granularity="module", schedule=Schedule(every=EVERY))
    dispatcher = tokencache_compile.transform(model, config=config, backend=backend)
    got = ddim(call_of(dispatcher, conditions(kind)), sample(), STEPS)
    assert_close(got, expected)
    config = CacheConfig(ratio=ratio, last_k=last_k, forecast=order, schedule=Schedule(EVERY))
    by_block = tokencache_compile.transform(model, config=config, backend="eager")
    other = ddim(call_of(by_block, conditions(kind)), sample(), STEPS)
    assert float((got[-1] - other[-1]).norm() / other[-1].norm()) > 1e-3, "the block's update whole is something else"


def test_wan() -> None:
    """Its attentions cast what they return to their query's dtype, and are no part of what makes the query."""
    model, given = FAMILIES["WanTransformer3DModel"].build()
    config = CacheConfig(ratio=1.0, forecast=1, granularity="module", schedule=Schedule(EVERY))
    dispatcher = tokencache_compile.transform(model, config=config, backend="eager")
    draw = torch.Generator().manual_seed(0)
    noises = [torch.randn(given["hidden_states"].shape, generator=draw) for _ in range(7)]

    def outputs(net: Model, before: Callable[[int], None]) -> list[Tensor]:
        found = []
        for step, noise in enumerate(noises):
            before(step)
            call = given | {"hidden_states": noise, "timestep": torch.full_like(given["timestep"], 900 - 100 * step)}
            with torch.no_grad():
                found.append(net(**call, return_dict=False)[0])
        return found

    got = outputs(dispatcher, lambda step: None)
    modules = [(part, Remembered(part.forward, 1, False)) for block in model.blocks for part in (block.attn1, block.attn2, block.ffn)]

    def before(step: int) -> None:
        for part, remembered in modules:
            part.forward = partial(remembered, step, None)

    assert_close(got, outputs(model, before))
    assert (dispatcher.summary().full_steps, dispatcher.summary().cached_steps) == (3, 4)


def test_every_token_kept_is_the_model_but_for_attention() -> None:
    """n_l = N: with the attention just computed (an I-step before, the same input) the P-step is the model."""
    given = inputs("dit")
    steps = build_steps(build("dit"), given, CacheConfig(granularity="module", keep=((TOKENS,) * LAYERS,), forecast=0), None)
    device = torch.device("cpu")
    with torch.no_grad():
        _, *caches = steps.full.module(*given.values(), *steps.step_inputs(0, device), *steps.initial_caches(device))
        full = steps.full.module(*given.values(), *steps.step_inputs(1, device), *caches)[0]
        cached = steps.cached[0].module(*given.values(), *steps.step_inputs(1, device), *caches)[0]
    torch.testing.assert_close(cached, full, atol=1e-5, rtol=1e-5)


def test_macs_and_memory() -> None:
    """With nothing recomputed a block costs the conditioning's linears alone; caches are as many as modules and orders."""
    model, given = build("dit"), inputs("dit")
    steps = build_steps(model, given, CacheConfig(granularity="module", ratio=1.0, forecast=1), None)
    names = [spec.name for spec in steps.full.caches]
    assert names == ["stamps", *(f"module_{block:02d}_{part}_{age}" for block in range(LAYERS) for part in (0, 1) for age in (0, 1))]
    (code,) = [m.graph_module.code for n, m in steps.cached[0].module.named_children() if "gated" in n]
    assert "scaled_dot_product_attention" not in code and "p_ff" not in code.split("):", 1)[1]
    assert steps.macs_cached[0] < 0.12 * steps.macs_full


def test_a_predictor_chooses_the_kept_rows() -> None:
    model = build("dit")
    config = CacheConfig(granularity="module", ratio=0.5, scorer="predictor", selection="pair", schedule=Schedule(EVERY))
    dispatcher = tokencache_compile.transform(model, config=config, predictor=make_predictor(model), backend="eager")
    got = ddim(call_of(dispatcher, conditions("dit")), sample(), STEPS)
    config = CacheConfig(granularity="module", ratio=0.5, schedule=Schedule(EVERY))
    random = tokencache_compile.transform(model, config=config, backend="eager")
    assert not torch.allclose(got[-1], ddim(call_of(random, conditions("dit")), sample(), STEPS)[-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(granularity="layer"), "granularity is one of 'block', 'module'"),
        (dict(granularity="module", context="kept"), 'needs context="reuse"'),
        (dict(granularity="module", history="computed"), "needs forecast=0 and none"),
        (dict(granularity="module", scorer="attention"), 'goes with granularity="module" and history="computed"'),
        (dict(granularity="module", scorer="change"), "keeps no updates"),
    ],
)
def test_refused_settings(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**settings)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_blocks_of_several_streams_are_refused(name: str) -> None:
    model, given = FAMILIES[name].build()
    with pytest.raises(UnsupportedModelError, match=r'granularity="module".*Use granularity="block"'):
        build_steps(model, given, CacheConfig(granularity="module"), None)
