"""Pair mask: an attention's mask for kept queries and the keys of all tokens (contexts ``full`` and ``cached``).

    body        same = group[:, :, None] == group[:, None, :]                    [B, N, N]
    here        same = group[index][:, :, None] == group[:, None, :]             [B, n, N]

The mask is made anew from its ancestors. Masks broadcast to [.., queries, keys], so an ancestor's axes say which tokens it is
of: one with tokens on its last axis alone is of the keys, on its last but one alone of the queries, and what has both is made by
pointwise operations, in which this holds for the arguments in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt
from torch.fx import Node

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import Body
from tokencache_compile.passes.analysis import placeholders

if TYPE_CHECKING:
    from tokencache_compile.passes.context import BodyCopy

aten = torch.ops.aten
# Pointwise, but composed of other operators or made of a shape alone, and so without torch's tag; and what leaves the last axes alone.
_POINTWISE = {aten.where, aten.masked_fill, aten.__and__, aten.__or__, aten.zeros_like, aten.ones_like, aten.full_like}
_KEEPS_LAST_AXES = (aten.unsqueeze.default, aten.to.dtype, aten.clone.default)


def token_symbol(body: Body) -> SymInt:
    """The size of a body's token axis."""
    roles = body.known_roles
    size: SymInt = placeholders(body)[roles.stream_input].meta["val"].shape[roles.token_dim]
    return size


def token_axes(node: Node, token: SymInt) -> set[int]:
    """The axes of a node's value that count tokens, from the end: -1 is the last."""
    sizes = node.meta["val"].shape
    symbols = token.node.expr.free_symbols
    return {axis - len(sizes) for axis, size in enumerate(sizes) if isinstance(size, SymInt) and size.node.expr.free_symbols & symbols}


def pair_mask(copy: BodyCopy, mask: Node) -> Node:
    """The copy of ``mask`` for kept queries and all keys, in the graph of ``copy``.

    Raises:
        UnsupportedModelError: the mask is not made by pointwise operations.
    """
    token = token_symbol(copy.body)
    made: dict[Node, Node] = {}

    def of_pairs(node: Node) -> Node:
        if node in made:
            return made[node]
        axes = token_axes(node, token)
        if axes == {-1, -2}:
            made[node] = _copy_pairwise(copy, node, of_pairs)
        elif axes <= {-1} or axes == {-2}:
            (made[node],) = copy.copy_ancestors([node], copy.all_tokens if axes == {-1} else copy.kept)
        else:
            raise _refusal(copy, node)
        return made[node]

    return of_pairs(mask)


def _copy_pairwise(copy: BodyCopy, node: Node, of_pairs: Any) -> Node:
    if node.target is aten.expand.default:
        source, sizes = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        for axis, env in ((-1, copy.all_tokens), (-2, copy.kept)):
            if isinstance(sizes[axis], Node):
                (sizes[axis],) = copy.copy_ancestors([sizes[axis]], env)
        rest = [copy.kept[size] if isinstance(size, Node) else size for size in sizes[:-2]]
        return copy.graph.call_function(node.target, (of_pairs(source), [*rest, *sizes[-2:]]))
    on_tensors = all(isinstance(n.meta["val"], torch.Tensor) for n in node.all_input_nodes)
    if not on_tensors or not (_is_pointwise(node) or node.target in _KEEPS_LAST_AXES or takes_whole_axis(node)):
        raise _refusal(copy, node)
    return copy.graph.node_copy(node, of_pairs)


def _is_pointwise(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target.overloadpacket in _POINTWISE


def takes_whole_axis(node: Node) -> bool:
    """A slice that leaves nothing out: what ``:`` in an index, as in ``mask[:, None]``, is exported as."""
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = [*node.args[2:], None, None, None][:3]
    return start in (0, None) and end in (2**63 - 1, None) and step in (1, None)


def _refusal(copy: BodyCopy, node: Node) -> UnsupportedModelError:
    return UnsupportedModelError(
        copy.body.name,
        f"its self-attention mask is per pair of tokens and made by {node.target}, so it cannot be made for kept queries and all keys",
        'Use context="kept" or "reuse".',
    )
