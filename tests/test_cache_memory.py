"""Cache memory: what a plan needs is known before a run, is what a run allocates, stays within a budget, and may be stored narrower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_invariants import capture, junk_caches, run_step
from tiny import LAYERS, build, conditions, inputs, run, sample, transformed
from torch import Tensor

from tokencache_compile import ConfigError, ExportError, export_onnx
from tokencache_compile.ir import CacheSpec


def caches(dispatcher: Any) -> list[Tensor]:
    """What the one branch of the current request holds."""
    (branch,) = dispatcher._tracker.current.branches.values()
    held: list[Tensor] = branch.caches
    return held


def allocated(dispatcher: Any) -> int:
    """Bytes of the storages behind the caches: a view of something larger counts in full."""
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches(dispatcher)}
    return sum(storages.values())


def step_once(dispatcher: Any, kind: str, timestep: int) -> None:
    with torch.no_grad():
        dispatcher(hidden_states=sample(seed=timestep), timestep=torch.full((4,), timestep), **conditions(kind))


@pytest.mark.parametrize(
    "settings",
    [
        {"context": "reuse", "history": "full_steps", "forecast": 2},
        {"context": "cached", "history": "computed", "forecast": 1, "scorer": "change"},
        {"context": "kept", "history": "computed", "forecast": 0, "cache_dtype": "bfloat16"},
        {"context": "reuse", "keep": ((4, 0, 0), (0, 0, 4)), "cache_dtype": "float8_e4m3fn"},
        {"context": "reuse", "cache_dtype": "float8_e4m3fn", "backend": "inductor"},
    ],
)
def test_predicted_bytes_are_what_a_run_allocates(settings: dict[str, Any]) -> None:
    dispatcher = transformed(build("dit"), **settings)
    dispatcher.prepare(inputs("dit"))
    predicted = dispatcher.steps.cache_bytes
    for timestep in (900, 800, 700, 600, 500, 400, 300, 200, 100):  # until every older value has moved down once
        step_once(dispatcher, "dit", timestep)
        assert allocated(dispatcher) <= predicted == dispatcher.summary().cache_bytes  # the first caches of a request share memory
    assert allocated(dispatcher) == predicted


def test_a_budget_caches_as_many_first_blocks_as_fit() -> None:
    model = build("dit")
    settings: dict[str, Any] = {"example_inputs": inputs("dit"), "ratio": 0.75}
    needed = {k: transformed(model, last_k=LAYERS - k, **settings).steps.cache_bytes for k in range(1, LAYERS + 1)}
    for blocks in range(1, LAYERS + 1):
        exact, almost = needed[blocks], needed[blocks] - 1
        chosen = transformed(model, last_k=0, max_cache_bytes=exact, **settings)
        assert chosen.plan.num_cached == blocks and chosen.steps.cache_bytes == exact
        assert (f"so {LAYERS - blocks} last blocks run in full and not 0" in str(chosen.plan)) == (blocks < LAYERS)
        if blocks > 1:
            assert transformed(model, last_k=0, max_cache_bytes=almost, **settings).plan.num_cached == blocks - 1
    run(chosen, "dit")
    assert chosen.summary().cache_bytes == exact and len(chosen.summary().tokens_recomputed) == LAYERS


def test_a_budget_cuts_keep_profiles_where_it_ends() -> None:
    model = build("dit", layers=4)
    settings: dict[str, Any] = {"example_inputs": inputs("dit"), "last_k": 0, "keep": ((0, 0, 3, 4), (0, 0, 5, 6))}
    whole = transformed(model, **settings)
    cut = transformed(model, **settings, max_cache_bytes=whole.steps.cache_bytes - 1)
    assert cut.plan.profiles == ((0, 0, 3), (0, 0, 5)) and [unit.name for unit in cut.steps.units] == ["00_01", "02"]


def test_a_budget_for_no_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_cache_bytes=1000 was asked for, and the caches of one block alone take \d+ bytes"):
        transformed(build("dit"), example_inputs=inputs("dit"), max_cache_bytes=1000)


@pytest.mark.parametrize(
    ("setting", "message"), [({"max_cache_bytes": -1}, "number of bytes"), ({"cache_dtype": "int8"}, "cache_dtype is one of")]
)
def test_wrong_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        transformed(build("dit"), **setting)


def narrowed(value: Tensor, spec: CacheSpec) -> Tensor:
    """Rounded to nearest, and held at the largest value that the dtype has."""
    if spec.dtype == spec.computed:
        return value
    limit = torch.finfo(spec.dtype).max
    return torch.minimum(torch.maximum(value, torch.tensor(-limit)), torch.tensor(limit)).to(spec.dtype)


@pytest.mark.parametrize(("history", "scorer"), [("full_steps", "norm"), ("computed", "change")])
@pytest.mark.parametrize(
    ("context", "dtype"), [("kept", "bfloat16"), ("cached", "float16"), ("full", "float8_e4m3fn"), ("reuse", "float8_e4m3fn")]
)
def test_narrow_caches_only_round_what_they_hold(dtype: str, history: str, scorer: str, context: str) -> None:
    """A step on narrow caches is the plain step on their values, and keeps what that would keep, rounded; all to the bit."""
    given = inputs("dit")
    settings = {"context": context, "history": history, "scorer": scorer, "forecast": 2}
    plain = capture(build("dit"), given, **settings)
    narrow = capture(build("dit"), given, **settings, cache_dtype=dtype)
    assert narrow.cache_bytes < plain.cache_bytes
    for wide_step, narrow_step in zip((plain.full, *plain.cached), (narrow.full, *narrow.cached), strict=True):
        specs = {spec.name: spec for spec in narrow_step.caches}
        held = {name: narrowed(300 * value, specs[name]) for name, value in junk_caches(wide_step).items()}
        held |= {name: value for name, value in junk_caches(wide_step).items() if name.startswith("stamps")}
        values = {name: value.to(specs[name].computed) for name, value in held.items()}
        expected, after = run_step(wide_step, given, values)
        got, kept = run_step(narrow_step, given, held)
        assert torch.equal(got, expected)
        assert any(spec.dtype != spec.computed for spec in specs.values())
        for name, spec in specs.items():
            assert kept[name].dtype == spec.dtype
            assert torch.equal(kept[name].float(), narrowed(after[name], spec).float()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_caches_in_onnxruntime(dtype: torch.dtype) -> None:
    """An I-step leaves the caches that the eager graph leaves, but for values that round to the other neighbour; P-steps read them."""
    name = str(dtype).removeprefix("torch.")
    settings: dict[str, Any] = {"history": "full_steps", "context": "reuse", "forecast": 1, "scorer": "random", "cache_dtype": name}
    eager, other = transformed(build("dit"), **settings), transformed(build("dit"), **settings, backend="onnxruntime")
    expected_run, got_run = (run(dispatcher, "dit", steps=4) for dispatcher in (eager, other))
    assert eager.summary() == other.summary() and eager.summary().cached_steps == 3
    assert max(float((a - b).abs().max()) for a, b in zip(got_run, expected_run, strict=True)) < 0.02 * float(expected_run[1].abs().max())
    for spec, got, expected in zip(eager.steps.caches, caches(other), caches(eager), strict=True):
        assert got.dtype == expected.dtype == spec.dtype
        assert float((got == expected).float().mean()) > 0.8, spec.name
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_eight_bit_caches_are_not_exported(tmp_path: Any) -> None:
    dispatcher = transformed(build("dit"), example_inputs=inputs("dit"), cache_dtype="float8_e4m3fn")
    with pytest.raises(ExportError, match=r"update_00_0 and \d+ more caches are torch.float8_e4m3fn"):
        export_onnx(dispatcher, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
