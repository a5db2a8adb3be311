"""Fold skipped blocks: a run of blocks that no P-step recomputes shares one cache, and a P-step has none of their bodies.

    n = [6, 0, 0, 0, 6]   units  [0] [1 2 3] [4]

A run's cache holds its summed update x_out - x_in: what a P-step adds for the run is the same (a forecast is linear in the
updates, and the run's stamps agree), at a fraction of the memory and of the additions.
"""

from __future__ import annotations

from torch.fx import Node

from tokencache_compile.ir import BlockProgram, CacheUnit
from tokencache_compile.plan import CachePlan


def _feeds(program: BlockProgram, first: int, second: int) -> bool:
    """Whether block ``second`` takes block ``first``'s streams as they are, and nothing else does."""
    nodes = {n.name: n for n in program.skeleton.graph.nodes}
    before, after = program.blocks[first], program.blocks[second]
    one, other = program.body_of(before).known_roles, program.body_of(after).known_roles
    given: list[Node] = nodes[after.node].args[0]
    passed = {one.stream_output: other.stream_input}
    passed |= {c.output: d.input for c, d in zip(one.companions, other.companions, strict=False)}
    outputs = [node for node in nodes[before.node].users if node.users]
    return (
        len(one.companions) == len(other.companions)
        and one.layout == other.layout
        and len(outputs) == len(passed)
        and all(given[passed[o.args[1]]] is o and list(o.users) == [nodes[after.node]] for o in outputs)
    )


def fold_skipped(program: BlockProgram, plan: CachePlan) -> tuple[CacheUnit, ...]:
    """Group the cached blocks into units: single blocks, and runs with n_l = 0 in every keep profile.

    Where modules are cached apart every block runs its gates on every step, and is a unit of its own.
    """
    if plan.config.granularity == "module":
        return tuple(CacheUnit(index, index, False) for index in range(plan.num_cached))
    units: list[CacheUnit] = []
    for index in range(plan.num_cached):
        skipped = all(keep[index] == 0 for keep in plan.profiles)
        if skipped and units and units[-1].skipped and _feeds(program, index - 1, index):
            units[-1] = CacheUnit(units[-1].first, index, True)
        else:
            units.append(CacheUnit(index, index, skipped))
    return tuple(units)
