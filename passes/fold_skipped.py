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
    """Whether block ``second`` takes block ``first``'s stream as it is, and nothing else does."""
    nodes = {n.name: n for n in program.skeleton.graph.nodes}
    before, after = program.blocks[first], program.blocks[second]
    outputs: list[Node] = list(nodes[before.node].users)
    given: list[Node] = nodes[after.node].args[0]
    stream = given[program.body_of(after).known_roles.stream_input]
    return outputs == [stream] and list(stream.users) == [nodes[after.node]]


def fold_skipped(program: BlockProgram, plan: CachePlan) -> tuple[CacheUnit, ...]:
    """Group the cached blocks into units: single blocks, and runs with n_l = 0 in every keep profile."""
    units: list[CacheUnit] = []
    for index in range(plan.num_cached):
        skipped = all(keep[index] == 0 for keep in plan.profiles)
        if skipped and units and units[-1].skipped and _feeds(program, index - 1, index):
            units[-1] = CacheUnit(units[-1].first, index, True)
        else:
            units.append(CacheUnit(index, index, skipped))
    return tuple(units)
