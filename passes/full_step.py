"""The I-step: every block in full, bit for bit the model's own result, and every cache written on the way.

x' = block(x)                      the stream is the block's own output
update = x' - x                    goes to the cache; the older ones move down, the oldest falls out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from tokencache_compile.ir import Block, BlockProgram, CacheUnit, StepProgram
from tokencache_compile.passes.caches import UnitCaches, cache_specs, unit_caches
from tokencache_compile.passes.regions import full_region
from tokencache_compile.passes.step_graph import StepGraph
from tokencache_compile.plan import CachePlan


def make_full(program: BlockProgram, plan: CachePlan, units: Sequence[CacheUnit], extras: Sequence[str]) -> StepProgram:
    """The I-step graph of ``plan``. With no ``units`` nothing is cached: the model itself as a step graph."""
    caches = unit_caches(program, plan, units)
    step = StepGraph(program, cache_specs(caches), extras)
    unit_of = {index: (unit, c) for unit, c in zip(units, caches, strict=True) for index in range(unit.first, unit.last + 1)}
    entry: dict[int, Node] = {}

    def visit(block: Block, inputs: list[Node]) -> list[Node]:
        if block.index not in unit_of:
            return step.plain_block(block, inputs)
        unit, names = unit_of[block.index]
        roles = program.body_of(block).known_roles
        if unit.skipped:
            entry.setdefault(unit.first, inputs[roles.stream_input])
            outputs = step.plain_block(block, inputs)
            if block.index == unit.last:
                update = step.proxy(outputs[roles.stream_output]) - step.proxy(entry[unit.first])
                _store(step, plan, names, [update])
            return outputs
        body = program.body_of(block)
        has_score = names.score is not None
        arguments = [*step.block_weights(block), *inputs]
        if has_score and plan.config.scorer == "change":
            arguments.append(step.cache_in[names.updates[0].name].node)
        count = 2 + has_score + len(names.context)
        stream, *written = step.call(f"{body.name}_full", lambda: full_region(body, plan.config, has_score), arguments, count)
        _store(step, plan, names, [step.proxy(node) for node in written])
        return [stream]

    return step.finish("I", (), visit, f"make_full: {len(step.caches)} caches of {len(units)} units")


def _store(step: StepGraph, plan: CachePlan, names: UnitCaches, written: list[Any]) -> None:
    """Name the caches of one unit: the new update enters, the older ones move down, all tokens get this step's stamp."""
    update, *rest = written
    older = [step.cache_in[spec.name] for spec in names.updates[:-1]]
    for spec, value in zip(names.updates, [update, *older], strict=True):
        step.cache_out[spec.name] = value
    if names.stamps is not None:
        batch, tokens, _ = names.stamps.shape
        now = step.extras["step"].expand(batch, tokens, 1)
        step.cache_out[names.stamps.name] = torch.cat([now, step.cache_in[names.stamps.name][..., : plan.config.forecast]], dim=-1)
    score = [(names.score,)] if names.score is not None else []
    for history, value in zip([*score, *names.context], rest, strict=True):
        for spec, moved in zip(history, [value, *(step.cache_in[spec.name] for spec in history[:-1])], strict=True):
            step.cache_out[spec.name] = moved
