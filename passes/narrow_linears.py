"""Narrow linears: of a linear on the conditioning whose output is split into chunks, compute only the chunks that are read.

    c = linear(e, W [6C, E])        shift, scale, gate, shift', scale', gate' = chunk(c, 6)
    reuse reads gate … gate'        c = linear(e, W[2C:])       gate, shift', scale', gate' = chunk(c, 4)

A P-step that reuses attention never reads its modulation, and reading those weights takes longer than using them: the
conditioning is one row a sample. The narrower weight is a view, nothing is copied.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

LINEAR = torch.ops.aten.linear.default
_CHUNK = torch.ops.aten.chunk.default
_SLICE = torch.ops.aten.slice.Tensor


def _splits_features(chunk: Any, linear: Any) -> bool:
    """Whether ``chunk`` splits the last axis of a linear that nothing else reads into equal, separately read parts."""
    if not isinstance(linear, Node) or linear.target is not LINEAR or "val" not in linear.meta or len(linear.users) > 1:
        return False
    shape, count = linear.meta["val"].shape, chunk.args[1]
    dim = chunk.args[2] if len(chunk.args) > 2 else 0
    read_apart = all(user.target is operator.getitem for user in chunk.users)
    return read_apart and dim in (-1, len(shape) - 1) and int(shape[-1]) % count == 0


def narrow_linears(graph: Graph) -> None:
    """Rewrite ``graph`` in place, where the chunks that are read lie between chunks that are not."""
    chunks: list[Any] = graph.find_nodes(op="call_function", target=_CHUNK)
    for chunk in chunks:
        linear = chunk.args[0]
        if not _splits_features(chunk, linear):
            continue
        count = chunk.args[1]
        width = int(linear.meta["val"].shape[-1]) // count
        read = [user.args[1] % count for user in chunk.users]
        first, end = min(read), max(read) + 1
        if end - first == count:
            continue
        with graph.inserting_before(linear):
            rows = [graph.call_function(_SLICE, (t, 0, first * width, end * width)) for t in linear.args[1:] if t is not None]
        linear.args = (linear.args[0], *rows)
        chunk.args = (linear, end - first, *chunk.args[2:])
        for user in list(chunk.users):
            user.args = (chunk, user.args[1] % count - first)
