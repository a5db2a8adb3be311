"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from plain_loop import PlainLoop
from plain_run import assert_close, drawn_scores
from tiny import LAST_K, LAYERS, Model, build, call_of, conditions, ddim, same_bits, sample, transformed
from torch import Tensor
from torch._dynamo.utils import counters

from tokencache_compile import Schedule

DEVICE = os.environ.get("TOKENCACHE_TEST_DEVICE", "cuda")  # "cpu" tries the tests themselves
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]
CONTEXTS = ("kept", "full", "cached", "reuse")


def on_device(model: Model, dtype: torch.dtype = torch.float32) -> Model:
    return model.to(DEVICE, dtype)


def run(model: Model, kind: str, dtype: torch.dtype = torch.float32, seed: int = 2) -> list[Tensor]:
    """A DDIM run on the device."""
    call = call_of(model, {name: value.to(DEVICE) for name, value in conditions(kind, dtype=dtype).items()})
    return ddim(lambda step, x, t: call(step, x, t.to(DEVICE)), sample(seed=seed, dtype=dtype).to(DEVICE), steps=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dit", "pixart_masked"])
def test_full_steps_are_bit_identical(kind: str, dtype: torch.dtype) -> None:
    model = on_device(build(kind), dtype)
    dispatcher = transformed(model, schedule=Schedule(every=1))
    assert same_bits(run(dispatcher, kind, dtype), run(model, kind, dtype))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["dit", "pixart_masked"])
def test_cached_steps_in_bfloat16(kind: str, context: Any) -> None:
    """They run, on the device, twice the same; the I-step after them is the model's own."""
    model = on_device(build(kind), torch.bfloat16)
    dispatcher = transformed(model, context=context, history="computed")
    first = run(dispatcher, kind, torch.bfloat16)
    assert same_bits(first, run(dispatcher, kind, torch.bfloat16))
    assert not same_bits(first, run(model, kind, torch.bfloat16)) and {out.device.type for out in first} == {DEVICE}
    branch = next(iter(dispatcher._tracker.current.branches.values()))
    assert {cache.device.type for cache in branch.caches} == {DEVICE}
    assert dispatcher.summary().full_steps == 3 and dispatcher.summary().cached_steps == 7


@pytest.mark.parametrize("context", CONTEXTS)
def test_cached_steps_against_the_plain_loop(context: Any) -> None:
    """In float32, without TF32; 1e-4 of the largest value, as kernels for other shapes add up in other orders."""
    model = on_device(build("dit"))
    keep = (2,) * (LAYERS - LAST_K)
    loop = PlainLoop(model, keep, LAST_K, context, 2, "external", history="computed")
    given = {name: value.to(DEVICE) for name, value in conditions("dit").items()}

    def plain(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        scores = None if step % 4 == 0 else drawn_scores(step, len(keep)).expand(len(x), -1, -1).to(DEVICE)
        return loop.step(step, step % 4 == 0, scores, hidden_states=x, timestep=timesteps.to(DEVICE), **given)

    expected = ddim(plain, sample().to(DEVICE), steps=10)
    assert_close(run(transformed(model, context=context, scorer="random", history="computed"), "dit"), expected, tolerance=1e-4)


@pytest.mark.parametrize("settings", [{"scorer": "random"}, {"ratio": 1.0}, {"scorer": "random", "history": "computed"}])
def test_inductor(settings: dict[str, Any]) -> None:
    """Two graphs over four generations, no break, and the eager graphs' results; by CUDA graphs what the first generation gave."""
    torch._dynamo.reset()
    counters.clear()
    model = on_device(build("dit"))
    compiled = transformed(model, backend="inductor", **settings)
    first = run(compiled, "dit")
    other = run(compiled, "dit", seed=5)
    again = [run(compiled, "dit", seed=seed) for seed in (2, 5)]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert same_bits(first, again[0]) and same_bits(other, again[1]) and not same_bits(first, other)
    assert_close(first, run(transformed(model, **settings), "dit"), tolerance=1e-3)
    if DEVICE != "cpu":
        steps = [compiled.captured().full._on_gpu, compiled.captured().cached[0]._on_gpu]
        assert all(step._records and step._recordings._replays for step in steps)


def test_streams_and_threads() -> None:
    """Two threads on streams of their own: as one thread alone, bit for bit."""
    model = on_device(build("dit"))
    compiled = transformed(model, backend="inductor", scorer="random")
    expected = [run(compiled, "dit", seed=seed) for seed in (2, 5)]

    def work(seed: int) -> list[Tensor]:
        if DEVICE == "cpu":
            return run(compiled, "dit", seed=seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = [run(compiled, "dit", seed=seed) for _ in range(3)][-1]
            torch.cuda.current_stream().synchronize()
            return outputs

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, (2, 5)))
    assert same_bits(found[0], expected[0]) and same_bits(found[1], expected[1])


def test_a_compiled_model_that_leaves_and_comes_back() -> None:
    """Its weights lie elsewhere then, and what was recorded on the old addresses is not replayed."""
    model = on_device(build("dit"))
    compiled = transformed(model, backend="inductor", scorer="random")
    first = [run(compiled, "dit") for _ in range(3)][-1]
    model.to("cpu")
    held = [torch.empty_like(parameter, device=DEVICE) for parameter in model.parameters()]  # where they lay
    on_device(model)
    assert same_bits([run(compiled, "dit") for _ in range(3)][-1], first) and held


def test_moving_the_model() -> None:
    """From the CPU to the device and back: captured anew for each, and right on each."""
    model = build("dit")
    dispatcher = transformed(model)
    first = ddim(call_of(dispatcher, conditions("dit")), sample(), steps=10)
    on_device(model)
    assert same_bits(run(dispatcher, "dit"), run(transformed(model), "dit"))
    model.to("cpu")
    assert same_bits(ddim(call_of(dispatcher, conditions("dit")), sample(), steps=10), first)


def test_inputs_on_another_device_are_refused() -> None:
    """By the model's own error, and the next good call works."""
    model = on_device(build("dit"))
    dispatcher = transformed(model)
    given = conditions("dit")
    if DEVICE != "cpu":
        with pytest.raises(Exception, match=r"device|cuda"):
            ddim(call_of(dispatcher, given), sample(), steps=10)
    assert same_bits(run(dispatcher, "dit"), run(transformed(model), "dit"))
