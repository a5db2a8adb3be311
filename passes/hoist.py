"""Hoist: what a P-step computes from its timestep and condition alone is cut off, so that one run of it serves many steps.

    step     (x, t, y, …) → …         modulation_l = linear(silu(embed(t, y)), W_l), or the text's keys = linear(y, K_l), in every block l
    ahead    (t, y) → modulation_1, keys_1 …
    step     (x, …, modulation_1, keys_1 …, …) → …

A P-step computes few tokens. To read the modulation's weights for one row a sample takes a tenth of its time (DiT-XL/2, float32 on a
CPU), and a text may have more rows than the tokens that are kept. A sampler's timesteps are known from its first step on, so ``ahead`` runs
for many of them at once: each weight is read once for all, and what the condition alone gives is computed once.

I-steps keep what they compute: many rows at once round otherwise than one, and an I-step is the model's own result bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from tokencache_compile.ir import HoistedStep, StepProgram
from tokencache_compile.passes.inline_regions import Place, inline_regions
from tokencache_compile.passes.regions import Region
from tokencache_compile.passes.step_graph import extra_inputs

_LINEAR = torch.ops.aten.linear.default


class _Depends(IntEnum):
    """What a value depends on: weights, the condition too, the timestep too, or the sample or the caches too."""

    CONSTANT = 0
    FIXED = 1
    TIMED = 2
    VARIES = 3


def _is_impure(node: Node) -> bool:
    return node.is_impure(impure_random=False)


def _early_linears(graph: Graph, inputs: Mapping[str, _Depends]) -> dict[Node, _Depends]:
    """The linears of nothing but the condition, or it and the timestep."""
    known: dict[Node, _Depends] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = inputs.get(str(node.target), _Depends.VARIES)
        elif isinstance(node.target, HigherOrderOperator) or node.is_impure():
            known[node] = _Depends.VARIES
        else:
            known[node] = max((known[n] for n in node.all_input_nodes), default=_Depends.CONSTANT)
    linears = graph.find_nodes(op="call_function", target=_LINEAR)
    return {node: known[node] for node in linears if known[node] in (_Depends.FIXED, _Depends.TIMED)}


def _region(step: StepProgram, name: str) -> GraphModule:
    region = step.module.get_submodule(name)
    assert isinstance(region, Region)
    return region.graph_module


def _without(graph: Graph, hoisted: Sequence[Node]) -> tuple[Graph, list[Node], list[int]]:
    """A copy of a region's graph that takes ``hoisted`` as further inputs.

    Returns:
        The copy, those of ``hoisted`` that it reads, and the positions of the inputs that it still reads.
    """
    copy, given = Graph(), graph.find_nodes(op="placeholder")
    env = {node: copy.node_copy(node) for node in given}
    env |= {node: copy.placeholder(f"ahead_{node.name}") for node in hoisted}
    copy.output(copy.graph_copy(graph, env))
    copy.eliminate_dead_code(_is_impure)
    read = [node for node in hoisted if env[node].users]
    kept = [position for position, node in enumerate(given) if env[node].users]
    for node in (*given, *hoisted):
        if not env[node].users:
            copy.erase_node(env[node])
    copy.lint()
    return copy, read, kept


def _cut(module: GraphModule, outputs: Sequence[Node]) -> GraphModule:
    """The part of ``module`` that makes ``outputs``, without inputs that they do not need."""
    graph, env = Graph(), dict[Node, Node]()
    graph.graph_copy(module.graph, env)
    graph.output(tuple(env[node] for node in outputs))
    graph.eliminate_dead_code(_is_impure)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    return GraphModule(module, graph)


def run_ahead(module: GraphModule, inputs: Mapping[str, Tensor], timestep: str, timesteps: Tensor) -> tuple[Tensor, ...]:
    """The values [S, …] of an ``ahead`` graph for ``timesteps`` [S, …]; the other ``inputs`` are the same for all."""
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    given = [timesteps if name == timestep else inputs[name] for name in names]
    if timestep not in names:
        return tuple(value.expand(len(timesteps), *value.shape) for value in module(*given))
    values: tuple[Tensor, ...] = torch.vmap(module, tuple(0 if name == timestep else None for name in names))(*given)
    return values


def _shapes(module: GraphModule, inputs: Mapping[str, Tensor], timestep: str) -> list[torch.Size] | None:
    """Shapes of the values of ``module`` for one of two timesteps; None where it cannot be run for two."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        try:
            values = run_ahead(module, fake, timestep, torch.stack([fake[timestep]] * 2))
        except (RuntimeError, NotImplementedError):  # an operator that takes no further axis, or whose shapes depend on values
            return None
    return [value.shape[1:] for value in values]


def _rest(step: StepProgram, linears: Mapping[str, Sequence[Node]], around: Sequence[Node]) -> tuple[GraphModule, list[Place]]:
    """The step without the ``linears`` of its regions, by their names, and those ``around`` them: inputs between extras and caches.

    Returns:
        The step's graph, and which linear each of those inputs is.
    """
    source = step.module.graph
    given = source.find_nodes(op="placeholder")
    regions = {name: _without(_region(step, name).graph, own) for name, own in linears.items()}
    places: list[Place] = [(n, linear) for n in source.nodes if n.op == "call_module" for linear in regions[str(n.target)][1]]
    places += [(None, linear) for linear in around]
    graph, num_before = Graph(), len(step.input_names) + len(extra_inputs(step))
    env = {node: graph.node_copy(node) for node in given[:num_before]}
    ahead = {place: graph.placeholder(f"ahead_{number}") for number, place in enumerate(places)}
    env |= {linear: ahead[None, linear] for linear in around}
    env |= {node: graph.node_copy(node) for node in given[num_before:]}
    for node in source.nodes:
        if node.op == "call_module":
            _, read, kept = regions[str(node.target)]
            arguments = [env[node.args[position]] for position in kept]
            env[node] = graph.call_module(str(node.target), (*arguments, *(ahead[node, linear] for linear in read)))
        elif node.op == "output":
            graph.output(tuple(env[n] for n in node.args[0]))
        elif node not in env:
            env[node] = graph.node_copy(node, lambda n: env[n])
    module = GraphModule(step.module, graph)
    for name, (inner, _, _) in regions.items():
        setattr(module, name, Region(GraphModule(_region(step, name), inner)))
    graph.eliminate_dead_code()
    for place in [place for place in places if not ahead[place].users]:
        graph.erase_node(ahead[place])
        places.remove(place)
    graph.lint()
    return GraphModule(module, graph), places


def hoist(step: StepProgram, inputs: Mapping[str, Tensor], sample_inputs: Collection[str], timestep: str, batch: int) -> HoistedStep | None:
    """Cut ``step`` in two; None where nothing can be cut off.

    Args:
        inputs: the model's tensors of an example call, by name; only shapes and dtypes are read.
        sample_inputs: those of them that the sampler changes.
        timestep: the one that is the timestep.
        batch: samples. Values for each timestep have one row a sample, values for all have no more rows than columns; what would
            have more, and so take much of the memory that the weights take, is left in the step.
    """
    depends = {name: _Depends.VARIES if name in sample_inputs else _Depends.FIXED for name in inputs}
    depends[timestep] = _Depends.TIMED
    flat, copies = inline_regions(step.module)
    early = _early_linears(flat.graph, depends)
    shapes = _shapes(_cut(flat, list(early)), inputs, timestep) if early else None
    if shapes is None:
        return None
    small: set[Node] = set()
    for (node, when), (*rows, width) in zip(early.items(), shapes, strict=True):
        most = batch if when is _Depends.TIMED else width
        small |= {node} if math.prod(rows) <= most else set()
    calls = [node for node in step.module.graph.nodes if node.op == "call_module"]
    linears: dict[str, list[Node]] = {}
    for name in dict.fromkeys(str(call.target) for call in calls):
        own = _region(step, name).graph.find_nodes(op="call_function", target=_LINEAR)
        linears[name] = [node for node in own if all(copies[call, node] in small for call in calls if call.target == name)]
    around = [n for n in step.module.graph.find_nodes(op="call_function", target=_LINEAR) if copies[None, n] in small]
    module, places = _rest(step, linears, around)
    if not places:
        return None
    note = f"hoist: {len(places)} linears of timestep and condition are run ahead"
    ahead = _cut(flat, [copies[place] for place in places])
    return HoistedStep(ahead, timestep, replace(step, module=module, provenance=(*step.provenance, note)))
