"""Conditioning made ahead: what is cut off and what stays, that values are the step's own, and when a step is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from families import FAMILIES
from tiny import Model, build, call_of, conditions, ddim, inputs, run, same_bits, sample, sampler, transformed
from torch import Tensor

import tokencache_compile as tc
from tokencache_compile import ahead as module
from tokencache_compile.ahead import HoistedEngine
from tokencache_compile.passes.regions import Region

STEPS = 12
LINEAR = torch.ops.aten.linear.default


def watched(model: Model, **changes: Any) -> tuple[Model, Any]:
    scheduler = sampler(STEPS)
    return transformed(model, scheduler=scheduler, **{"schedule": tc.Schedule(4)} | changes), scheduler


def sampled(dispatcher: Model, scheduler: Any, given: dict[str, Any]) -> list[Tensor]:
    scheduler.set_timesteps(STEPS)
    return ddim(call_of(dispatcher, given), sample(), STEPS, scheduler)


def hoisted_of(dispatcher: Model) -> HoistedEngine:
    (hoisted,) = dispatcher.captured().hoisted
    assert hoisted is not None
    return hoisted


def count_ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every run ahead from now on: how many timesteps it takes."""
    runs: list[int] = []
    own = module.run_ahead

    def counted(graph: Any, given: Any, timestep: str, timesteps: Tensor) -> Any:
        runs.append(len(timesteps))
        return own(graph, given, timestep, timesteps)

    monkeypatch.setattr(module, "run_ahead", counted)
    return runs


def linears(graph_module: Any) -> int:
    """Linears of a step graph, a region's as often as it is called."""
    total = len(graph_module.graph.find_nodes(op="call_function", target=LINEAR))
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            region = graph_module.get_submodule(node.target)
            assert isinstance(region, Region)
            total += len(region.graph_module.graph.find_nodes(op="call_function", target=LINEAR))
    return total


def test_every_linear_of_the_timestep_leaves_the_step() -> None:
    """DiT, 4 blocks: each has two linears that embed the timestep and one that modulates; as many are behind the blocks."""
    dispatcher, scheduler = watched(build("dit"))
    sampled(dispatcher, scheduler, conditions("dit"))
    hoisted = hoisted_of(dispatcher)
    plain, cut = dispatcher.steps.cached[0].module, hoisted._hoisted
    assert linears(plain) - linears(cut.step.module) == 4 * 3 + 3
    assert linears(cut.ahead) == 4 * 3 + 3
    names = [str(node.target) for node in cut.ahead.graph.find_nodes(op="placeholder")]
    assert names == ["timestep", "class_labels"]
    left = dict(cut.step.module.named_parameters())
    assert not [name for name in left if "norm1.linear" in name or "timestep_embedder" in name]
    assert all(left[name] is parameter for name, parameter in dispatcher.model.named_parameters() if name in left), "weights are shared"
    assert "hoist: 5 linears" in cut.step.describe()


@pytest.mark.parametrize(("rows", "leaves"), [(4, True), (5, False)])
def test_keys_and_values_of_a_short_text_leave_the_step(rows: int, leaves: bool) -> None:
    """PixArt: a text of 7 tokens a sample, width 32. Of 5 samples it has more rows than columns, and what is made of it stays."""
    dispatcher, scheduler = watched(build("pixart"))
    scheduler.set_timesteps(STEPS)
    ddim(call_of(dispatcher, conditions("pixart", rows)), sample(rows), STEPS, scheduler)
    cut = hoisted_of(dispatcher)._hoisted
    left = {name for name, _ in cut.step.module.named_parameters()}
    assert not [name for name in left if name.startswith("adaln_single")]
    of_text = [name for name in left if "attn2.to_k" in name or "attn2.to_v" in name or "caption_projection" in name]
    assert bool(of_text) != leaves
    names = {str(node.target) for node in cut.ahead.graph.find_nodes(op="placeholder")}
    assert names == ({"timestep", "encoder_hidden_states"} if leaves else {"timestep"})
    if leaves:
        made = hoisted_of(dispatcher).values(module.Ahead(), dispatcher_inputs(dispatcher, rows), 500.0, [500.0, 400.0])
        assert made is not None and sum(value.shape == (rows, 7, 32) for value in made) == 2 * 4


def dispatcher_inputs(dispatcher: Model, rows: int) -> list[Tensor]:
    """The tensors of one call, in the order of the graphs' inputs."""
    _, call = dispatcher._accept(inputs("pixart", rows))
    tensors: list[Tensor] = dispatcher._signature_of(call)[1]
    return tensors


@pytest.mark.parametrize("kind", ["dit", "pixart", "pixart_masked", "pixart_added"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"history": "computed", "context": "reuse", "forecast": 1},
        {"granularity": "module", "context": "reuse", "scorer": "norm"},
    ],
)
def test_a_run_is_that_of_the_plain_steps(kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    dispatcher, scheduler = watched(model, **changes)
    runs = count_ahead(monkeypatch)
    got = sampled(dispatcher, scheduler, conditions(kind))
    assert runs == [9], "all P-steps of 12 at once"
    expected = run(transformed(model, **changes), kind, STEPS)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert same_bits(sampled(dispatcher, scheduler, conditions(kind)), got), "a second run is the first"
    assert runs == [9, 9]


def test_more_steps_than_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("dit")
    whole, scheduler = watched(model)
    expected = sampled(whole, scheduler, conditions("dit"))
    monkeypatch.setattr(module, "STEPS_AHEAD", 4)
    runs = count_ahead(monkeypatch)
    dispatcher, scheduler = watched(model)
    for one, other in zip(sampled(dispatcher, scheduler, conditions("dit")), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert runs == [4, 4, 1]


def test_a_condition_that_changes_within_the_run_is_followed() -> None:
    """Other labels from step 6 on: those steps are the plain ones, bit for bit what they are without a known scheduler."""
    model = build("dit")
    changing: list[list[Tensor]] = []
    for scheduler in (sampler(STEPS), None):
        dispatcher = transformed(model, scheduler=scheduler, schedule=tc.Schedule(4))
        calls = [call_of(dispatcher, conditions("dit", seed=seed)) for seed in (1, 6)]
        used = scheduler or sampler(STEPS)
        used.set_timesteps(STEPS)
        changing.append(ddim(lambda n, x, t, calls=calls: calls[n >= 6](n, x, t), sample(), STEPS, used))  # type: ignore[misc]
    for one, other in zip(*changing, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    dispatcher, scheduler = watched(model)
    constant = sampled(dispatcher, scheduler, conditions("dit"))
    assert not torch.allclose(changing[0][7], constant[7], atol=1e-2), "the labels matter"


def test_samples_at_different_timesteps_take_the_plain_step() -> None:
    """The dispatcher goes by the first sample's timestep; what the others' make of theirs must not be taken from it."""
    model = build("dit")
    results = []
    for scheduler in (sampler(STEPS), None):
        dispatcher = transformed(model, scheduler=scheduler, schedule=tc.Schedule(4))
        given = conditions("dit")
        used = scheduler or sampler(STEPS)
        used.set_timesteps(STEPS)
        call = call_of(dispatcher, given)
        results.append(ddim(lambda n, x, t, call=call: call(n, x, t - torch.arange(len(t))), sample(), STEPS, used))  # type: ignore[misc]
    assert same_bits(*results)


@pytest.mark.parametrize("known", [True, False])
def test_thousandths_of_a_known_schedule(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX is given t / 1000; a scheduler of another step count says nothing about a run."""
    family = FAMILIES["FluxTransformer2DModel (guidance)"]
    model, given = family.build()
    scheduler, other = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()
    dispatcher = tc.transform(model, ratio=0.5, last_k=0, backend="eager", scheduler=scheduler, schedule=tc.Schedule(4))
    runs = count_ahead(monkeypatch)
    scheduler.set_timesteps(STEPS if known else 5)
    other.set_timesteps(STEPS)
    plain = tc.transform(model, ratio=0.5, last_k=0, backend="eager")
    x = given["hidden_states"]
    with torch.no_grad():
        for t in other.timesteps:
            call = {**given, "hidden_states": x, "timestep": t.expand(len(x)) / 1000}
            got, expected = dispatcher(**call).sample, plain(**call).sample
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            x = x - expected / STEPS
    assert runs == ([9] if known else [])


@pytest.mark.parametrize("given_as", [lambda t: (1000 - t) / 1000, lambda t: 1 - t / 1000, lambda t: 1000 - t])
def test_other_ways_to_give_a_timestep(given_as: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Z-Image, Lumina 2 and Mochi: the time rises within the run, whose begin the scheduler marks."""
    model, results = build("dit"), []
    for ahead in (True, False):
        dispatcher, scheduler = watched(model)
        if not ahead:
            monkeypatch.setattr(HoistedEngine, "schedule", lambda *_: None)
        runs = count_ahead(monkeypatch)
        scheduler.set_timesteps(STEPS)
        call = call_of(dispatcher, conditions("dit"))
        results.append(ddim(lambda n, x, t, call=call: call(n, x, given_as(t)), sample(), STEPS, scheduler))  # type: ignore[misc]
        assert runs == ([9] if ahead else []) and dispatcher.summary().full_steps == 3
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_without_a_scheduler_nothing_is_made_ahead() -> None:
    dispatcher = transformed(build("dit"))
    run(dispatcher, "dit", STEPS)
    assert dispatcher.captured().hoisted == (None,)


def test_an_operator_that_takes_no_further_axis_leaves_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.vmap refuses, the plain step runs."""
    model = build("dit")
    dispatcher, scheduler = watched(model)
    from tokencache_compile.passes import hoist as hoist_pass

    def refused(*_: Any) -> Any:
        raise RuntimeError("vmap: no batching rule")

    monkeypatch.setattr(hoist_pass, "run_ahead", refused)
    got = sampled(dispatcher, scheduler, conditions("dit"))
    assert dispatcher.captured().hoisted == (None,)
    assert same_bits(got, run(transformed(model), "dit", STEPS))


def test_prepared_steps_are_the_ones_that_run() -> None:
    """``prepare`` warms the cut step up, so that a run compiles nothing."""
    model = build("dit", layers=2)
    dispatcher, scheduler = watched(model, last_k=0, backend="inductor")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dispatcher.prepare(inputs("dit"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        sampled(dispatcher, scheduler, conditions("dit"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before == 2
