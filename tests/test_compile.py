"""torch.compile: each distinct graph once, without a break, the results those of the eager graphs; cost follows distinct bodies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_run import assert_close, make_predictor, safe_run
from tiny import LAST_K, LAYERS, Model, build, call_of, conditions, ddim, inputs, sample, transformed
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from tokencache_compile import CacheConfig
from tokencache_compile.ir import StepProgram
from tokencache_compile.passes.regions import Region
from tokencache_compile.passes.step_graph import extra_inputs

STEPS = 6


@pytest.fixture(autouse=True)
def clean_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def compiled_graphs() -> int:
    """Graphs that torch.compile made since the test began. No break, or the step would have raised, and none is recorded."""
    assert not counters["graph_break"] and not counters["recompiles"]
    found: int = counters["stats"]["unique_graphs"]
    return found


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dit", {}),
        ("dit", {"context": "full", "forecast": 0, "history": "computed", "scorer": "predictor"}),
        ("pixart_masked", {"context": "cached", "forecast": 1, "history": "computed", "scorer": "change", "keep": ((3, 0, 3),)}),
    ],
)
def test_inductor(kind: str, settings: dict[str, Any]) -> None:
    """Two generations compile the I- and the P-step, once each; both are right, and the second has its own caches."""
    model = build(kind)
    predictor = make_predictor(model) if settings.get("scorer") == "predictor" else None
    config = CacheConfig(ratio=0.9, last_k=LAST_K, **settings)
    profiles = config.keep or ((2,) * (LAYERS - LAST_K),)
    seed, expected = safe_run(model, kind, config, profiles, predictor, STEPS)
    dispatcher = transformed(model, config=config, predictor=predictor, backend="inductor")
    eager = transformed(model, config=config, predictor=predictor)

    def generate(transformer: Model, seed: int) -> list[Tensor]:
        return ddim(call_of(transformer, conditions(kind)), sample(seed=seed), STEPS)

    first = generate(dispatcher, seed)
    assert compiled_graphs() == 2
    generate(dispatcher, seed + 100)
    again = generate(dispatcher, seed)
    assert compiled_graphs() == 2
    assert_close(first, generate(eager, seed), tolerance=1e-4)
    assert_close(first, expected, tolerance=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def regions(step: StepProgram) -> set[str]:
    return {name for name, module in step.module.named_children() if isinstance(module, Region)}


class CountingBackend:
    """Compiles nothing; notes the graphs it is given: attentions to compile, and calls of what is compiled already.

    Dynamo puts a region's first call into the graph itself; the others call a subgraph that is compiled once a name.
    """

    def __init__(self) -> None:
        self.attentions: list[int] = []
        self.calls: list[int] = []

    def __call__(self, module: GraphModule, _: Any) -> Any:
        invoked = [node for node in module.graph.nodes if node.target is torch.ops.higher_order.invoke_subgraph]
        distinct = {str(node.args[1]): getattr(module, node.args[0].target) for node in invoked}
        self.attentions.append(sum(count_attentions(graph) for graph in [module, *distinct.values()]))
        self.calls.append(len(invoked))
        return module.forward


def count_attentions(module: GraphModule) -> int:
    return sum("scaled_dot_product_attention" in str(node.target) for node in module.graph.nodes)


@pytest.mark.parametrize("kind", ["dit", "pixart_masked"])
def test_cost_follows_distinct_bodies(kind: str) -> None:
    """Twice the blocks: the same distinct regions for us, as much to compile for the compiler; only calls are more."""
    distinct, attentions, calls = [], [], []
    for layers in (4, 8):
        given = inputs(kind)
        steps = transformed(build(kind, layers), example_inputs=given).steps
        backend = CountingBackend()
        for step in (steps.full, *steps.cached):
            caches = [torch.full(spec.shape, spec.fill, dtype=spec.dtype) for spec in step.caches]
            extras = [torch.zeros(()) for _ in extra_inputs(step)]
            compiled: Any = torch.compile(step.module, backend=backend, fullgraph=True)
            with torch.no_grad():
                compiled(*(given[n] for n in step.input_names), *extras, *caches)
        assert compiled_graphs() == 2
        counters.clear()
        distinct.append([regions(step) for step in (steps.full, *steps.cached)])
        attentions.append(backend.attentions)
        calls.append(backend.calls)
    assert distinct[0] == distinct[1] == [{"body_0", "body_0_full"}, {"body_0", "body_0_cached_2"}]
    assert attentions[0] == attentions[1]
    assert [after - before for before, after in zip(*calls, strict=True)] == [4, 4]


def test_two_keep_counts_are_two_bodies() -> None:
    """A P-step has one region for each distinct count, whatever the number of blocks that keep as many."""
    keep = ((3, 5, 3, 5, 0, 5, 5),)
    steps = transformed(build("dit", 8), example_inputs=inputs("dit"), keep=keep).steps
    (cached,) = steps.cached
    assert regions(cached) == {"body_0", "body_0_cached_3", "body_0_cached_5"}
    assert regions(steps.full) == {"body_0", "body_0_full"}


def test_regions_of_one_signature_are_told_apart() -> None:
    """Two regions whose inputs have the same shapes, run several times in one frame, each stay what they are."""

    def region(operation: Any) -> Region:
        graph = torch.fx.Graph()
        graph.output((graph.call_function(operation, (graph.placeholder("x"),)),))
        return Region(GraphModule({}, graph))

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = region(torch.sin), region(torch.exp)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.second(self.first(x)[0])[0]
            return x

    x = torch.linspace(-1, 1, 8)
    with torch.no_grad():
        got = torch.compile(Both(), fullgraph=True)(x)
    torch.testing.assert_close(got, x.sin().exp().sin().exp())
