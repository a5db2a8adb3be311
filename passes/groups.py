"""Groups: an attention whose mask says "same group" needs no pair across groups, where all tokens are there.

    mask  = group[:, :, None] == group[:, None, :]         attention(q, k, v, mask)                   N² pairs
    order = argsort(group)                                 attention of each group's tokens alone     N² / groups pairs

:func:`find_groups` marks such attentions. It needs to know that the groups have one size whatever the model is given: the numbers
must be constants of the skeleton, and are computed from it. I-steps and blocks that run in full then use
:func:`~tokencache_compile.grouped_attention.attend_in_groups`; kept tokens fall into groups of any size and keep the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from tokencache_compile.grouped_attention import attend_in_groups
from tokencache_compile.ir import BlockProgram, Groups
from tokencache_compile.passes.analysis import placeholders
from tokencache_compile.passes.capture import BLOCK_OP
from tokencache_compile.passes.pair_mask import takes_whole_axis, token_axes, token_symbol

aten = torch.ops.aten


def find_groups(program: BlockProgram) -> BlockProgram:
    """Mark every attention among constant groups of one size."""
    bodies = []
    for number, body in enumerate(program.bodies):
        nodes = {n.name: n for n in body.graph_module.graph.nodes}
        attentions = tuple(replace(a, groups=_groups(program, number, nodes[a.node])) for a in body.known_roles.attentions)
        bodies.append(replace(body, roles=replace(body.known_roles, attentions=attentions)))
    return replace(program, bodies=tuple(bodies))


def attend_by_group(attention: Node, groups: Groups, value_of: Callable[[Node], Any]) -> Any:
    """The grouped form of a marked attention; ``value_of`` gives what stands for a body's node."""
    nodes = {n.name: n for n in attention.graph.nodes}
    query, key, value = (value_of(node) for node in attention.args[:3] if isinstance(node, Node))
    bias = None if groups.bias is None else value_of(nodes[groups.bias])
    return attend_in_groups(query, key, value, value_of(nodes[groups.group]), groups.count, bias)


def _groups(program: BlockProgram, number: int, attention: Node) -> Groups | None:
    body = program.bodies[number]
    found = _group_and_bias(attention, token_symbol(body))
    inputs = placeholders(body)
    if found is None or found[0] not in inputs:
        return None
    group, bias = found
    position = inputs.index(group)
    calls: dict[str, Any] = {n.name: n for n in program.skeleton.graph.nodes if n.target is BLOCK_OP}
    sources: list[Any] = [calls[block.node].args[0][position] for block in program.blocks if block.body == number]
    counts = {_count(_constant(source)) for source in sources}
    count = counts.pop()
    return None if counts or count is None else Groups(count, group.name, None if bias is None else bias.name)


def _count(group: Tensor | None) -> int | None:
    """How many groups the numbers [B, N] make in every row, if they all are of one size."""
    if group is None:
        return None
    sizes = {tuple(row.unique(return_counts=True)[1].tolist()) for row in group}
    first = sizes.pop()
    return None if sizes or len(set(first)) > 1 else len(first)


def _constant(node: Node) -> Tensor | None:
    """The value of a skeleton's node, computed on the CPU (the model may be on the meta device), or None if it is not a constant."""
    needed = {node}
    for n in reversed(node.graph.nodes):
        if n in needed:
            if not _is_fixed(n):
                return None
            needed |= set(n.all_input_nodes)
    values: dict[Node, Any] = {}

    def value_of(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, Node) else torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    for n in node.graph.nodes:
        if n in needed:
            args, kwargs = pytree.tree_map(value_of, (n.args, n.kwargs))
            values[n] = n.target(*args, **kwargs)
    result = values[node]
    return result if isinstance(result, Tensor) else None


def _is_fixed(node: Node) -> bool:
    """Whether a node gives the same value for the same arguments, and is neither an input nor a weight."""
    if node.op != "call_function" or node.target is BLOCK_OP:
        return False
    return not (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags)


def _group_and_bias(attention: Node, token: SymInt) -> tuple[Node, Node | None] | None:
    """The group numbers [B, N] by which ``attention`` is masked, and the bias [B, N] of its keys; None if it is masked otherwise."""
    mask: Any = attention.args[3] if len(attention.args) == 4 and not attention.kwargs else None
    if mask is None:
        return None
    mask, added = _unwrapped(mask), None
    if mask.target is aten.where.ScalarOther and mask.args[2] == float("-inf"):
        same, added = mask.args[:2]
        mask = _unwrapped(same)
    if mask.target is not aten.eq.Tensor:
        return None
    first, second = mask.args
    group, bias = _unwrapped(first), None if added is None else _unwrapped(added)
    if _unwrapped(second) is not group or [token_axes(n, token) for n in (first, second)] not in ([{-2}, {-1}], [{-1}, {-2}]):
        return None
    if added is not None and token_axes(added, token) != {-1}:
        return None
    per_token = all(node.meta["val"].dim() == 2 and token_axes(node, token) == {-1} for node in (group, bias) if node is not None)
    return (group, bias) if per_token else None


def _unwrapped(node: Node) -> Node:
    """What ``node`` is made from by adding axes of size 1."""
    while node.target is aten.unsqueeze.default or takes_whole_axis(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
