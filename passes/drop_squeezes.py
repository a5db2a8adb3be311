"""Drop squeezes that squeeze nothing: torch lets an axis longer than 1 pass, ONNX and TensorRT refuse it.

    x [B, 16, C]    squeeze(x, 1)  →  x            squeeze(x [B, 1, C], 1)  stays
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

_SQUEEZES = (torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims)


def drop_squeezes(graph: Graph) -> None:
    """Rewrite ``graph`` in place; its nodes carry their values' shapes in ``meta["val"]``."""
    for target in _SQUEEZES:
        for node in graph.find_nodes(op="call_function", target=target):
            source = node.args[0]
            if isinstance(source, Node) and source.meta["val"].shape == node.meta["val"].shape:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
