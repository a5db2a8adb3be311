"""Low-rank updates: a refined P-step's last K blocks, whose linears add what the adapter (LoRA) learned.

    y = linear(x, W, b)          y = linear(x, W, b) + linear(linear(x, down), up)

Only P-graphs are made from the refined program, so that I-steps stay the model's own. W is shared; blocks of one structure that
are refined alike share a body.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, GraphModule, Node

from tokencache_compile.errors import ConfigError
from tokencache_compile.ir import Block, BlockProgram, Body, LowRankUpdate

_LINEAR = torch.ops.aten.linear.default


def with_updates(program: BlockProgram, updates: Sequence[LowRankUpdate], num_cached: int) -> BlockProgram:
    """``program`` with ``updates`` in its blocks from ``num_cached`` on; the others, and all weights, are shared with it.

    Raises:
        ConfigError: an update is for anything but a linear of those blocks.
    """
    bodies, blocks, tensors = list(program.bodies), list(program.blocks), dict(program.tensors)
    left = {update.module: update for update in updates}
    refined: dict[tuple[object, ...], int] = {}
    for index, block in enumerate(program.blocks[num_cached:], num_cached):
        own = {name.removeprefix(f"{block.fqn}."): update for name, update in left.items() if name.startswith(f"{block.fqn}.")}
        if not own:
            continue
        left = {name: update for name, update in left.items() if update not in own.values()}
        key = (block.body, *((name, *update.down.shape) for name, update in own.items()))
        if key not in refined:
            refined[key] = len(bodies)
            bodies.append(_refined_body(program, block, own, f"{program.body_of(block).name}_refined_{len(refined) - 1}"))
        blocks[index] = replace(block, body=refined[key])
        for update in own.values():
            weight = tensors[_weight_of(program, block, update.module.removeprefix(f"{block.fqn}."))]
            for name, tensor in zip(_names_of(update.module), (update.down, update.up), strict=True):
                tensors[name] = tensor.to(weight.device, weight.dtype)
    if left:
        first = program.blocks[num_cached].fqn if num_cached < len(blocks) else "none"
        raise ConfigError(
            f"the adapter refines {next(iter(left))}, and the plan's last K blocks, which run in full on every step, begin at {first} "
            f"(K = {len(blocks) - num_cached}). Pass the last_k that it was trained for."
        )
    note = f"with_updates: {len(updates)} linears refined"
    return replace(program, bodies=tuple(bodies), blocks=tuple(blocks), tensors=tensors, provenance=(*program.provenance, note))


def _names_of(module: str) -> tuple[str, str]:
    return f"{module}.lora_down", f"{module}.lora_up"


def _weight_of(program: BlockProgram, block: Block, module: str) -> str:
    """The name of a linear's weight; peft keeps it as ``base_layer`` where the model carries an adapter of its own."""
    names = (f"{block.fqn}.{module}.weight", f"{block.fqn}.{module}.base_layer.weight")
    found = next((name for name in names if name in block.weight_fqns(program.body_of(block))), None)
    if found is None:
        raise ConfigError(f"the adapter refines {block.fqn}.{module}, and the block reads no weight of a linear there.")
    return found


def _refined_body(program: BlockProgram, block: Block, updates: Mapping[str, LowRankUpdate], name: str) -> Body:
    """A copy of ``block``'s body with two more weights for each of ``updates`` (by their module's path in the block), after its own."""
    body = program.body_of(block)
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(body.graph_module.graph, copies))
    placeholders = list(graph.find_nodes(op="placeholder"))
    weights = dict(zip(block.weight_fqns(body), placeholders, strict=False))
    more: list[str] = []
    for module in updates:
        weight = weights[_weight_of(program, block, module)]
        linears = [node for node in weight.users if node.target is _LINEAR and node.args[1] is weight]
        if not linears:
            raise ConfigError(f"the adapter refines {block.fqn}.{module}, whose weight no linear of the captured block reads.")
        with graph.inserting_before(placeholders[len(body.weight_names)]):
            down, up = (graph.placeholder(n.replace(".", "_")) for n in _names_of(module))
        more += _names_of(module)
        for linear in linears:
            with graph.inserting_after(linear):
                low = graph.call_function(_LINEAR, (linear.args[0], down))
            with graph.inserting_after(low):
                added = graph.call_function(_LINEAR, (low, up))
            with graph.inserting_after(added):
                total = graph.call_function(torch.ops.aten.add.Tensor, (linear, added))
            total.meta = dict(linear.meta)
            linear.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
    graph.lint()
    return replace(body, name=name, graph_module=GraphModule(body.graph_module, graph), weight_names=(*body.weight_names, *more))
