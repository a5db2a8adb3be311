"""The compiled steps against plain eager loops: whole sampling runs, in which every output makes the next input.

Tolerance: 1e-5 of the output's largest value where that is above 1, else 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
from plain_run import assert_close, make_predictor, safe_run
from tiny import LAST_K, LAYERS, TOKENS, Model, build, call_of, conditions, ddim, sample

import tokencache_compile
from tokencache_compile import CacheConfig, CachePredictor, Schedule, StepReport

STEPS, EVERY = 20, 4


def compare(kind: str, config: CacheConfig, predictor: CachePredictor | None = None, model: Model = None) -> None:
    """The whole run of the transformed model and the plain one, from noise on which no selection hangs on rounding."""
    model = model or build(kind)
    kept = int((1 - config.ratio) * TOKENS + 0.5)
    profiles = config.keep or ((kept,) * (LAYERS - config.last_k),)
    seed, expected = safe_run(model, kind, config, profiles, predictor, STEPS)
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
    defaults: dict[str, Any] = {"ratio": 0.9, "last_k": LAST_K, "context": "cached", "scorer": "change", "schedule": Schedule(every=EVERY)}
    return CacheConfig(**defaults | changes)


@pytest.mark.parametrize("history", ["full_steps", "computed"])
@pytest.mark.parametrize("forecast", [0, 1, 2])
@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
def test_dit(context: Any, forecast: int, history: Any) -> None:
    compare("dit", settings(context=context, forecast=forecast, history=history))


@pytest.mark.parametrize(
    ("scorer", "forecast", "history"), [("norm", 1, "computed"), ("random", 2, "full_steps"), ("random", 0, "computed")]
)
@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
def test_dit_scorers(context: Any, scorer: Any, forecast: int, history: Any) -> None:
    compare("dit", settings(context=context, forecast=forecast, scorer=scorer, history=history))


@pytest.mark.parametrize("scorer", ["change", "norm", "random"])
@pytest.mark.parametrize("selection", ["pair", "batch"])
def test_dit_selections(selection: Any, scorer: Any) -> None:
    compare("dit", settings(context="cached", forecast=1, scorer=scorer, selection=selection, history="computed"))


@pytest.mark.parametrize("history", ["full_steps", "computed"])
@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
@pytest.mark.parametrize("kind", ["pixart", "pixart_masked"])
def test_pixart(kind: str, context: Any, history: Any) -> None:
    compare(kind, settings(context=context, forecast=2, history=history))


@pytest.mark.parametrize(
    ("kind", "context", "forecast", "scorer", "selection", "history"),
    [
        ("pixart", "full", 0, "norm", "pair", "computed"),
        ("pixart", "cached", 1, "random", "sample", "full_steps"),
        ("pixart", "kept", 1, "change", "batch", "computed"),
        ("pixart_masked", "full", 1, "norm", "batch", "computed"),
        ("pixart_masked", "cached", 0, "change", "pair", "full_steps"),
        ("pixart_masked", "reuse", 0, "random", "batch", "computed"),
        ("pixart_added", "cached", 2, "change", "sample", "computed"),
    ],
)
def test_pixart_settings(kind: str, context: Any, forecast: int, scorer: Any, selection: Any, history: Any) -> None:
    compare(kind, settings(context=context, forecast=forecast, scorer=scorer, selection=selection, history=history))


@pytest.mark.parametrize("kind", ["dit", "pixart_masked"])
def test_the_defaults(kind: str) -> None:
    compare(kind, CacheConfig())


@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
def test_blocks_that_keep_different_counts(context: Any) -> None:
    """Some, none and all of the tokens, in one graph."""
    compare("dit", settings(context=context, keep=((5, 0, TOKENS),), history="computed"))


@pytest.mark.parametrize("history", ["full_steps", "computed"])
def test_keep_profiles_by_step(history: Any) -> None:
    """Several P-graphs over the same caches, one named for each step; block 1 is skipped in one of them only."""
    profiles, groups = ((2, 0, 4), (7, 3, 1)), (0, 0, 0, 1, 0, 1, 1, 0, 0, 1)
    compare("dit", settings(keep=profiles, groups=groups, history=history))


@pytest.mark.parametrize("history", ["full_steps", "computed"])
def test_listed_full_steps(history: Any) -> None:
    compare("dit", settings(schedule=Schedule(full=(0, 2, 3, 9, 12, 19)), history=history))


@pytest.mark.parametrize("last_k", [0, 3])
def test_last_k(last_k: int) -> None:
    """The number of blocks that are never cached, at both ends."""
    compare("dit", settings(last_k=last_k))


@pytest.mark.parametrize(
    ("kind", "context", "forecast", "selection", "history"),
    [
        ("dit", "kept", 0, "sample", "computed"),
        ("dit", "full", 2, "sample", "full_steps"),
        ("dit", "cached", 1, "pair", "computed"),
        ("dit", "reuse", 2, "batch", "full_steps"),
        ("pixart", "full", 2, "sample", "computed"),
        ("pixart_masked", "cached", 1, "sample", "full_steps"),
    ],
)
def test_predictor(kind: str, context: Any, forecast: int, selection: Any, history: Any) -> None:
    """The scores of a P-step are those of the eager predictor on exactly what block 1 is given."""
    model = build(kind)
    config = settings(context=context, forecast=forecast, scorer="predictor", selection=selection, history=history)
    compare(kind, config, make_predictor(model), model)
