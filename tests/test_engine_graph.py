"""Engine graphs against the step programs they come from: bit for bit, over runs in which every cache fills and moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny import Model, build, inputs
from torch import Tensor, nn
from toy import CHANNELS, ToyBlock, ToyModel, toy_inputs

from tokencache_compile import CacheConfig, CachePredictor, ConfigError
from tokencache_compile.export.session import SessionEngine
from tokencache_compile.ir import EngineGraph, StepProgram
from tokencache_compile.passes import pipeline
from tokencache_compile.passes.analysis import analyse
from tokencache_compile.passes.capture import capture
from tokencache_compile.passes.engine_graph import engine_graphs
from tokencache_compile.passes.outline import outline
from tokencache_compile.passes.pipeline import StepPrograms, build_steps
from tokencache_compile.passes.regions import Region

KINDS = "IPIPPIP"
LAYERS = 3
RULES: dict[str, Any] = {"ratio": 0.8, "last_k": 1, "scorer": "change", "forecast": 2, "context": "cached", "history": "computed"}
Front = tuple[Model, Any, Any]  # a model, its capture and its analysed program


def front(model: Model, given: Mapping[str, Any]) -> Front:
    captured = capture(model, given)
    return model, captured, analyse(outline(captured, model), captured)


@contextmanager
def captured_once(model_front: Front) -> Iterator[None]:
    """Within this context ``build_steps`` takes the capture that is there: it depends on no setting, and takes the longest."""
    _, captured, program = model_front
    with patch.multiple(pipeline, capture=lambda *_: captured, outline=lambda *_: program, analyse=lambda *_: program):
        yield


def steps_of(model_front: Front, predictor: CachePredictor | None = None, **changes: Any) -> StepPrograms:
    with captured_once(model_front):
        return build_steps(model_front[0], {}, CacheConfig(**RULES | changes), predictor)


@pytest.fixture(scope="module")
def dit() -> Front:
    return front(build("dit", layers=LAYERS), inputs("dit"))


@pytest.fixture(scope="module")
def masked() -> Front:
    return front(build("pixart_masked", layers=2), inputs("pixart_masked"))


class Torch:
    """Runs an engine graph with torch, by names: what an engine does."""

    def __init__(self, graph: EngineGraph) -> None:
        self.graph = graph

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        io = self.graph.io
        for spec in io.inputs:
            assert (tuple(values[spec.name].shape), values[spec.name].dtype) == (spec.shape, spec.dtype), spec.name
        with torch.no_grad():
            results = self.graph.module(*(values[spec.name] for spec in io.inputs))
        for spec, result in zip(io.outputs, results, strict=True):
            assert (tuple(result.shape), result.dtype) == (spec.shape, spec.dtype), spec.name
        return dict(zip([spec.name for spec in io.outputs], results, strict=True))


def by_hand(graph: EngineGraph, values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A step's outputs and next caches from what its engine computes, by the rule that :class:`StepIO` states."""
    named = dict(zip(graph.io.arguments, values, strict=True))
    if graph.scores is not None:
        scores = Torch(graph.scores).run(named)
        for block, kept in graph.io.selects:
            named[f"index_{block:02d}"] = torch.topk(scores[f"scores_{block:02d}"], kept, dim=1, sorted=False).indices
    computed = Torch(graph).run(named)
    outputs = [computed[spec.name] for spec in graph.io.outputs[: graph.io.num_outputs]]
    return outputs, [computed[name] if name in computed else named[name] for name in graph.io.next_caches]


def make_predictor(model: Model) -> CachePredictor:
    """A predictor whose scores are its own."""
    predictor = CachePredictor(model.transformer_blocks[0], 32, LAYERS)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.15)
    return predictor.eval()


def programs(steps: StepPrograms) -> list[StepProgram]:
    return [steps.full, *steps.cached]


def compare(steps: StepPrograms, graphs: Sequence[EngineGraph], given: Mapping[str, Any]) -> None:
    """A run of I- and P-steps on the step programs, and every step of it on the engine graphs with the same caches: bit for bit."""
    caches = steps.initial_caches(torch.device("cpu"))
    engines = [SessionEngine(graph.io, Torch(graph), Torch(graph.scores) if graph.scores else None) for graph in graphs]
    draw = torch.Generator().manual_seed(11)
    tensors = list(_tensors(given))
    for step, kind in enumerate(KINDS):
        number = 0 if kind == "I" else 1 + steps.plan.profile_of(step)
        tensors[0] = torch.randn(tensors[0].shape, generator=draw)
        extras = steps.step_inputs(step, torch.device("cpu"))
        with torch.no_grad():
            results = list(programs(steps)[number].module(*tensors, *extras, *caches))
        wanted = results[: steps.full.num_outputs], results[steps.full.num_outputs :]
        for got in (by_hand(graphs[number], [*tensors, *extras, *caches]), engines[number](tensors, extras, caches)):
            for name, a, b in zip(("outputs", "caches"), got, wanted, strict=True):
                assert len(a) == len(b)
                for i, (x, y) in enumerate(zip(a, b, strict=True)):
                    assert bool(y.isfinite().all())
                    assert torch.equal(x, y), (step, kind, name, i)
        caches = wanted[1]


def _tensors(given: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in given.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        else:
            yield value


def check_form(steps: StepPrograms, graphs: Sequence[EngineGraph]) -> None:
    """What every engine graph is: flat, all its inputs read, its outputs tensors of their own, nothing copied that only moves."""
    scores = [graph.scores for graph in graphs if graph.scores is not None]
    for graph in (*graphs, *scores):
        nodes = list(graph.module.graph.nodes)
        assert not any(isinstance(m, Region) for m in graph.module.modules()) and not any(n.op == "call_module" for n in nodes)
        placeholders = [n for n in nodes if n.op == "placeholder"]
        assert [n.target for n in placeholders] == [spec.name for spec in graph.io.inputs] and all(n.users for n in placeholders)
        results: Any = graph.module.graph.output_node().args[0]
        assert len(set(results)) == len(results) and not any(n.op in ("placeholder", "get_attr") for n in results)
        names = [spec.name for spec in (*graph.io.inputs, *graph.io.outputs)]
        assert len(set(names)) == len(names)
    for graph, step in zip(graphs, programs(steps), strict=True):
        returned: Any = step.module.graph.output_node().args[0]
        for spec, node, after in zip(step.caches, returned[step.num_outputs :], graph.io.next_caches, strict=True):
            assert after == (node.target if node.op == "placeholder" else f"next_{spec.name}")


class WithConstant(ToyBlock):
    """A constant, and a graph of its own (an autocast region), inside the block."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            scaled = x * (1 + 0.1 * torch.tensor([1.0, 2.0] * (CHANNELS // 2)))
        return super().forward(scaled, condition) - scaled + x


def test_what_a_block_brings_along() -> None:
    """Constants of a block, and graphs within it, come along when its regions are inlined."""
    torch.manual_seed(0)
    steps = steps_of(front(ToyModel(WithConstant).eval(), toy_inputs()))
    compare(steps, engine_graphs(steps, ["sample"]), toy_inputs())


@pytest.mark.parametrize("history", ["full_steps", "computed"])
@pytest.mark.parametrize("forecast", [0, 1, 2])
@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
def test_a_graph_is_the_step_bit_for_bit(dit: Front, context: str, forecast: int, history: str) -> None:
    steps = steps_of(dit, context=context, forecast=forecast, history=history)
    graphs = engine_graphs(steps, ["sample"])
    check_form(steps, graphs)
    compare(steps, graphs, inputs("dit"))


@pytest.mark.parametrize(
    "changes",
    [
        {"scorer": "random", "selection": "batch"},
        {"scorer": "norm", "selection": "pair", "context": "reuse", "history": "full_steps"},
        {"keep": ((5, 16), (0, 3)), "groups": (0, 0, 0, 1)},
        {"keep": ((0, 3),), "history": "full_steps"},
        {"ratio": 1.0},
        {"ratio": 0.0},
    ],
)
def test_other_settings(dit: Front, changes: dict[str, Any]) -> None:
    """Scorers and selections, several P-graphs, blocks that keep nothing or everything, and no caching at all."""
    steps = steps_of(dit, **changes)
    graphs = engine_graphs(steps, ["sample"])
    assert len(graphs) == 1 + len(steps.cached)
    check_form(steps, graphs)
    if graphs[1:]:
        compare(steps, graphs, inputs("dit"))


def test_masks_of_tokens_and_text(masked: Front) -> None:
    steps = steps_of(masked, context="full")
    graphs = engine_graphs(steps, ["sample"])
    check_form(steps, graphs)
    compare(steps, graphs, inputs("pixart_masked"))
    for graph in graphs:
        assert {"attention_mask", "encoder_attention_mask"} <= {spec.name for spec in graph.io.inputs}


@pytest.mark.parametrize("selection", ["sample", "pair"])
def test_the_predictor_inside(dit: Front, selection: str) -> None:
    steps = steps_of(dit, make_predictor(dit[0]), scorer="predictor", selection=selection)
    graphs = engine_graphs(steps, ["sample"])
    check_form(steps, graphs)
    compare(steps, graphs, inputs("dit"))


def test_what_is_not_read_is_no_input(dit: Front) -> None:
    """Named by hand for one plan, and then for all arguments: what is left out may be NaN."""
    steps = steps_of(dit, scorer="random", context="reuse", history="full_steps", forecast=1)
    full, cached = engine_graphs(steps, ["sample"])
    model = ["hidden_states", "timestep", "class_labels"]
    blocks = range(LAYERS - 1)
    assert [spec.name for spec in full.io.inputs] == [*model, "step", "stamps"]
    assert [spec.name for spec in full.io.outputs] == [
        "sample",
        *(name for i in blocks for name in (f"next_update_{i:02d}_0", *(["next_stamps"] if i == 0 else []), f"next_attention_{i:02d}_0")),
    ]
    read = [name for i in blocks for name in (*(f"update_{i:02d}_{j}" for j in (0, 1)), *(f"attention_{i:02d}_{j}" for j in (0, 1)))]
    assert {spec.name for spec in cached.io.inputs} == {*model, "step", "random_scores", "stamps", *read}
    assert [spec.name for spec in cached.io.outputs] == ["sample"], "a P-step that writes nothing copies nothing"
    assert cached.io.next_caches == tuple(spec.name for spec in steps.caches)
    order = dict(zip((spec.name for spec in steps.caches), full.io.next_caches, strict=True))
    assert order["update_01_1"] == "update_01_0" and order["attention_01_1"] == "attention_01_0" and order["stamps"] == "next_stamps"

    values = [*_tensors(inputs("dit")), *steps.step_inputs(1, torch.device("cpu"))]
    values += [torch.rand(spec.shape) for spec in steps.caches]
    for graph, step in zip((full, cached), programs(steps), strict=True):
        there = {spec.name for spec in graph.io.inputs}
        spoilt = [v if name in there else torch.full_like(v, float("nan")) for name, v in zip(graph.io.arguments, values, strict=True)]
        with torch.no_grad():
            assert torch.equal(step.module(*values)[0], step.module(*spoilt)[0])


def test_order_zero_reads_no_step(dit: Front) -> None:
    """Nothing is extrapolated, so nothing says where the run stands."""
    for graph in engine_graphs(steps_of(dit, forecast=0, scorer="change"), ["sample"]):
        assert "step" not in {spec.name for spec in graph.io.inputs} and "step" in graph.io.arguments


# --- the host selects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "selection"),
    [
        ("random", "sample"),
        ("random", "batch"),
        ("norm", "pair"),
        ("change", "sample"),
        ("change", "batch"),
        ("predictor", "sample"),
        ("predictor", "pair"),
        ("predictor", "batch"),
    ],
)
def test_the_host_selects_what_the_graph_would(dit: Front, scorer: str, selection: str) -> None:
    """Scores from one graph, top-k outside, the rest from the other: the P-step's own result, whatever the order of the indices."""
    predictor = make_predictor(dit[0]) if scorer == "predictor" else None
    steps = steps_of(dit, predictor, scorer=scorer, selection=selection, last_k=0, keep=((5, 0, 2),))
    graphs = engine_graphs(steps, ["sample"], "host")
    check_form(steps, graphs)
    full, cached = graphs
    assert full.scores is None and full.io.selects == ()
    assert cached.scores is not None and cached.io.selects == ((0, 5), (2, 2))
    assert [spec.name for spec in cached.scores.io.outputs] == ["scores_00", "scores_02"]
    assert not any(n.target is torch.topk for graph in (cached, cached.scores) for n in graph.module.graph.nodes)
    index = {spec.name: spec for spec in cached.io.inputs}["index_00"]
    assert index.shape == (1 if selection == "batch" or scorer == "random" else 4, 5) and index.dtype == torch.int64
    if scorer != "predictor":
        assert not list(cached.scores.module.parameters()), "scores that are read from a cache need no weights"
    compare(steps, graphs, inputs("dit"))


def test_the_host_has_nothing_to_select_where_nothing_is_kept(dit: Front) -> None:
    steps = steps_of(dit, ratio=1.0)
    graphs = engine_graphs(steps, ["sample"], "host")
    assert all(graph.scores is None and graph.io.selects == () for graph in graphs)
    compare(steps, graphs, inputs("dit"))


def test_an_unknown_place_to_select(dit: Front) -> None:
    with pytest.raises(ConfigError, match=r'selection=\'gpu\' was asked for; tokens are selected in the "graph" or on the "host"'):
        engine_graphs(steps_of(dit), ["sample"], "gpu")  # type: ignore[arg-type]


# --- names and outputs ----------------------------------------------------------------------------------------------


class NamedSample(ToyModel):
    """Its arguments have the names of its outputs."""

    def forward(self, sample: Tensor, t: Tensor, sample_out: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = super().forward(sample, t)
        return result + sample_out


class ReturnsInput(ToyModel):
    """Hands its input on, and its result twice."""

    def forward(self, x: Tensor, t: Tensor) -> Any:
        y: Tensor = super().forward(x, t)
        return y, x, y, x


class ReturnsWeight(ToyModel):
    """Hands a weight out."""

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return super().forward(x, t), self.outer.bias


class TakesStamps(ToyModel):
    """Has arguments with the names of a step's own inputs."""

    def forward(self, x: Tensor, t: Tensor, step: Tensor, stamps: Tensor, update_00_0: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = super().forward(x, t)
        return result * stamps + step * update_00_0


def toy_steps(model: nn.Module, given: Mapping[str, Any]) -> StepPrograms:
    return build_steps(model, given, CacheConfig(**RULES), None)


def test_outputs_with_the_name_of_an_input() -> None:
    x, t = toy_inputs().values()
    given = {"sample": x, "t": t, "sample_out": torch.ones(CHANNELS)}
    steps = toy_steps(NamedSample(), given)
    graphs = engine_graphs(steps, ["sample"])
    check_form(steps, graphs)
    assert graphs[1].io.outputs[0].name == "sample_out_out"
    compare(steps, graphs, given)


@pytest.mark.parametrize("make", [ReturnsInput, ReturnsWeight])
def test_outputs_that_are_no_tensors_of_their_own(make: type[ToyModel]) -> None:
    """An engine cannot bind one address twice: an input, a weight or a tensor that is returned twice is copied."""
    given = toy_inputs()
    steps = toy_steps(make(), given)
    graphs = engine_graphs(steps, [f"output_{i}" for i in range(steps.full.num_outputs)])
    check_form(steps, graphs)
    compare(steps, graphs, given)


def test_inputs_with_the_names_of_extras_and_caches() -> None:
    x, t = toy_inputs().values()
    given = {"x": x, "t": t, "step": torch.tensor(2.0), "stamps": torch.tensor(3.0), "update_00_0": torch.tensor(0.25)}
    model = TakesStamps()
    steps = build_steps(model, given, CacheConfig(**RULES | {"history": "full_steps"}), None)
    graphs = engine_graphs(steps, ["output"])
    check_form(steps, graphs)
    compare(steps, graphs, given)
    with torch.no_grad():
        values = [*given.values(), *steps.step_inputs(5, torch.device("cpu")), *steps.initial_caches(torch.device("cpu"))]
        assert torch.equal(by_hand(graphs[0], values)[0][0], model(**given))
