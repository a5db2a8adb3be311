"""Real tables: complex numbers that are made from constants alone (rotary tables) become real ones that an exporter can write down.

    polar(1, angles)[ids] → split → cat        →        view_as_complex(table [..., 2])

The arithmetic on what the model is given stays complex; exporters know that much (a product), but not how tables are cut and joined.
What is no constant but only rearranged, as the rows of kept tokens are, is rearranged in its real form.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

aten = torch.ops.aten
_REARRANGING = {"index_select", aten.index_select.default, aten.index.Tensor, aten.slice.Tensor, aten.unsqueeze.default}


def real_tables(module: GraphModule) -> None:
    """Rewrite the graph of ``module`` in place; its nodes carry their values, fake tensors, in ``meta["val"]``."""
    constants = _constants(module)
    made: dict[Node, Any] = {}
    for node in list(constants):
        read = [user for user in node.users if user not in constants]
        if not read or not _is_complex(node) or not isinstance(node.meta.get("val"), Tensor):
            continue
        with torch.no_grad():
            value = _value(module, node, made)
        table = torch.view_as_real(value.resolve_conj()).contiguous()
        name = f"table_{hashlib.blake2b(table.cpu().numpy().tobytes(), digest_size=8).hexdigest()}"
        module.register_buffer(name, table)
        with module.graph.inserting_before(node):
            stored = module.graph.get_attr(name)
            complex_again = module.graph.call_function(aten.view_as_complex.default, (stored,))
        complex_again.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(complex_again)
    _rearrange_real_forms(module.graph)
    module.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))


def _rearrange_real_forms(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.target not in _REARRANGING or not _is_complex(node):
            continue
        value, *rest = node.args
        if rest and node.target is not aten.index.Tensor:
            rest[0] %= node.meta["val"].dim()  # an axis counted from the front: the real form has one more behind
        with graph.inserting_before(node):
            real = graph.call_function(aten.view_as_real.default, (value,))
            rearranged = graph.create_node(node.op, node.target, (real, *rest))
            result = graph.call_function(aten.view_as_complex.default, (rearranged,))
        result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _constants(module: GraphModule) -> dict[Node, None]:
    """The nodes that are made from no input and no parameter, each kind of call on the same arguments once."""
    found: dict[Node, None] = {}
    alike: dict[tuple[Any, ...], Node] = {}
    for node in list(module.graph.nodes):
        if any(isinstance(n.meta.get("val"), int) for n in node.all_input_nodes):  # a size is a number, whatever has it
            node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: v if isinstance(v := n.meta.get("val"), int) else n)
        if not _is_constant(module, node, found):
            continue
        key = (node.target, str(node.args), str(node.kwargs))
        first = alike.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
        found[first] = None
    return found


def _is_constant(module: GraphModule, node: Node, constants: dict[Node, None]) -> bool:
    if node.op == "get_attr":
        return not isinstance(_attribute(module, str(node.target)), nn.Parameter)
    if node.op != "call_function" or any(n not in constants for n in node.all_input_nodes):
        return False
    random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not _is_written(node) and not any(_is_written(n) for n in node.all_input_nodes)


def _is_written(node: Node) -> bool:
    """Whether some operation, or the node's own, writes in place."""
    operations = [n.target for n in (node, *node.users) if isinstance(n.target, torch._ops.OpOverload)]
    return any(operation._schema.is_mutable for operation in operations)


def _attribute(module: GraphModule, path: str) -> Any:
    owner: Any = module
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _value(module: GraphModule, node: Node, made: dict[Node, Any]) -> Any:
    """What a constant node is; ``made`` holds those that are known."""
    if node not in made:
        if node.op == "get_attr":
            made[node] = _attribute(module, str(node.target))
        else:
            args, kwargs = map_aggregate(
                (node.args, node.kwargs), lambda leaf: _value(module, leaf, made) if isinstance(leaf, Node) else leaf
            )
            operation: Any = node.target
            made[node] = operation(*args, **kwargs)
    return made[node]
