"""Inline regions: a step graph without submodules, each call of a region replaced by the region's own nodes.

Regions keep compile time low in torch; an exporter wants one flat graph. Weights stay where they are, by their names.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from tokencache_compile.passes.regions import Region

Place = tuple[Node | None, Node]  # a call of a region and a node of the region; None and a node of the graph around the calls


def inline_regions(module: GraphModule) -> tuple[GraphModule, dict[Place, Node]]:
    """``module`` with the same inputs, outputs and weights, and no region left; and what each node has become."""
    graph = Graph()
    places: dict[Place, Node] = {}
    env: dict[Node, Any] = {}  # a region's call stands for the tuple of its outputs
    for node in module.graph.nodes:
        region = module.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(region, Region):
            inner = region.graph_module.graph
            given = [n for n in inner.nodes if n.op == "placeholder"]
            copies = {placeholder: env[n] for placeholder, n in zip(given, node.args, strict=True)}
            env[node] = graph.graph_copy(inner, copies)
            for own in inner.find_nodes(op="get_attr"):  # a constant of the block, or a graph within it
                copies[own].target = f"{node.target}.graph_module.{own.target}"
            places |= {(node, own): copy for own, copy in copies.items()}
        elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple | list):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "output":
            graph.output(tuple(env[n] for n in node.args[0]))
        else:
            places[None, node] = env[node] = graph.node_copy(node, lambda n: env[n])
    flat = GraphModule(module, graph)
    flat.graph.lint()
    return flat, places
