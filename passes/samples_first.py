"""Samples first: blocks whose streams have tokens first, [N, B, C], as blocks with samples first, [B, N, C].

The later passes know one layout. A body gets its tensors transposed and transposes them back, and the skeleton transposes them on
the way in and out; between two such blocks both are views, so nothing is copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from tokencache_compile.ir import BlockCall, BlockProgram, Body, Capture
from tokencache_compile.passes.analysis import SDPA, body_outputs, is_axis, mentions, placeholders, shape_of, stream_pairs
from tokencache_compile.passes.capture import BLOCK_OP
from tokencache_compile.passes.outline import block_call_index

aten = torch.ops.aten


def samples_first(program: BlockProgram, captured: Capture) -> tuple[BlockProgram, Capture]:
    """``program`` and ``captured`` with every stream as [B, N, C]."""
    first_of = {block.body: block.index for block in reversed(program.blocks)}
    swaps = [_swapped(body, captured.calls[first_of[number]]) for number, body in enumerate(program.bodies)]
    if not any(inputs for inputs, _ in swaps):
        return program, captured
    bodies = tuple(_transposed_body(body, *swap) if swap[0] else body for body, swap in zip(program.bodies, swaps, strict=True))
    swap_of = {block.index: swaps[block.body] for block in program.blocks}
    calls = tuple(_transposed_call(call, *swap_of[index]) for index, call in enumerate(captured.calls))
    skeleton = _transposed_skeleton(program.skeleton, swap_of)
    note = "samples_first: streams [N, B, C] transposed"
    program = replace(program, skeleton=skeleton, bodies=bodies, provenance=(*program.provenance, note))
    return program, replace(captured, skeleton=skeleton, calls=calls)


def _swapped(body: Body, call: BlockCall) -> tuple[set[int], set[int]]:
    """Positions of the inputs and outputs [N, B, …], if attention runs over the first axis of a stream."""
    inputs, outputs = placeholders(body), body_outputs(body)
    keys = [shape_of(n.args[1])[-2] for n in body.graph_module.graph.nodes if n.target is SDPA]
    for i, _ in stream_pairs(body, call):
        token, batch = shape_of(inputs[i])[:2]
        if not isinstance(token, SymInt) or not any(mentions(key, token) for key in keys):
            continue

        def is_swapped(node: Node, token: SymInt = token, batch: int | SymInt = batch) -> bool:
            shape = shape_of(node)
            return len(shape) > 1 and mentions(shape[0], token) and is_axis(shape[1], batch)

        return {p for p, n in enumerate(inputs) if is_swapped(n)}, {p for p, n in enumerate(outputs) if is_swapped(n)}
    return set(), set()


def _transpose(graph: Graph, node: Node, value: Tensor) -> Node:
    swapped = graph.call_function(aten.transpose.int, (node, 0, 1))
    swapped.meta["val"] = value.transpose(0, 1)
    return swapped


def _transposed_body(body: Body, inputs: set[int], outputs: set[int]) -> Body:
    graph = Graph()
    env: dict[Node, Node] = {}
    given = {node: position for position, node in enumerate(placeholders(body))}
    for node in body.graph_module.graph.nodes:
        if node.op == "output":
            results = [env[value] for value in body_outputs(body)]
            graph.output(tuple(_transpose(graph, r, r.meta["val"]) if p in outputs else r for p, r in enumerate(results)))
            continue
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
        if given.get(node) in inputs:
            env[node].meta["val"] = node.meta["val"].transpose(0, 1)
            back = _transpose(graph, env[node], env[node].meta["val"])
            env[node] = graph.call_function(aten.contiguous.default, (back,))
            env[node].meta["val"] = node.meta["val"]
    return replace(body, graph_module=GraphModule(body.graph_module, graph))


def _transposed_call(call: BlockCall, inputs: set[int], outputs: set[int]) -> BlockCall:
    return replace(call, leaves=_swap(call.leaves, inputs), outputs=_swap(call.outputs, outputs))


def _swap(leaves: tuple[Any, ...], positions: set[int]) -> tuple[Any, ...]:
    """``leaves`` with the tensors at ``positions`` (counted among tensors) transposed."""
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    places = {tensors[position] for position in positions}
    return tuple(leaf.transpose(0, 1) if place in places else leaf for place, leaf in enumerate(leaves))


def _transposed_skeleton(skeleton: GraphModule, swap_of: dict[int, tuple[set[int], set[int]]]) -> GraphModule:
    graph = Graph()
    env: dict[Node, Node] = {}
    for node in skeleton.graph.nodes:
        is_call = node.target is BLOCK_OP
        if is_call:
            swapped = swap_of[block_call_index(node)][0]
            given = [env[n] for n in node.args[0]]
            given = [_transpose(graph, n, n.meta["val"]) if p in swapped else n for p, n in enumerate(given)]
            env[node] = graph.call_function(BLOCK_OP, (given, node.args[1]))
            env[node].name = node.name
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
        caller = node.all_input_nodes[0] if node.all_input_nodes else None
        if not is_call and caller is not None and caller.target is BLOCK_OP and node.args[1] in swap_of[block_call_index(caller)][1]:
            env[node].meta["val"] = node.meta["val"].transpose(0, 1)
            env[node] = _transpose(graph, env[node], env[node].meta["val"])
    return GraphModule(skeleton, graph)
