"""ToCa as a policy: whole runs against the eager model with the published loop around its attentions and feed-forwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from plain_run import assert_close, replaced_run
from tiny import LAYERS, ROWS, TOKENS, Model, build, call_of, conditions, ddim, sample
from torch import Tensor

import tokencache_compile
from tokencache_compile import CacheConfig, ConfigError, Schedule, UnsupportedModelError, baselines
from tokencache_compile.passes.pipeline import build_steps

STEPS, SIDE = 16, 4


@dataclass(frozen=True)
class Published:
    """The published settings: N0, and the weights of step and layer in how many tokens are computed."""

    first_interval: int
    step_weight: float
    layer_weight: float

    def is_full(self, i: int, steps: int) -> bool:
        sensitive = i in range(int(steps * 0.2), int(steps * 0.4))
        threshold = 2 if sensitive else round(self.first_interval / (1 + 0.4 - 2 * 0.4 * i / steps))
        return i == steps - 1 or i % threshold == 0

    def count(self, i: int, steps: int, layer: int, layers: int, tokens: int) -> int:
        step_factor = 1 + self.step_weight - 2 * self.step_weight * i / steps
        layer_factor = 1 + self.layer_weight - 2 * self.layer_weight * layer / (layers - 1)
        return int(min(max(0.07 * layer_factor * step_factor * 2.5, 0), 1) * tokens)


DDIM, DDPM = Published(3, 2.0, -0.2), Published(4, 0.4, 0.8)


def with_bonus(score: Tensor) -> Tensor:
    """The largest score [B, N] of every 2×2 cell, times 1.6."""
    raised = score.clone()
    for row in range(len(score)):
        for top in range(0, SIDE, 2):
            for left in range(0, SIDE, 2):
                cell = [(top + i) * SIDE + left + j for i in (0, 1) for j in (0, 1)]
                best = max(cell, key=lambda token: float(score[row, token]))
                raised[row, best] *= 1.6
    return raised


class PublishedBlock:
    """One block's caches: attention output, feed-forward output, attention received, age of every token."""

    def __init__(self, block: Any, number: int) -> None:
        self.block, self.number = block, number
        self.held, self.fed = torch.empty(0), torch.empty(0)
        self.attend, self.feed = block.attn1.forward, block.ff.forward

    def attention(self, i: int, full: bool, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if full:
            self.held = self.attend(hidden, *args, **kwargs)
            attn = self.block.attn1
            query, key = (linear(hidden).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k))
            weights = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1).mean(1)
            self.received = weights.sum(1) / weights.sum(1).norm(dim=1, keepdim=True)
        return self.held

    def feed_forward(self, i: int, full: bool, hidden: Tensor) -> Tensor:
        if full:
            self.fed, self.age = self.feed(hidden), torch.zeros(ROWS, TOKENS)
            return self.fed
        score = with_bonus(self.received + 0.25 * self.age / 3)
        index = score.argsort(dim=1, descending=True)[:, : DDIM.count(i, STEPS, self.number, LAYERS, TOKENS)]
        self.age = (self.age + 1).scatter(1, index, 0.0)
        self.fed = self.fed.clone()
        for row in range(ROWS):
            self.fed[row, index[row]] = self.feed(hidden[row : row + 1, index[row]])[0]
        return self.fed


def published_run(model: Model, kind: str) -> tuple[list[Tensor], int]:
    """The published loop, and how many of its steps were full."""
    blocks = [PublishedBlock(block, number) for number, block in enumerate(model.transformer_blocks)]
    counted = 0

    def before(step: int, _: Tensor) -> None:
        nonlocal counted
        i = STEPS - 1 - step
        full = DDIM.is_full(i, STEPS)
        counted += full
        for own in blocks:
            own.block.attn1.forward, own.block.ff.forward = partial(own.attention, i, full), partial(own.feed_forward, i, full)

    modules = [module for own in blocks for module in (own.block.attn1, own.block.ff)]
    return replaced_run(model, kind, STEPS, modules, before), counted


def test_the_published_loop() -> None:
    model = build("dit")
    expected, full = published_run(model, "dit")
    config = baselines.toca(STEPS, LAYERS, TOKENS)
    dispatcher = tokencache_compile.transform(model, config=config, backend="eager")
    got = ddim(call_of(dispatcher, conditions("dit")), sample(), STEPS)
    assert_close(got, expected)
    summary = dispatcher.summary()
    assert 0 < summary.full_steps == full < STEPS and summary.macs < summary.macs_uncached
    assert config.keep is not None and len({count for keep in config.keep for count in keep}) > 4
    plain = ddim(call_of(model, conditions("dit")), sample(), STEPS)
    assert float((got[-1] - plain[-1]).norm() / plain[-1].norm()) > 1e-3, "nothing was cached"


def test_compiled_without_a_graph_break() -> None:
    model = build("dit")
    config = replace(baselines.toca(STEPS, LAYERS, TOKENS), keep=((5,) * LAYERS,), groups=(), schedule=Schedule(4))
    runs = [tokencache_compile.transform(model, config=config, backend=backend) for backend in ("eager", "inductor")]
    eager, compiled = (ddim(call_of(run, conditions("dit")), sample(), 4) for run in runs)
    assert_close(compiled, eager, 1e-4)


@pytest.mark.parametrize(("settings", "steps"), [(DDIM, 50), (DDPM, 250)])
def test_the_published_settings_of_dit_xl(settings: Published, steps: int) -> None:
    config = baselines.toca(steps, 28, 256)
    assert config.keep is not None and config.schedule.every == settings.first_interval
    for k in range(steps):
        i = steps - 1 - k
        assert config.schedule.is_full(k) == settings.is_full(i, steps)
        if not config.schedule.is_full(k):
            assert config.keep[config.groups[k]] == tuple(settings.count(i, steps, layer, 28, 256) for layer in range(28))


def test_models_without_one_plain_attention_on_a_square_are_refused() -> None:
    config = CacheConfig(forecast=0, history="computed", scorer="attention", granularity="module")
    draw = torch.Generator().manual_seed(0)
    masked = dict(conditions("pixart_masked"), hidden_states=sample(), timestep=torch.full((ROWS,), 500))
    with pytest.raises(UnsupportedModelError, match="one self-attention without a mask"):
        build_steps(build("pixart_masked"), masked, config, None)
    odd = dict(conditions("dit"), hidden_states=torch.randn(ROWS, 4, 6, 6, generator=draw), timestep=torch.full((ROWS,), 500))
    with pytest.raises(UnsupportedModelError, match="cells of 2 × 2 tokens, and its 9 tokens lie on a grid of 3 × 3"):
        build_steps(build("dit", sample_size=6), odd, config, None)
    with pytest.raises(ConfigError, match="every one of 2 steps is full"):
        baselines.toca(2, LAYERS, TOKENS)
