"""Analyse: which inputs of a body are streams, which one's tokens are cached, where they stand on an axis, what gathers along.

Four steps, none of which knows a class of models:

1. *Pairs*: the symbols of the export say which output continues which input (the axes are free, and the arithmetic makes some
   equal); residual additions break ties.
2. *Cached tokens*: the skeleton is run with every block as the identity on its pairs, twice, the second time on another sample.
   The rows that change are made from the sample: the image's, whether they are a stream of their own or stand beside text.
3. *Layouts*: a body is run twice without its attentions, the second time with other cached tokens. The keys that change are
   theirs: joint attention has the text's before or behind them.
4. A *permutation test* confirms it: permuting the cached tokens and every per-token side input permutes the cached stream's
   output and leaves the others alone.

Declined, each with its reason: a block whose token count is fixed (a convolution or a view over the grid), one whose
arithmetic needs particular counts, one whose outputs are not all streams, one that depends on token positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Interpreter, Node

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import (
    Attention,
    Block,
    BlockCall,
    BlockProgram,
    Body,
    Capture,
    Companion,
    Layout,
    ModuleOutput,
    Roles,
    SideInput,
    Stream,
)
from tokencache_compile.opaque_modules import ON_GRID
from tokencache_compile.passes.capture import BLOCK_OP, disturbed
from tokencache_compile.passes.outline import block_call_index, counting_body
from tokencache_compile.passes.rounding import agree, leap_of, relative
from tokencache_compile.passes.token_grid import image_grid

SDPA = torch.ops.aten.scaled_dot_product_attention.default
_TRUNK_OPS = (
    torch.ops.aten.add.Tensor,
    torch.ops.aten.add_.Tensor,
    torch.ops.aten.to.dtype,
    torch.ops.aten.clone.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.transpose.int,
    torch.ops.aten.contiguous.default,
)


def placeholders(body: Body) -> list[Node]:
    """The input nodes of a body that are not weights."""
    return [n for n in body.graph_module.graph.nodes if n.op == "placeholder"][len(body.weight_names) :]


def body_outputs(body: Body) -> tuple[Node, ...]:
    """The nodes of a body's outputs."""
    outputs: tuple[Node, ...] = body.graph_module.graph.output_node().args[0]  # type: ignore[assignment]
    return outputs


def attention_mask(node: Node) -> Node | None:
    """The mask of an attention call."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, Node) else None


def _is_causal(node: Node) -> bool:
    """Whether an attention call is: its queries see the keys up to their own position."""
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))


def per_token_nodes(body: Body) -> set[Node]:
    """The nodes of a body that are made from its cached stream, or from what gathers with it."""
    roles, inputs = body.known_roles, placeholders(body)
    found = {inputs[roles.stream_input], *(inputs[side.position] for side in roles.side_inputs)}
    for node in body.graph_module.graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def shape_of(node: Node) -> tuple[int | SymInt, ...]:
    """Sizes of a node's value; an axis that the block fixed is an int, a free one a symbol."""
    sizes = node.meta["val"].shape
    return tuple(size if isinstance(size, SymInt) and size.node.expr.free_symbols else int(size) for size in sizes)


def is_axis(axis: int | SymInt, other: int | SymInt) -> bool:
    """Whether two axes have one length whatever the sizes."""
    if isinstance(axis, SymInt) and isinstance(other, SymInt):
        return bool(axis.node.expr == other.node.expr)
    return not isinstance(axis, SymInt) and not isinstance(other, SymInt) and axis == other


def mentions(axis: int | SymInt, symbol: SymInt) -> bool:
    """Whether an axis's length follows from ``symbol``."""
    return isinstance(axis, SymInt) and bool(symbol.node.expr.free_symbols & axis.node.expr.free_symbols)


# -- 1: pairs -------------------------------------------------------------------------------------------------------------


def _on_trunk(output: Node) -> set[Node]:
    """The inputs reached from ``output`` through residual additions, and the cutting and joining of streams, alone."""
    seen: set[Node] = set()
    todo = [output]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is torch.ops.aten.cat.default:
            todo += [n for n in node.all_input_nodes]
        elif node.target in _TRUNK_OPS:
            todo += [n for n in node.args if isinstance(n, Node)]
    return {node for node in seen if node.op == "placeholder"}


def stream_pairs(body: Body, call: BlockCall) -> tuple[tuple[int, int], ...]:
    """(input, output) positions of the streams of a body, each input and output in one pair at most.

    Equal symbols count most, then residual additions, then the order of the arguments.
    """
    inputs, outputs = placeholders(body), body_outputs(body)
    found: list[tuple[bool, bool, int, int]] = []
    for o, out in enumerate(call.output_tensors):
        trunk = _on_trunk(outputs[o])
        for i, tensor in enumerate(call.tensors):
            if tensor.shape == out.shape and tensor.dtype == out.dtype and out.is_floating_point() and out.dim() >= 3:
                symbols = all(is_axis(a, b) for a, b in zip(shape_of(inputs[i]), shape_of(outputs[o]), strict=True))
                found.append((not symbols, inputs[i] not in trunk, i, o))
    pairs: list[tuple[int, int]] = []
    for _, _, i, o in sorted(found):
        if all(i != taken and o != given for taken, given in pairs):
            pairs.append((i, o))
    return tuple(sorted(pairs))


# -- 2: cached tokens -----------------------------------------------------------------------------------------------------


class _BlocksAsIdentity(Interpreter):
    """Runs a skeleton whose blocks hand their streams on as they are; keeps what every block was given."""

    def __init__(self, program: BlockProgram, captured: Capture, pairs: Sequence[Sequence[tuple[int, int]]]) -> None:
        super().__init__(program.skeleton)
        self.program, self.captured, self.pairs = program, captured, pairs
        self.given: dict[int, list[Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is not BLOCK_OP:
            return super().run_node(n)
        block = self.program.blocks[block_call_index(n)]
        tensors: list[Tensor] = self.fetch_args_kwargs_from_env(n)[0][0]
        self.given[block.index] = tensors
        results = [torch.zeros_like(out) for out in self.captured.calls[block.index].output_tensors]
        for i, o in self.pairs[block.body]:
            results[o] = tensors[i]
        return results


def _changed(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """Which rows of ``axis`` differ."""
    differs = torch.nan_to_num(first) != torch.nan_to_num(second)
    return differs.movedim(axis, 0).flatten(1).any(1)


@dataclass(frozen=True)
class _Place:
    """Where a block's cached tokens are: the pair of its stream, and the stream's layout."""

    pair: tuple[int, int]
    layout: Layout
    tokens: int


def _interval(rows: Tensor) -> tuple[Layout, int] | None:
    """Layout and length of the marked rows, if they stand together."""
    marked = rows.nonzero().flatten().tolist()
    if not marked or marked[-1] - marked[0] + 1 != len(marked):
        return None
    return Layout(marked[0], len(rows) - 1 - marked[-1]), len(marked)


def _only_stream(block: Block, call: BlockCall, pairs: Sequence[tuple[int, int]]) -> _Place:
    if len(pairs) > 1:
        raise UnsupportedModelError(
            block.fqn, "its streams are told apart by values, and a model on the meta device has none", "Build the model on the CPU."
        )
    return _Place(pairs[0], Layout(), call.tensors[pairs[0][0]].shape[1])


def _places(program: BlockProgram, captured: Capture, pairs: Sequence[Sequence[tuple[int, int]]]) -> list[_Place]:
    """Every block's cached tokens; of several streams made from the sample the longest counts.

    On the meta device there are no values to tell them by: there a block must have one stream, and all of it is taken.
    """
    if any(call.tensors[pairs[block.body][0][0]].is_meta for block, call in zip(program.blocks, captured.calls, strict=True)):
        return [_only_stream(block, call, pairs[block.body]) for block, call in zip(program.blocks, captured.calls, strict=True)]
    runs = []
    for inputs in (captured.example_inputs, disturbed(captured.example_inputs, captured.sample_inputs)):
        run = _BlocksAsIdentity(program, captured, pairs)
        with torch.no_grad():
            run.run(*inputs)
        runs.append(run.given)
    places = []
    for block in program.blocks:
        one, other = (run[block.index] for run in runs)
        rows = {pair: _changed(one[pair[0]], other[pair[0]], 1) for pair in pairs[block.body]}
        on_sample = {pair: int(r.sum()) for pair, r in rows.items() if bool(r.any())}
        if not on_sample:
            raise UnsupportedModelError(
                block.fqn,
                "none of the token streams that it returns is made from the model's first argument",
                "The tokens to cache are those of the sample.",
            )
        pair = max(on_sample, key=lambda p: on_sample[p])
        interval = _interval(rows[pair])
        if interval is None:
            raise UnsupportedModelError(
                block.fqn,
                f"the sample's tokens do not stand together in its stream {tuple(captured.calls[block.index].tensors[pair[0]].shape)}",
                "Tokens are gathered from one interval.",
            )
        places.append(_Place(pair, *interval))
    return places


# -- 3: layouts -----------------------------------------------------------------------------------------------------------


class _WithoutAttention(Interpreter):
    """Runs a body whose attentions give zeros, so that no token sees another.

    Keeps every attention's queries and keys, and the shapes of all values (where a mask's values decide them, no symbol tells).
    """

    def __init__(self, body: Body) -> None:
        super().__init__(body.graph_module)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is not SDPA:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                self.shapes[n.name] = value.shape
            return value
        query, key = self.fetch_args_kwargs_from_env(n)[0][:2]
        self.seen[n.name] = (query, key)
        out: Tensor = super().run_node(n)
        self.shapes[n.name] = out.shape
        return torch.zeros_like(out)  # with the strides that the views behind it rely on


@dataclass(frozen=True)
class _Probe:
    """Layouts of the queries and keys of every attention (None where no row, or no one interval, is the cached tokens'); all shapes."""

    layouts: Mapping[str, tuple[Layout | None, Layout | None]]
    shapes: Mapping[str, torch.Size]


def _probe(body: Body, call: BlockCall, place: _Place) -> _Probe:
    """Run a body twice, the second time with other cached tokens."""
    tensors = list(call.tensors)
    stream = tensors[place.pair[0]].clone()
    on_meta = stream.is_meta
    tokens = stream.narrow(1, place.layout.before, place.tokens)
    tokens.add_(torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens))
    runs = []
    for given in (tensors, [stream if i == place.pair[0] else t for i, t in enumerate(tensors)]):
        run = _WithoutAttention(body)
        with torch.no_grad():
            run.run(*_weights(body, call), *given)
        runs.append(run)
    layouts = {}
    for name, values in runs[0].seen.items():
        found = []
        for one, other in zip(values, runs[1].seen[name], strict=True):
            if on_meta:  # one stream, all of it: see _places
                found.append(Layout() if one.shape[-2] == place.tokens else None)
                continue
            interval = _interval(_changed(one, other, one.dim() - 2))
            found.append(interval[0] if interval is not None and interval[1] == place.tokens else None)
        layouts[name] = (found[0], found[1])
    return _Probe(layouts, runs[0].shapes)


def _weights(body: Body, call: BlockCall) -> list[Tensor]:
    parameters, buffers = dict(call.module.named_parameters()), dict(call.module.named_buffers())
    return [parameters[name] if name in parameters else buffers[name] for name in body.weight_names]


def _within(node: Node, module: str) -> bool:
    return any(entry[0] == module for entry in node.meta.get("nn_module_stack", {}).values())


def _reaches(node: Node, source: Node, without: set[Node]) -> bool:
    """Whether the values (not the sizes) of ``source`` reach ``node`` by a way around ``without``."""
    seen = set(without)
    todo = [node]
    while todo:
        node = todo.pop()
        if node is source:
            return True
        if node not in seen and isinstance(node.meta.get("val"), Tensor | list | tuple):
            seen.add(node)
            todo += node.all_input_nodes
    return False


def _leaving(body: Body, attention: Node, streams: Sequence[Node]) -> list[Node]:
    """What carries an attention's result out of its module; the attention itself where that also carries something else.

    The usual module gives one tensor (two in joint attention, text and image apart). One that also adds its input, gates by it
    or runs the MLP beside the attention would have all that cached along with it.
    """
    module = list(attention.meta["nn_module_stack"].values())[-1][0]
    result = {attention}
    for node in body.graph_module.graph.nodes:
        if not isinstance(node.meta.get("val"), SymInt) and any(n in result for n in node.all_input_nodes):
            result.add(node)
    leaving = [
        n
        for n in body.graph_module.graph.nodes
        if n in result and isinstance(n.meta.get("val"), Tensor) and _within(n, module) and any(not _within(u, module) for u in n.users)
    ]
    attentions = {n for n in body.graph_module.graph.nodes if n.target is SDPA and _within(n, module)}
    mixed = any(_reaches(node, stream, attentions) for node in leaving for stream in streams)
    whole = all(node.meta["val"].dim() == 3 for node in leaving)  # [B, N, C]; Lumina's module leaves the heads apart
    return leaving if whole and not mixed else [attention]


def _attention_outputs(
    body: Body, queries: Mapping[str, Layout | None], streams: Sequence[Node], token: SymInt, place: _Place, probe: _Probe
) -> tuple[ModuleOutput, ...]:
    """What the self-attentions give to the rest of the body, each once."""
    nodes = {n.name: n for n in body.graph_module.graph.nodes}
    stream_axis, batch = shape_of(streams[0])[1], probe.shapes[streams[0].name][0]
    found: dict[str, ModuleOutput] = {}
    for name, query_layout in queries.items():
        query = nodes[name].args[0]
        assert isinstance(query, Node)
        for node in _leaving(body, nodes[name], streams):
            axis = shape_of(node)[-2]
            layout: Layout | None = None
            if is_axis(axis, stream_axis):
                layout = place.layout
            elif is_axis(axis, shape_of(query)[-2]):
                layout = query_layout
            elif mentions(axis, token):
                raise UnsupportedModelError(
                    body.name, f"its attention leaves {node.name} with a token axis of {axis}", "Its tokens cannot be told apart."
                )
            shape = probe.shapes[node.name]
            found.setdefault(node.name, ModuleOutput(node.name, shape[-2], layout, shape[0] == batch))
    return tuple(found.values())


def _side_inputs(
    call: BlockCall, inputs: Sequence[Node], streams: Sequence[int], token: SymInt, place: _Place, keys: Sequence[Layout]
) -> tuple[SideInput, ...]:
    """The inputs beside the streams that have a token axis."""
    own = shape_of(inputs[place.pair[0]])[1]
    total = call.tensors[place.pair[0]].shape[1] - place.layout.others
    sides = []
    for position, node in enumerate(inputs):
        axes = [axis for axis, size in enumerate(shape_of(node)) if mentions(size, token)]
        if position in streams or not axes:
            continue
        sizes = {call.tensors[position].shape[axis] for axis in axes}
        layouts = [place.layout] if is_axis(shape_of(node)[axes[0]], own) else [k for k in keys if {k.others + total} == sizes]
        if len(axes) > 2 or len(sizes) > 1 or not layouts:
            raise UnsupportedModelError(
                call.fqn,
                f"its input {node.name} {tuple(call.tensors[position].shape)} mixes tokens with another axis",
                "Its rows cannot be told apart.",
            )
        batched = axes[0] > 0 and call.tensors[position].shape[0] == call.tensors[place.pair[0]].shape[0]
        sides.append(SideInput(position, axes[-1], batched, layouts[0], axes[0] if len(axes) > 1 else None))
    return tuple(sides)


def _bounds(token: SymInt) -> Any:
    """The range of token counts that a block was exported for; None where they are counts of a kind."""
    return token.node.shape_env.var_to_range.get(token.node.expr) if token.node.expr.is_Symbol else None


def analyse_body(body: Body, call: BlockCall, place: _Place, pairs: Sequence[tuple[int, int]]) -> Body:
    """Find the roles of one body's inputs; see the module's docstring for what is declined."""
    stream_input, stream_output = place.pair
    inputs, outputs = placeholders(body), body_outputs(body)
    shape = shape_of(inputs[stream_input])
    free = [axis for axis in range(1, len(shape)) if isinstance(shape[axis], SymInt)]
    if len(shape) != 3 or 1 not in free:
        raise UnsupportedModelError(
            call.fqn,
            f"its stream has shape {tuple(call.tensors[stream_input].shape)} and the free axes of the exported block are {free}, not [1]",
            "The block fixes its token count (a convolution or a view over the grid), so tokens cannot be dropped.",
        )
    token = shape[1]
    assert isinstance(token, SymInt)
    bounds = _bounds(token)
    if bounds is None or bounds.lower > 2 + place.layout.others or not bool(bounds.upper > 2**20):
        raise UnsupportedModelError(
            call.fqn, f"its token count is bound to {token.node.expr} in {bounds}", "The block depends on the token count."
        )
    attending = [n for n in body.graph_module.graph.nodes if n.target is SDPA]
    keys = [shape_of(n.args[1])[-2] for n in attending]
    if isinstance(shape[0], SymInt) and any(mentions(key, shape[0]) for key in keys):
        raise UnsupportedModelError(
            call.fqn,
            f"its attention runs over the first axis of its stream {tuple(call.tensors[stream_input].shape)}",
            "Its tokens cannot be gathered sample by sample.",
        )
    if any(_is_causal(n) and mentions(key, token) for n, key in zip(attending, keys, strict=True)):
        raise UnsupportedModelError(
            call.fqn,
            "its attention is causal: a token sees those before it alone, as in a model that writes one token after the other",
            "The tokens of a sample that is denoised see each other.",
        )
    companions = []
    for i, o in pairs:
        if (i, o) == place.pair:
            continue
        if any(mentions(axis, token) for axis in shape_of(outputs[o])):
            raise UnsupportedModelError(
                call.fqn, "it carries several streams of one token count", "One stream is cached, and others must have counts of their own."
            )
        companions.append(Companion(i, o, tuple(call.tensors[i].shape), call.tensors[i].dtype))
    probe = _probe(body, call, place)
    nodes = {n.name: n for n in body.graph_module.graph.nodes}
    attentions, queries = [], {}
    for name, (query, key) in probe.layouts.items():
        if not mentions(shape_of(nodes[name].args[1])[-2], token):
            continue  # cross-attention to what is not cached stays as it is
        if key is None:
            raise UnsupportedModelError(
                call.fqn, "the cached tokens do not stand together among the keys of its attention", "Its tokens cannot be told apart."
            )
        keys_node: Any = nodes[name].args[1]
        batch = call.tensors[stream_input].shape[0]
        mask = attention_mask(nodes[name])
        between = mask is not None and probe.shapes[mask.name][-2] > 1
        mask_rows = (query, probe.shapes[mask.name][0] == batch) if between and mask is not None and query is not None else None
        attentions.append(Attention(name, key, probe.shapes[keys_node.name][0] == batch, mask_rows))
        queries[name] = query
    positions = [stream_input, *(c.input for c in companions)]
    sides = _side_inputs(call, inputs, positions, token, place, [a.keys for a in attentions])
    per_token = [inputs[p] for p in positions]
    given = _attention_outputs(body, queries, per_token, token, place, probe)
    roles = Roles(stream_input, stream_output, 1, place.layout, tuple(companions), sides, tuple(attentions), given)
    analysed = replace(body, roles=roles)
    if not call.tensors[stream_input].is_meta:
        _permutation_test(analysed, call, place.tokens)
    return analysed


# -- 4: the permutation test ----------------------------------------------------------------------------------------------


class _WithoutGrid(Interpreter):
    """Runs a body whose tokens do not mix with their neighbours on the grid: that is what no permutation keeps."""

    def run_node(self, n: Node) -> Any:
        return self.fetch_args_kwargs_from_env(n)[0][0] if n.target is ON_GRID else super().run_node(n)


def _permutation_test(body: Body, call: BlockCall, tokens: int) -> None:
    """Permuting tokens must permute the output. Side inputs get random values: constant ones would prove nothing."""
    roles = body.known_roles
    draw = torch.Generator().manual_seed(0)
    tensors = list(call.tensors)
    device = tensors[roles.stream_input].device
    chosen = torch.randperm(tokens, generator=draw)

    def order(layout: Layout) -> Tensor:
        first, last = torch.arange(layout.before), torch.arange(layout.after) + layout.before + tokens
        return torch.cat([first, chosen + layout.before, last]).to(device)

    axes: dict[int, tuple[tuple[int, ...], Layout]] = {roles.stream_input: ((1,), roles.layout)}
    for side in roles.side_inputs:
        axes[side.position] = ((side.token_dim,) if side.other_dim is None else (side.token_dim, side.other_dim), side.layout)
    for position in axes:
        t = tensors[position]
        if t.is_floating_point() or t.is_complex():
            tensors[position] = torch.randn(t.shape, generator=draw, dtype=t.dtype if t.is_complex() else None).to(t)
    weights = _weights(body, call)
    permuted = list(tensors)
    for i, (dims, layout) in axes.items():
        for dim in dims:
            permuted[i] = permuted[i].index_select(dim, order(layout))
    with torch.no_grad():
        plain = _WithoutGrid(body.graph_module).run(*weights, *tensors)
        moved = _WithoutGrid(body.graph_module).run(*weights, *permuted)
    streams = [(roles.stream_input, roles.stream_output, order(roles.layout))]
    streams += [(c.input, c.output, torch.arange(c.shape[1], device=device)) for c in roles.companions]
    leap = partial(leap_of, body, weights, tensors)
    for i, o, rows in streams:
        expected, x = plain[o].index_select(1, rows), tensors[i].index_select(1, rows)
        if not agree(moved[o], expected, x, leap):
            raise UnsupportedModelError(
                call.fqn,
                f"permuting its tokens changes its output (relative {relative(moved[o], expected, x):.1e}), so it depends on positions",
                "Such blocks cannot gather tokens.",
            )


def _counting(body: Body, call: BlockCall, place: _Place) -> Body:
    """A body that holds for its own number of tokens only, as it was told that number, made anew for any."""
    token = shape_of(placeholders(body)[place.pair[0]])[1]
    bounds = _bounds(token) if isinstance(token, SymInt) else None
    free = bounds is not None and bounds.lower <= 2 + place.layout.others
    return body if free else counting_body(body, call, place.pair[0], place.tokens)


def _check_outputs(program: BlockProgram, block: Block, pairs: Sequence[tuple[int, int]]) -> None:
    """Refuse a block that gives something to others that continues none of its inputs: a skipped block could not give it."""
    node = next(n for n in program.skeleton.graph.nodes if n.name == block.node)
    for user in node.users:
        if user.users and user.args[1] not in {o for _, o in pairs}:
            raise UnsupportedModelError(
                block.fqn,
                f"its output {user.args[1]} {tuple(user.meta['val'].shape)} is used and continues none of its streams",
                "What a cached block returns must be streams that it was given.",
            )


def _grids(captured: Capture, places: Sequence[_Place]) -> list[tuple[int, int, int]]:
    """[batch, cached tokens, channels] of every block."""
    streams = [call.tensors[place.pair[0]].shape for call, place in zip(captured.calls, places, strict=True)]
    return [(shape[0], place.tokens, shape[-1]) for shape, place in zip(streams, places, strict=True)]


def _first_other(program: BlockProgram, captured: Capture, places: Sequence[_Place]) -> str:
    """The first block whose tokens are not the first block's."""
    grids = _grids(captured, places)
    return next(block.fqn for block, grid in zip(program.blocks, grids, strict=True) if grid != grids[0])


def analyse(program: BlockProgram, captured: Capture) -> BlockProgram:
    """Give every body its roles, and the program its stream."""
    first_of = {block.body: block for block in reversed(program.blocks)}
    calls = [captured.calls[first_of[index].index] for index in range(len(program.bodies))]
    pairs = [stream_pairs(body, call) for body, call in zip(program.bodies, calls, strict=True)]
    for block in program.blocks:
        _check_outputs(program, block, pairs[block.body])
    places = _places(program, captured, pairs)
    for block in program.blocks:
        if places[block.index] != places[first_of[block.body].index]:
            raise UnsupportedModelError(
                block.fqn, "its tokens stand elsewhere than in other blocks of its structure", "One layout is needed."
            )
    bodies = [
        analyse_body(_counting(body, call, places[first_of[index].index]), call, places[first_of[index].index], pairs[index])
        for index, (body, call) in enumerate(zip(program.bodies, calls, strict=True))
    ]
    shapes = set(_grids(captured, places))
    if len(shapes) != 1:
        raise UnsupportedModelError(
            _first_other(program, captured, places),
            f"its tokens are not those of the blocks before it: [batch, tokens, channels] are {' and '.join(map(str, sorted(shapes)))}",
            "All blocks must carry the same tokens.",
        )
    batch, tokens, channels = next(iter(shapes))
    like = calls[0].tensors[places[0].pair[0]]
    stream = Stream(batch, tokens, channels, like.dtype, like.device, image_grid(captured, tokens))
    note = f"analyse: stream [{stream.batch}, {stream.tokens}, {stream.channels}] {stream.dtype}, " + "; ".join(
        f"{b.name}: {len(b.known_roles.attentions)} self-attention(s), {len(b.known_roles.side_inputs)} per-token side input(s), "
        f"{len(b.known_roles.companions)} other stream(s)"
        for b in bodies
    )
    return replace(program, bodies=tuple(bodies), stream=stream, provenance=(*program.provenance, note))
