"""Logical fills: a mask filled where another one says so, in logic; ONNX Runtime has no ``Where`` of booleans.

    masked_fill(a, m, True)  →  a | m            masked_fill(a, m, False)  →  a & ~m
"""

from __future__ import annotations

import torch
from torch.fx import Graph

aten = torch.ops.aten


def logical_fills(graph: Graph) -> None:
    """Rewrite ``graph`` in place; its nodes carry their values' shapes and dtypes in ``meta["val"]``."""
    for node in graph.find_nodes(op="call_function", target=aten.masked_fill.Scalar):
        if node.meta["val"].dtype != torch.bool:
            continue
        value, mask, fill = node.args
        with graph.inserting_before(node):
            if fill:
                filled = graph.call_function(aten.logical_or.default, (value, mask))
            else:
                others = graph.call_function(aten.logical_not.default, (mask,))
                filled = graph.call_function(aten.logical_and.default, (value, others))
        node.replace_all_uses_with(filled)
        graph.erase_node(node)
