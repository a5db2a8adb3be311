"""Three of the design's five invariants; the graph count is in ``test_compile``, the other backends' images elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    LAST_K,
    LAYERS,
    ROWS,
    TOKENS,
    Model,
    build,
    call_of,
    conditions,
    ddim,
    inputs,
    parameters_unchanged,
    run,
    same_bits,
    sample,
    transformed,
)
from torch import Tensor

from tokencache_compile import Schedule
from tokencache_compile.ir import StepProgram
from tokencache_compile.macs import MacCounter
from tokencache_compile.passes.pipeline import StepPrograms
from tokencache_compile.passes.step_graph import extra_inputs

CACHED = LAYERS - LAST_K
CONTEXTS = ("kept", "full", "cached", "reuse")
DTYPES = (torch.float32, torch.bfloat16)
ALL_KINDS = ("dit", "pixart", "pixart_masked", "pixart_added")


def capture(model: Model, given: dict[str, Any], **settings: Any) -> StepPrograms:
    """The step programs of ``model`` for the call ``given``."""
    steps: StepPrograms = transformed(model, example_inputs=given, **{"history": "computed"} | settings).steps
    return steps


def junk_caches(step: StepProgram, seed: int = 3) -> dict[str, Tensor]:
    """Caches that no run would leave: normal values, and stamps in any order, some of them -1 (never computed)."""
    draw = torch.Generator().manual_seed(seed)
    caches = {spec.name: torch.randn(spec.shape, generator=draw).to(spec.dtype) for spec in step.caches}
    for name, cache in caches.items():
        if name.startswith("stamps"):
            order = torch.rand(*cache.shape[:2], 9, generator=draw).argsort(-1)[..., : cache.shape[-1]]
            caches[name] = order.to(cache.dtype) - 1
    return caches


def run_step(
    step: StepProgram, given: dict[str, Any], caches: dict[str, Tensor], number: int = 9, scores: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Feed a step graph by hand: the model's output, and the caches by name."""
    extras = {"step": torch.tensor(float(number)), "random_scores": None if scores is None else scores[None]}
    with torch.no_grad():
        out, *new = step.module(*(given[n] for n in step.input_names), *(extras[n] for n in extra_inputs(step)), *caches.values())
    assert list(caches) == [spec.name for spec in step.caches]
    return out, dict(zip(caches, new, strict=True))


# --- 1: with caching off, the original ------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"schedule": Schedule(every=1)}, {"ratio": 0.0}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_full_steps_are_bit_identical_over_a_run(kind: str, dtype: torch.dtype, setting: dict[str, Any]) -> None:
    model = build(kind).to(dtype)
    expected = run(model, kind, dtype=dtype)
    with parameters_unchanged(model):
        dispatcher = transformed(model, **setting)
        assert same_bits(run(dispatcher, kind, dtype=dtype), expected)
    assert dispatcher.summary().full_steps == 20 and dispatcher.summary().cached_steps == 0
    assert same_bits(run(model, kind, dtype=dtype), expected), "capturing changed the model"


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["dit", "pixart_masked"])
def test_full_steps_between_cached_ones_are_bit_identical(kind: str, context: Any) -> None:
    """Whatever the P-steps did to the sample, an I-step on it is the model's own."""
    model = build(kind)
    dispatcher = transformed(model, context=context)
    cached, plain = call_of(dispatcher, conditions(kind)), call_of(model, conditions(kind))
    seen: dict[str, list[bool]] = {"I": [], "P": []}

    def both(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        out = cached(step, x, timesteps)
        seen["I" if step % 4 == 0 else "P"].append(torch.equal(out, plain(step, x, timesteps)))
        return out

    ddim(both, sample())
    assert all(seen["I"]) and len(seen["I"]) == 5
    assert not any(seen["P"]) and len(seen["P"]) == 15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_disable_is_the_original_and_enable_the_cached_again(kind: str, dtype: torch.dtype) -> None:
    model = build(kind).to(dtype)
    expected = run(model, kind, dtype=dtype)
    dispatcher = transformed(model)
    cached = run(dispatcher, kind, dtype=dtype)
    assert not same_bits(cached, expected)
    dispatcher.disable()
    assert not dispatcher.is_cache_enabled
    assert same_bits(run(dispatcher, kind, dtype=dtype), expected)
    dispatcher.enable()
    assert dispatcher.is_cache_enabled
    assert same_bits(run(dispatcher, kind, dtype=dtype), cached)


def test_disable_in_the_middle_of_a_run() -> None:
    """From there on the original; enabled again, a run begins anew with an I-step."""
    model, given = build("dit"), conditions("dit")
    dispatcher = transformed(model)
    cached, plain = call_of(dispatcher, given), call_of(model, given)

    def call(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        if step == 6:
            dispatcher.disable()
        if step == 10:
            dispatcher.enable()
        out = cached(step, x, timesteps)
        assert torch.equal(out, plain(step, x, timesteps)) == (step in (0, 4, 6, 7, 8, 9, 10, 14, 18))
        return out

    ddim(call, sample())


# --- 2: n = N is the I-graph ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("forecast", [0, 2])
@pytest.mark.parametrize("context", ["kept", "full", "cached"])
@pytest.mark.parametrize("kind", ["dit", "pixart", "pixart_masked"])
def test_keeping_all_tokens_is_the_full_step(kind: str, context: Any, forecast: int) -> None:
    """With junk in the caches, and whatever the order of the indices."""
    model, given = build(kind), inputs(kind)
    steps = capture(model, given, keep=((TOKENS,) * CACHED,), context=context, forecast=forecast, scorer="random")
    (cached,) = steps.cached
    expected, _ = run_step(steps.full, given, junk_caches(steps.full), scores=torch.zeros(CACHED, TOKENS))
    with torch.no_grad():
        assert torch.equal(expected, model(**given, return_dict=False)[0])
    orders = set()
    for seed in range(3):
        scores = torch.rand(CACHED, TOKENS, generator=torch.Generator().manual_seed(seed))
        orders |= {tuple(row.tolist()) for row in torch.topk(scores, TOKENS, dim=1, sorted=False).indices}
        out, caches = run_step(cached, given, junk_caches(cached, seed), scores=scores)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        for name, cache in caches.items():
            assert not name.startswith("stamps") or bool((cache[..., 0] == 9).all()), "a token was left out"
    assert len(orders) == 3 * CACHED, "the indices were not shuffled"


@pytest.mark.parametrize("kind", ["dit", "pixart", "pixart_masked"])
def test_keeping_all_tokens_with_attention_reused(kind: str) -> None:
    """``reuse`` reads its attention from the cache by definition: with an I-step's on the same input, the I-step again."""
    model, given = build(kind), inputs(kind)
    steps = capture(model, given, keep=((TOKENS,) * CACHED,), context="reuse", scorer="random")
    scores = torch.rand(CACHED, TOKENS, generator=torch.Generator().manual_seed(1))
    expected, filled = run_step(steps.full, given, junk_caches(steps.full), scores=scores)
    (cached,) = steps.cached
    caches = {name: filled[name] if name.startswith("attention") else junk for name, junk in junk_caches(cached).items()}
    out, _ = run_step(cached, given, caches, scores=scores)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    junk, _ = run_step(cached, given, junk_caches(cached), scores=scores)
    assert float((junk - expected).abs().max()) > 0.01, "the attention cache is not read"


BF16_FACTOR = 1.05  # the sums of attention run in another order, and round on their own


@pytest.mark.parametrize("context", ["kept", "full", "cached"])
@pytest.mark.parametrize("kind", ["dit", "pixart", "pixart_masked"])
def test_keeping_all_tokens_in_bfloat16_is_as_exact_as_the_full_step(kind: str, context: Any) -> None:
    """Measured against the float32 I-graph with the same (bfloat16) weights and inputs, over 8 inputs."""
    model = build(kind).bfloat16()
    first = inputs(kind, dtype=torch.bfloat16)
    steps = capture(model, first, keep=((TOKENS,) * CACHED,), context=context, scorer="random")
    (cached,) = steps.cached
    scores = torch.rand(CACHED, TOKENS, generator=torch.Generator().manual_seed(1))
    given = [inputs(kind, seed=seed, dtype=torch.bfloat16) for seed in range(8)]
    full_outputs = [run_step(steps.full, g, junk_caches(steps.full), scores=scores)[0].float() for g in given]
    cached_outputs = [run_step(cached, g, junk_caches(cached), scores=scores)[0].float() for g in given]
    exact = model.float()
    with torch.no_grad():
        expected = [exact(**{n: _widened(v) for n, v in g.items()}, return_dict=False)[0] for g in given]
    error_full = torch.stack(full_outputs).sub(torch.stack(expected)).norm()
    error_cached = torch.stack(cached_outputs).sub(torch.stack(expected)).norm()
    assert float(error_full) > 0
    assert float(error_cached) <= BF16_FACTOR * float(error_full)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# --- 3: a P-step leaves everything else alone -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "forecast", "history"), [("change", 2, "computed"), ("random", 0, "computed"), ("norm", 1, "full_steps")]
)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["dit", "pixart_masked"])
def test_unselected_rows_stay_bit_identical(kind: str, context: Any, forecast: int, scorer: Any, history: Any) -> None:
    """And selected ones are written, in every cache that a P-step is meant to write."""
    given = inputs(kind)
    steps = capture(build(kind), given, keep=((5, 0, 11),), context=context, forecast=forecast, scorer=scorer, history=history)
    (cached,) = steps.cached
    scores = torch.rand(CACHED, TOKENS, generator=torch.Generator().manual_seed(1))
    caches = junk_caches(cached)
    before = {name: cache.clone() for name, cache in caches.items()}
    _, after = run_step(cached, given, caches, scores=scores)
    for name in caches:
        assert torch.equal(caches[name], before[name]), f"{name}: a step wrote to its inputs"
    for block, kept in ((0, 5), (1, 0), (2, 11)):
        own = {n for n in caches if f"_{block:02d}" in n}
        assert own
        chosen = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
        if kept:
            by = scores[block].expand(ROWS, -1) if scorer == "random" else before[f"score_{block:02d}"]
            chosen.scatter_(1, by.sort(dim=1, descending=True).indices[:, :kept], True)
        for name in own:
            changed = (after[name] != before[name]).view(ROWS, TOKENS, -1).any(-1)
            written = name.startswith(("key", "value")) or (history == "computed" and not name.startswith("attention"))
            assert torch.equal(changed, chosen if written else torch.zeros_like(chosen)), name


def test_a_cached_step_changes_no_other_branch() -> None:
    """Two guidance branches, and a request that is over: their caches keep every bit, and are no one else's memory."""
    model = build("dit")
    dispatcher = transformed(model, ratio=0.75, context="cached", history="computed")

    def step(name: str, timestep: int, seed: int) -> None:
        with torch.no_grad(), dispatcher.cache_context(name):
            dispatcher(**{**inputs("dit", seed=1 if name == "cond" else 8, timestep=timestep), "hidden_states": sample(seed=seed)})

    def caches(name: str) -> list[Tensor]:
        found: list[Tensor] = dispatcher._tracker.current.branches[name].caches
        return found

    for timestep, seed in ((900, 1), (850, 2)):
        step("cond", timestep, seed)
        step("uncond", timestep, seed)
    old_cond = caches("cond")
    other, kept = caches("uncond"), [cache.clone() for cache in caches("uncond")]
    step("cond", 800, 3)
    assert any(not torch.equal(a, b) for a, b in zip(caches("cond"), old_cond, strict=True)), "the P-step wrote nothing"
    assert all(a is b for a, b in zip(caches("uncond"), other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other, kept, strict=True))
    memory = {cache.untyped_storage().data_ptr() for cache in caches("cond")}
    assert not memory & {cache.untyped_storage().data_ptr() for cache in other}

    cond = [cache.clone() for cache in caches("cond")]
    before = caches("cond")
    step("cond", 999, 4)  # rises: a new request
    step("cond", 950, 5)
    assert list(dispatcher._tracker.current.branches) == ["cond"]
    assert all(torch.equal(a, b) for a, b in zip([*before, *other], [*cond, *kept], strict=True))


# --- beside the five -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["kept", "reuse"])
def test_the_macs_of_a_summary_are_those_that_run(context: str) -> None:
    """Counted by an operator mode over a whole run, the capture within it left out."""
    dispatcher = transformed(build("dit"), context=context)
    counter = MacCounter()
    with counter:
        counted = run(dispatcher, "dit", steps=8)
    summary = dispatcher.summary()
    assert counter.macs == summary.macs and (summary.full_steps, summary.cached_steps) == (2, 6)
    assert same_bits(counted, run(transformed(build("dit"), context=context), "dit", steps=8))
