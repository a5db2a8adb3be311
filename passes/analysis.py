"""Analyse: which input of a body is the token stream, which axis counts its tokens, what gathers along with it.

The symbols of the export say it (the axes of a body's inputs are free, and the arithmetic makes some equal); a permutation
test then confirms it: permuting the tokens of the stream and of every per-token side input must permute the output.

Declined, each with its reason: a block whose token count is fixed (a convolution or a view over the grid), one whose
arithmetic needs particular counts, one that returns several streams, one that depends on token positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import Attention, BlockCall, BlockProgram, Body, Capture, Roles, SideInput, Stream

SDPA = torch.ops.aten.scaled_dot_product_attention.default
_TRUNK_OPS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.to.dtype, torch.ops.aten.clone.default)


def placeholders(body: Body) -> list[Node]:
    """The input nodes of a body that are not weights."""
    return [n for n in body.graph_module.graph.nodes if n.op == "placeholder"][len(body.weight_names) :]


def _shape(node: Node) -> tuple[int | SymInt, ...]:
    """Sizes of a node's value; an axis that the block fixed is an int, a free one a symbol."""
    sizes = node.meta["val"].shape
    return tuple(size if isinstance(size, SymInt) and size.node.expr.free_symbols else int(size) for size in sizes)


def _is(axis: int | SymInt, symbol: SymInt) -> bool:
    return isinstance(axis, SymInt) and axis.node.expr == symbol.node.expr


def _mentions(axis: int | SymInt, symbol: SymInt) -> bool:
    return isinstance(axis, SymInt) and bool(symbol.node.expr.free_symbols & axis.node.expr.free_symbols)


def _on_trunk(output: Node) -> set[Node]:
    """The inputs reached from ``output`` through residual additions alone."""
    seen: set[Node] = set()
    todo = [output]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _TRUNK_OPS:
            todo += [n for n in node.args if isinstance(n, Node)]
    return {node for node in seen if node.op == "placeholder"}


def _stream(body: Body, call: BlockCall) -> tuple[int, int]:
    """Positions of the stream among the body's inputs and outputs."""
    inputs = placeholders(body)
    outputs: tuple[Node, ...] = body.graph_module.graph.output_node().args[0]  # type: ignore[assignment]
    pairs = [
        (i, o)
        for o, out in enumerate(call.output_tensors)
        for i, tensor in enumerate(call.tensors)
        if tensor.shape == out.shape and tensor.dtype == out.dtype and out.is_floating_point() and out.dim() >= 3
    ]
    trunk = [(i, o) for i, o in pairs if inputs[i] in _on_trunk(outputs[o])]
    found = trunk or pairs
    if len(found) != 1 or len(outputs) != 1:
        shapes = ", ".join(str(tuple(out.shape)) for out in call.output_tensors)
        raise UnsupportedModelError(
            call.fqn,
            f"one residual token stream was looked for and the block has {len(found)} in {len(outputs)} outputs ({shapes})",
            "Models with several streams are not supported.",
        )
    return found[0]


def _attentions(body: Body, token: SymInt) -> tuple[Attention, ...]:
    """The self-attentions over the stream's tokens, with the node that leaves each one's module."""
    found = []
    for node in body.graph_module.graph.nodes:
        if node.target is not SDPA:
            continue
        query, key = node.args[0], node.args[1]
        if not (_mentions(_shape(query)[-2], token) and _mentions(_shape(key)[-2], token)):
            continue
        module = list(node.meta["nn_module_stack"].values())[-1][0]
        inside = [n for n in body.graph_module.graph.nodes if _within(n, module)]
        leaving = [n for n in inside if any(not _within(user, module) for user in n.users) and isinstance(n.meta.get("val"), Tensor)]
        found.append(Attention(node.name, leaving[-1].name))
    return tuple(found)


def _within(node: Node, module: str) -> bool:
    return any(entry[0] == module for entry in node.meta.get("nn_module_stack", {}).values())


def analyse_body(body: Body, call: BlockCall) -> Body:
    """Find the roles of one body's inputs; see the module's docstring for what is declined."""
    stream_input, stream_output = _stream(body, call)
    inputs = placeholders(body)
    stream = inputs[stream_input]
    shape = _shape(stream)
    free = [axis for axis in range(1, len(shape)) if isinstance(shape[axis], SymInt)]
    if len(shape) != 3 or free != [1]:
        raise UnsupportedModelError(
            call.fqn,
            f"its stream has shape {tuple(call.tensors[stream_input].shape)} and the free axes of the exported block are {free}, not [1]",
            "The block fixes its token count (a convolution or a view over the grid), so tokens cannot be dropped.",
        )
    token = shape[1]
    assert isinstance(token, SymInt)
    env = token.node.shape_env
    bounds = env.var_to_range.get(token.node.expr) if token.node.expr.is_Symbol else None
    if bounds is None or bounds.lower > 2 or not bool(bounds.upper > 2**20):
        raise UnsupportedModelError(
            call.fqn, f"its token count is bound to {token.node.expr} in {bounds}", "The block depends on the token count."
        )
    sides = []
    for position, node in enumerate(inputs):
        axes = [axis for axis, size in enumerate(_shape(node)) if _mentions(size, token)]
        if position == stream_input or not axes:
            continue
        if len(axes) > 1 or not _is(_shape(node)[axes[0]], token):
            raise UnsupportedModelError(
                call.fqn,
                f"its input {node.name} {tuple(call.tensors[position].shape)} mixes tokens with another axis",
                "Masks between tokens are not supported.",
            )
        batched = axes[0] > 0 and call.tensors[position].shape[0] == call.tensors[stream_input].shape[0]
        sides.append(SideInput(position, axes[0], batched))
    roles = Roles(stream_input, stream_output, 1, tuple(sides), _attentions(body, token))
    analysed = replace(body, roles=roles)
    if not call.tensors[stream_input].is_meta:
        _permutation_test(analysed, call)
    return analysed


def _permutation_test(body: Body, call: BlockCall) -> None:
    """Permuting tokens must permute the output. Side inputs get random values: constant ones would prove nothing."""
    roles = body.known_roles
    draw = torch.Generator().manual_seed(0)
    tensors = list(call.tensors)
    tokens = tensors[roles.stream_input].shape[1]
    order = torch.randperm(tokens, generator=draw)
    axes = {roles.stream_input: 1} | {side.position: side.token_dim for side in roles.side_inputs}
    for position in axes:
        t = tensors[position]
        if t.is_floating_point():
            tensors[position] = torch.randn(t.shape, generator=draw).to(t)
    weights = [
        call.module.get_parameter(n) if n in dict(call.module.named_parameters()) else call.module.get_buffer(n) for n in body.weight_names
    ]
    permuted = [t.index_select(axes[i], order.to(t.device)) if i in axes else t for i, t in enumerate(tensors)]
    with torch.no_grad():
        plain = body.graph_module(*weights, *tensors)[roles.stream_output]
        moved = body.graph_module(*weights, *permuted)[roles.stream_output]
    expected = plain.index_select(1, order.to(plain.device)).float()
    tolerance = 1e-3 if plain.dtype == torch.float32 else 5e-2
    difference = (moved.float() - expected).norm() / (
        expected - tensors[roles.stream_input].index_select(1, order.to(plain.device)).float()
    ).norm().clamp_min(1e-6)
    if not bool(difference < tolerance) and not torch.allclose(moved.float(), expected, atol=1e-5):
        raise UnsupportedModelError(
            call.fqn,
            f"permuting its tokens changes its output (relative {float(difference):.1e}), so it depends on positions",
            "Such blocks cannot gather tokens.",
        )


def analyse(program: BlockProgram, captured: Capture) -> BlockProgram:
    """Give every body its roles, and the program its stream."""
    bodies = []
    for index, body in enumerate(program.bodies):
        call = next(captured.calls[block.index] for block in program.blocks if block.body == index)
        bodies.append(analyse_body(body, call))
    streams = {captured.calls[b.index].tensors[bodies[b.body].known_roles.stream_input].shape for b in program.blocks}
    if len(streams) != 1:
        raise UnsupportedModelError(
            "the model", f"its blocks carry streams of different shapes: {sorted(map(tuple, streams))}", "One token count is needed."
        )
    first = captured.calls[0].tensors[bodies[program.blocks[0].body].known_roles.stream_input]
    batch, tokens, channels = first.shape
    stream = Stream(batch, tokens, channels, first.dtype, first.device)
    note = f"analyse: stream [{stream.batch}, {stream.tokens}, {stream.channels}] {stream.dtype}, " + "; ".join(
        f"{b.name}: {len(b.known_roles.attentions)} self-attention(s), {len(b.known_roles.side_inputs)} per-token side input(s)"
        for b in bodies
    )
    return replace(program, bodies=tuple(bodies), stream=stream, provenance=(*program.provenance, note))
