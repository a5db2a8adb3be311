"""Outline: export each *distinct* block once, with a symbolic token count, and bind every block to its structure.

Blocks are of one structure when their modules agree in classes, simple attributes and weight shapes, and when they are called
alike. ``verify.same_as_eager`` later runs the whole program against the eager model, so that a wrong guess cannot pass.
"""

from __future__ import annotations

import json
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import Block, BlockCall, BlockProgram, Body, Capture
from tokencache_compile.passes.block_export import export_block, export_counting, structure
from tokencache_compile.passes.capture import BLOCK_OP, drop_checks, lifted_names


def structure_key(call: BlockCall) -> tuple[Any, ...]:
    """Equal for two calls whose blocks run the same code on tensors of the same shapes."""
    leaves = tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else repr(v) for v in call.leaves)
    return *structure(call.module), leaves, str(call.in_spec), str(call.out_spec)


def _body(name: str, call: BlockCall) -> Body:
    """The block as a graph ``(*weights, *tensor inputs) -> tensor outputs``."""
    return _body_of(name, call, export_block(call))


def counting_body(body: Body, call: BlockCall, stream: int, tokens: int) -> Body:
    """``body`` anew, where the block is told how many ``tokens`` it has; else as it is. See :func:`export_counting`."""
    exported = export_counting(call, stream, tokens)
    return body if exported is None else _body_of(body.name, call, exported)


def _body_of(name: str, call: BlockCall, exported: torch.export.ExportedProgram) -> Body:
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in exported.graph_signature.output_specs) or _writes_to_inputs(exported.graph):
        raise UnsupportedModelError(
            call.fqn, "the block changes its inputs or buffers in place", "A cached block must be a function of its inputs."
        )
    if not _without_writes(exported.graph):
        exported = exported.run_decompositions({})
    lifted = lifted_names(exported)
    graph = Graph()
    root: dict[str, Any] = {}
    env: dict[Node, Node] = {}
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    weights = [n for n in placeholders if n.name in lifted and lifted[n.name][0] in (InputKind.PARAMETER, InputKind.BUFFER) and n.users]
    inputs = [n for n in placeholders if n.name not in lifted and isinstance(n.meta.get("val"), Tensor)]
    for node in (*weights, *inputs):
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in lifted and node.users and node not in env:
                target = lifted[node.name][1]
                root[target] = exported.constants[target]
                env[node] = graph.get_attr(target)
                env[node].meta = dict(node.meta)
        elif node.op == "output":
            graph.output(tuple(_own(graph, env[value]) for value in node.args[0] if isinstance(value, Node)))
        elif _is_inactive_dropout(node) or _is_cast_to_own_dtype(node):
            env[node] = env[node.args[0]]
        elif node.target is torch.ops.aten.type_as.default:  # reads no more of the other tensor than its dtype, and is not to wait for it
            value, dtype = env[node.args[0]], node.meta["val"].dtype
            env[node] = value if value.meta["val"].dtype == dtype else graph.call_function(torch.ops.aten.to.dtype, (value, dtype))
            env[node].meta = env[node].meta or dict(node.meta)
        else:
            if node.op == "get_attr":  # the graph within an autocast region
                root[node.target] = getattr(exported.graph_module, node.target)
            env[node] = graph.node_copy(node, lambda n: env[n])
    drop_checks(graph)
    graph.eliminate_dead_code()
    graph_module = GraphModule(root, graph)
    names = tuple(lifted[node.name][1] for node in weights)
    return Body(name, graph_module, names, len(inputs), len(call.output_tensors))


def _own(graph: Graph, value: Node) -> Node:
    """``value``, or a copy of it where it is an input that the block hands through: a region returns none of its inputs."""
    if value.op != "placeholder":
        return value
    copy = graph.call_function(torch.ops.aten.clone.default, (value,))
    copy.meta = dict(value.meta)
    return copy


def _without_writes(graph: Graph) -> bool:
    """Give in-place operations their pure form, where nothing else reads what they write to; whether none is left.

    The passes follow values and copy operations, so an addition in place (torchao's linears) would be done twice on one tensor.
    """
    clean = True
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            pure = getattr(torch.ops.aten, node.target._opname.rstrip("_"), None)
            overload = getattr(pure, node.target._overloadname, None)
            if overload is not None and _is_own(node.args[0]) and len({n.meta["val"].dtype for n in node.all_input_nodes}) == 1:
                node.target = overload
            else:
                clean = False
    return clean


def _is_own(node: Node) -> bool:
    """Whether nothing but the one reader of ``node`` reads the memory it lies in."""
    while len(node.users) == 1 and isinstance(node.target, torch._ops.OpOverload):
        if not any(argument.alias_info for argument in node.target._schema.arguments):
            return True
        node = node.args[0]  # type: ignore[assignment]
    return False


def _writes_to_inputs(graph: Graph) -> bool:
    """Whether an operation writes to a placeholder (weight, buffer or input), or to a view of one."""
    shared: set[Node] = {node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if node.target is operator.getitem and node.args[0] in shared:
            shared.add(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for parameter, value in zip(node.target._schema.arguments, node.args, strict=False):
            if isinstance(value, Node) and value in shared and parameter.alias_info is not None:
                if parameter.alias_info.is_write:
                    return True
                if node.target is not torch.ops.aten.to.dtype or _is_cast_to_own_dtype(node):
                    shared.add(node)
    return False


def _is_inactive_dropout(node: Node) -> bool:
    return node.target is torch.ops.aten.dropout.default and not node.args[2]


def _is_cast_to_own_dtype(node: Node) -> bool:
    """``x.to(x.dtype)`` returns ``x`` itself."""
    return node.target is torch.ops.aten.to.dtype and node.args[0].meta["val"].dtype == node.args[1] and not any(node.args[2:])  # type: ignore[union-attr]


def block_call_index(node: Node) -> int:
    """Which block a block-call node of a skeleton stands for."""
    return int(json.loads(str(node.args[1]))["block"])


def outline(captured: Capture, model: nn.Module) -> BlockProgram:
    """Split a capture into the skeleton, its distinct bodies and the blocks that use them.

    Raises:
        UnsupportedModelError: a block cannot be exported with a free token count.
    """
    nodes = {block_call_index(n): n for n in captured.skeleton.graph.nodes if n.target is BLOCK_OP}
    keys: dict[tuple[Any, ...], int] = {}
    bodies: list[Body] = []
    blocks: list[Block] = []
    for index, call in enumerate(captured.calls):
        key = structure_key(call)
        if key not in keys:
            keys[key] = len(bodies)
            bodies.append(_body(f"body_{len(bodies)}", call))
        blocks.append(Block(index, call.fqn, keys[key], nodes[index].name))
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    note = f"outline: {len(blocks)} blocks of {len(bodies)} structure(s)"
    program = BlockProgram(captured.skeleton, tuple(bodies), tuple(blocks), tensors, captured.input_names)
    return replace(program, provenance=(f"capture: {len(captured.calls)} block calls", note))
