"""Engine graph: a step program as an engine outside torch runs it, with names for all that goes in and out.

    program   (x, t, step, update_00_0, update_00_1)  ->  (sample, new, update_00_0)        an I-step
    engine    (x, t)                                  ->  (sample, next_update_00_0)
              next caches:  update_00_0 ← next_update_00_0,  update_00_1 ← update_00_0

Inputs that nothing reads fall away, and a cache that is only handed on is no output: an engine copies nothing it need not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode, UnsupportedOperatorException
from torch.fx import Graph, GraphModule, Interpreter, Node

from tokencache_compile.errors import ConfigError, ExportError
from tokencache_compile.ir import EngineGraph, StepIO, StepProgram, TensorSpec
from tokencache_compile.passes.drop_squeezes import drop_squeezes
from tokencache_compile.passes.inline_regions import inline_regions
from tokencache_compile.passes.logical_fills import logical_fills
from tokencache_compile.passes.pipeline import StepPrograms
from tokencache_compile.passes.real_tables import real_tables
from tokencache_compile.passes.step_graph import extra_inputs

SelectionPlace = Literal["graph", "host"]


def engine_graphs(steps: StepPrograms, output_names: Sequence[str], selection: SelectionPlace = "graph") -> list[EngineGraph]:
    """The I-step and then each P-step.

    Args:
        output_names: of the model's outputs.
        selection: who takes the top-k: the P-``graph`` itself, or the ``host``, from whom it then gets indices.

    Raises:
        ConfigError: ``selection`` is neither.
        ExportError: a shape in a step depends on values, or the host's scores on tokens that it has yet to select.
    """
    if selection not in get_args(SelectionPlace):
        raise ConfigError(f'selection={selection!r} was asked for; tokens are selected in the "graph" or on the "host".')
    if selection == "host" and steps.plan.config.scorer == "tome":
        raise ExportError(
            'selection="host" was asked for with scorer="tome", which scores a block\'s tokens once the blocks before it have run. '
            'Use selection="graph", or scorer="random" or another.'
        )
    return [_engine_graph(steps, step, output_names, selection) for step in (steps.full, *steps.cached)]


def _argument_specs(steps: StepPrograms, step: StepProgram) -> dict[str, TensorSpec]:
    """Every input of a step program, in order: the model's own tensors, the extras, the caches."""
    values = [node.meta["val"] for node in steps.program.skeleton.graph.nodes if node.op == "placeholder"]
    given = [TensorSpec(name, tuple(map(int, v.shape)), v.dtype) for name, v in zip(step.input_names, values, strict=True)]
    extras = [TensorSpec(n, steps.random_shape if n == "random_scores" else (), torch.float32) for n in extra_inputs(step)]
    caches = [TensorSpec(cache.name, cache.shape, cache.dtype) for cache in step.caches]
    return {spec.name: spec for spec in (*given, *extras, *caches)}


def _engine_graph(steps: StepPrograms, step: StepProgram, output_names: Sequence[str], selection: SelectionPlace) -> EngineGraph:
    specs = _argument_specs(steps, step)
    arguments, device = tuple(specs), steps.program.known_stream.device
    flat, _ = inline_regions(step.module)
    scores = None
    selects: tuple[tuple[int, int], ...] = ()
    if selection == "host" and any(step.keep):
        selects = tuple((block, kept) for block, kept in enumerate(step.keep) if kept)
        found = _take_selection(flat.graph, [block for block, _ in selects])
        scores_io = StepIO(step.kind, step.keep, arguments, (), (), len(found), ())
        scores = _cut(flat, {f"scores_{block:02d}": node for block, node in found.items()}, specs, scores_io, device)
        for (block, kept), rows in zip(selects, scores.io.outputs, strict=True):
            specs[f"index_{block:02d}"] = TensorSpec(f"index_{block:02d}", (rows.shape[0], kept), torch.int64)
    results: Sequence[Node] = flat.graph.output_node().args[0]  # type: ignore[assignment]
    outputs: dict[str, Node] = {}
    for name, node in zip(output_names, results[: step.num_outputs], strict=True):
        while name in specs or name in outputs:
            name += "_out"
        outputs[name] = node
    next_caches = []
    for cache, node in zip(step.caches, results[step.num_outputs :], strict=True):
        if node.op != "placeholder":
            outputs[f"next_{cache.name}"] = node
        next_caches.append(str(node.target) if node.op == "placeholder" else f"next_{cache.name}")
    io = StepIO(step.kind, step.keep, arguments, (), (), step.num_outputs, tuple(next_caches), selects)
    cut = _cut(flat, outputs, specs, io, device)
    return EngineGraph(cut.io, cut.module, scores)


def _take_selection(graph: Graph, blocks: Sequence[int]) -> dict[int, Node]:
    """Give each block's selected indices an input of their own, ``index_<block>``; returns the nodes of the scores they came from."""
    topks = list(graph.find_nodes(op="call_function", target=torch.topk))
    last_input = [n for n in graph.nodes if n.op == "placeholder"][-1]
    found: dict[int, Node] = {}
    for block, topk in zip(blocks, topks, strict=True):
        (indices,) = topk.users
        with graph.inserting_after(last_input):
            last_input = graph.placeholder(f"index_{block:02d}")
        indices.replace_all_uses_with(last_input)
        found[block] = topk.args[0]
    return found


class _Shapes(Interpreter):
    """Notes every node's value, a fake tensor, in ``meta["val"]``."""

    def run_node(self, n: Node) -> Any:
        value = n.meta["val"] = super().run_node(n)
        return value


def _cut(
    module: GraphModule, outputs: Mapping[str, Node], specs: Mapping[str, TensorSpec], io: StepIO, device: torch.device
) -> EngineGraph:
    """The part of ``module`` that computes ``outputs``: inputs that nothing reads fall away."""
    graph = Graph()
    env: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op != "output":
            env[node] = graph.node_copy(node, lambda n: env[n])
    seen: set[Node] = set()
    results = []
    for node in outputs.values():  # an engine's output is a tensor of its own: no input, no weight, and no other output
        own = node.op not in ("placeholder", "get_attr") and node not in seen
        mine = env[node] if own else graph.call_function(torch.clone, (env[node],))
        seen.add(node)
        results.append(mine)
    graph.output(tuple(results))
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
        graph.erase_node(node)
    cut = GraphModule(module, graph)
    cut.graph.lint()
    inputs = tuple(specs[str(n.target)] for n in graph.nodes if n.op == "placeholder")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            values = _Shapes(cut).run(*(torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in inputs))
        except (DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise ExportError(
                f"shapes in the {io.kind}-step depend on the values of its inputs, at {error.func}: an engine needs them fixed. "
                "Use the model in torch, or a variant of it whose masks do not select rows."
            ) from error
    drop_squeezes(cut.graph)
    logical_fills(cut.graph)
    real_tables(cut)
    cut.recompile()
    computed = tuple(TensorSpec(name, tuple(map(int, v.shape)), v.dtype) for name, v in zip(outputs, values, strict=True))
    return EngineGraph(replace(io, inputs=inputs, outputs=computed), cut)
