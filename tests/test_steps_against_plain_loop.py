"""The compiled steps against plain eager loops: whole sampling runs, in which every output makes the next input.

Tolerance: 1e-5 of the output's largest value where that is above 1, else 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plain_loop import PlainLoop
from tiny import LAST_K, LAYERS, TOKENS, Model, build, call_of, conditions, ddim, sample
from torch import Tensor, nn

import tokencache_compile
from tokencache_compile import CacheConfig, CachePredictor, Schedule, StepReport

STEPS, EVERY = 20, 4
SAFE_MARGIN = 1e-5  # relative; rounding moves a score by about 1e-6


def drawn_scores(step: int, cached: int) -> Tensor:
    """What the scorer "random" draws for a step: one set for the whole batch."""
    return torch.rand(cached, TOKENS, generator=torch.Generator().manual_seed(step))


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
    model: Model, kind: str, config: CacheConfig, profiles: Sequence[Sequence[int]], predictor: CachePredictor | None, seed: int
) -> tuple[list[Tensor], float]:
    """A plain run, and the smallest margin of its selections."""
    external = config.scorer in ("random", "predictor")
    loop = PlainLoop(
        model, profiles[0], config.last_k, config.context, config.forecast, "external" if external else config.scorer, config.selection
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
        full = config.schedule.full is None and step % config.schedule.every == 0 or step in (config.schedule.full or ())
        if not full:
            seen = [state.score for state in loop.state] if scores is None else list(scores.unbind(1))
            smallest = min(smallest, margin(seen, loop.keep, config.selection))
        return loop.step(step, full, None if full else scores, **given_now)

    return ddim(call, sample(seed=seed), STEPS), smallest


def assert_close(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert bool(a.isfinite().all()), f"step {step}"
        error, scale = float((a - b).abs().max()), max(1.0, float(b.abs().max()))
        assert error <= tolerance * scale, f"step {step}: off by {error:.1e}, largest value {scale:.1f}"


def compare(kind: str, config: CacheConfig, predictor: CachePredictor | None = None, model: Model = None) -> None:
    """The whole run of the transformed model and the plain one, from noise on which no selection hangs on rounding."""
    model = model or build(kind)
    kept = int((1 - config.ratio) * TOKENS + 0.5)
    profiles = config.keep or ((kept,) * (LAYERS - config.last_k),)
    for seed in range(20):
        expected, smallest = reference_run(model, kind, config, profiles, predictor, seed)
        if smallest > SAFE_MARGIN:
            break
    else:
        pytest.fail("every noise made a selection that hangs on rounding")
    dispatcher = tokencache_compile.transform(model, config=config, predictor=predictor, backend="eager")
    reports: list[StepReport] = []
    dispatcher.step_callback = reports.append
    got = ddim(call_of(dispatcher, conditions(kind)), sample(seed=seed), STEPS)
    assert dispatcher.plan.profiles == tuple(profiles)
    assert [r.step for r in reports] == list(range(STEPS)) and "P" in {r.kind for r in reports}
    assert_close(got, expected)
    plain = ddim(call_of(model, conditions(kind)), sample(seed=seed), STEPS)
    assert float((got[-1] - plain[-1]).norm() / plain[-1].norm()) > 0.01, "caching changed nothing: the test would pass on anything"


def settings(**changes: Any) -> CacheConfig:
    return CacheConfig(**{"ratio": 0.9, "last_k": LAST_K, "schedule": Schedule(every=EVERY)} | changes)


@pytest.mark.parametrize("forecast", [0, 1, 2])
@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
def test_dit(context: Any, forecast: int) -> None:
    compare("dit", settings(context=context, forecast=forecast, scorer="change"))


@pytest.mark.parametrize(("scorer", "forecast"), [("norm", 1), ("random", 2), ("random", 0)])
@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
def test_dit_scorers(context: Any, scorer: Any, forecast: int) -> None:
    compare("dit", settings(context=context, forecast=forecast, scorer=scorer))


@pytest.mark.parametrize("scorer", ["change", "norm", "random"])
@pytest.mark.parametrize("selection", ["pair", "batch"])
def test_dit_selections(selection: Any, scorer: Any) -> None:
    compare("dit", settings(context="cached", forecast=1, scorer=scorer, selection=selection))


@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
@pytest.mark.parametrize("kind", ["pixart", "pixart_masked"])
def test_pixart(kind: str, context: Any) -> None:
    compare(kind, settings(context=context, forecast=2, scorer="change"))


@pytest.mark.parametrize(
    ("kind", "context", "forecast", "scorer", "selection"),
    [
        ("pixart", "full", 0, "norm", "pair"),
        ("pixart", "cached", 1, "random", "sample"),
        ("pixart", "kept", 1, "change", "batch"),
        ("pixart_masked", "full", 1, "norm", "batch"),
        ("pixart_masked", "cached", 0, "change", "pair"),
        ("pixart_masked", "reuse", 0, "random", "batch"),
    ],
)
def test_pixart_settings(kind: str, context: Any, forecast: int, scorer: Any, selection: Any) -> None:
    compare(kind, settings(context=context, forecast=forecast, scorer=scorer, selection=selection))


@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
def test_blocks_that_keep_different_counts(context: Any) -> None:
    """Some, none and all of the tokens, in one graph."""
    compare("dit", settings(context=context, keep=((5, 0, TOKENS),)))


def test_keep_profiles_by_step() -> None:
    """Several P-graphs over the same caches, one named for each step; block 1 is skipped in one of them only."""
    profiles, groups = ((2, 0, 4), (7, 3, 1)), (0, 0, 0, 1, 0, 1, 1, 0, 0, 1)
    compare("dit", settings(keep=profiles, groups=groups))


def test_listed_full_steps() -> None:
    compare("dit", settings(schedule=Schedule(full=(0, 2, 3, 9, 12, 19))))


@pytest.mark.parametrize("last_k", [0, 3])
def test_last_k(last_k: int) -> None:
    """The number of blocks that are never cached, at both ends."""
    compare("dit", settings(last_k=last_k))


def make_predictor(model: Model) -> CachePredictor:
    """A predictor whose block and head are its own, so that nothing but them can give its scores."""
    torch.manual_seed(5)
    predictor = CachePredictor(model.transformer_blocks[0], model.config.num_attention_heads * model.config.attention_head_dim, LAYERS)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.15)
    return predictor.eval()


@pytest.mark.parametrize(
    ("kind", "context", "forecast", "selection"),
    [
        ("dit", "kept", 0, "sample"),
        ("dit", "full", 2, "sample"),
        ("dit", "cached", 1, "pair"),
        ("dit", "reuse", 2, "batch"),
        ("pixart", "full", 2, "sample"),
        ("pixart_masked", "cached", 1, "sample"),
    ],
)
def test_predictor(kind: str, context: Any, forecast: int, selection: Any) -> None:
    """The scores of a P-step are those of the eager predictor on exactly what block 1 is given."""
    model = build(kind)
    config = settings(context=context, forecast=forecast, scorer="predictor", selection=selection)
    compare(kind, config, make_predictor(model), model)
