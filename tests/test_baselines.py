"""Published methods as settings: whole runs against the eager model with the methods' own loops around its blocks and modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from plain_run import assert_close, replaced_run
from tiny import LAYERS, TOKENS, Model, build, call_of, conditions, ddim, sample
from torch import Tensor

import tokencache_compile
from tokencache_compile import CacheConfig, ConfigError, baselines

STEPS = 12
Decide = Callable[[int, int, str], bool]  # (step, block, module or "block") -> is it computed


def held_run(model: Model, kind: str, parts: tuple[str, ...], computed: Decide) -> list[Tensor]:
    """DDIM where each of the ``parts`` of every block ("block" is all of it: its update) gives its last value unless it is computed.

    A held value is the one of the last step on which all of them were computed: the methods here only ever refresh on full steps.
    """
    memory: dict[tuple[int, str], Tensor] = {}
    modules = {
        (number, part): block if part == "block" else getattr(block, part)
        for number, block in enumerate(model.transformer_blocks)
        for part in parts
    }
    own = {key: module.forward for key, module in modules.items()}

    def held_or_computed(step: int, key: tuple[int, str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not computed(step, *key):
            return x + memory[key] if key[1] == "block" else memory[key]
        value: Tensor = own[key](x, *args, **kwargs)
        if all(computed(step, *one) for one in modules):
            memory[key] = value - x if key[1] == "block" else value
        return value

    def before(step: int, _: Tensor) -> None:
        for key, module in modules.items():
            module.forward = partial(held_or_computed, step, key)

    return replaced_run(model, kind, STEPS, list(modules.values()), before)


def fora_is_full(step: int, interval: int) -> bool:
    """FORA's loop: i counts down from T − 1."""
    i = STEPS - 1 - step
    return i == STEPS - 1 or i % interval == 0


ROUTER = torch.randn(STEPS // 2, LAYERS, 2, generator=torch.Generator().manual_seed(3)) * 4


CASES: dict[str, tuple[str, CacheConfig, tuple[str, ...], Decide]] = {
    "fora": ("dit", baselines.fora(STEPS, 5), ("attn1", "ff"), lambda s, b, p: fora_is_full(s, 5)),
    "fora, pixart": ("pixart", baselines.fora(STEPS, 3), ("attn1", "attn2", "ff"), lambda s, b, p: fora_is_full(s, 3)),
    "deepcache": (
        "dit", baselines.deepcache(LAYERS, TOKENS, 3, 1), ("block",), lambda s, b, p: s % 3 == 0 or b in (0, LAYERS - 1),
    ),
    "delta_dit": (
        "pixart", baselines.delta_dit(LAYERS, TOKENS, 2, 6, 2), ("block",),
        lambda s, b, p: s % 2 == 0 or (b < LAYERS - 2 if s < 6 else b >= 2),
    ),
    "tgate": ("pixart", baselines.tgate(STEPS, LAYERS, 4), ("attn1", "attn2", "ff"), lambda s, b, p: s < 4 or p != "attn2"),
    "learning_to_cache": (
        "dit", baselines.learning_to_cache(ROUTER), ("attn1", "ff"),
        lambda s, b, p: s % 2 == 0 or bool(ROUTER[s // 2, b, ("attn1", "ff").index(p)].sigmoid() > 0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_published_loop(name: str) -> None:
    kind, config, parts, computed = CASES[name]
    model = build(kind)
    expected = held_run(model, kind, parts, computed)
    dispatcher = tokencache_compile.transform(model, config=config, backend="eager")
    got = ddim(call_of(dispatcher, conditions(kind)), sample(), STEPS)
    assert_close(got, expected)
    plain = ddim(call_of(model, conditions(kind)), sample(), STEPS)
    assert float((got[-1] - plain[-1]).norm() / plain[-1].norm()) > 1e-4, "nothing was cached"
    summary = dispatcher.summary()
    assert summary.full_steps == sum(config.schedule.is_full(step) for step in range(STEPS)) and summary.macs < summary.macs_uncached


@pytest.mark.parametrize("name", ["delta_dit", "learning_to_cache"])
def test_compiled_without_a_graph_break(name: str) -> None:
    kind, config, _, _ = CASES[name]
    model = build(kind)
    runs = [tokencache_compile.transform(model, config=config, backend=backend) for backend in ("eager", "inductor")]
    eager, compiled = (ddim(call_of(run, conditions(kind)), sample(), 4) for run in runs)
    assert_close(compiled, eager, 1e-4)


def test_taylorseer_is_the_module_forecast() -> None:
    config = baselines.taylorseer(every=3, order=2)
    assert (config.granularity, config.forecast, config.ratio, config.schedule.every) == ("module", 2, 1.0, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: baselines.deepcache(4, 16, outer=2), "at least one must be left in the middle"),
        (lambda: baselines.delta_dit(4, 16, span=4, gate=2), "1 to 3 of 4 blocks"),
        (lambda: baselines.tgate(10, 4, gate=10), "at least one must come before"),
        (lambda: CacheConfig(granularity="module", fresh=((True,),)), "fresh=.*tuple of profiles"),  # type: ignore[arg-type]
        (lambda: CacheConfig(fresh=(((True,),),)), 'goes with granularity="module"'),
    ],
)
def test_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("fresh", "message"),
    [((((True, False),),), f"{LAYERS} entries are needed"), ((((True,),) * LAYERS,), "has 2 modules: ")],
)
def test_fresh_that_does_not_fit_the_model(fresh: Any, message: str) -> None:
    dispatcher = tokencache_compile.transform(build("dit"), config=CacheConfig(granularity="module", fresh=fresh), backend="eager")
    with pytest.raises(ConfigError, match=message):
        ddim(call_of(dispatcher, conditions("dit")), sample(), 1)
