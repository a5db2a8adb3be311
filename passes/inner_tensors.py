"""Inner tensors: weights of a tensor subclass (torchao's quantised ones) enter a region as the plain tensors they are made of.

``torch.export`` already computes with those (``access_subclass_inner_tensor(weight, "qdata")``), and a compiled region takes
no subclass. So the access moves out of the region, into the step graph around it. That still reads the model's own parameter,
and so follows one that moves to another device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

_ACCESS = torch.ops.export.access_subclass_inner_tensor.default

Access = tuple[int, tuple[str, ...]]  # which argument, and by which attributes the tensor in it is reached


def take_apart(module: GraphModule) -> tuple[GraphModule, tuple[Access, ...]]:
    """A region's graph that takes inner tensors where it took subclasses, and what it now takes of the arguments it took."""
    if not module.graph.find_nodes(op="call_function", target=_ACCESS):
        return module, tuple((i, ()) for i, _ in enumerate(module.graph.find_nodes(op="placeholder")))
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    places: dict[Node, Access] = {node: (i, ()) for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    for node in graph.find_nodes(op="call_function", target=_ACCESS):
        source, name = node.args
        argument, path = places[source]
        with graph.inserting_after(source):
            inner = graph.placeholder(f"{source.name}_{name}")
        inner.meta = dict(node.meta)
        places[inner] = argument, (*path, name)
        node.replace_all_uses_with(inner)
        graph.erase_node(node)
        if not source.users:
            graph.erase_node(source)
    return GraphModule(module, graph), tuple(places[node] for node in graph.find_nodes(op="placeholder"))


def taken(graph: Graph, arguments: Sequence[Node], accesses: Sequence[Access]) -> list[Node]:
    """What ``accesses`` take from ``arguments``, in ``graph``."""
    values = []
    for argument, path in accesses:
        value = arguments[argument]
        for name in path:
            value = graph.call_function(getattr, (value, name))
        values.append(value)
    return values
