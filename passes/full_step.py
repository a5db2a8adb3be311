"""The I-step: every block in full, bit for bit the model's own result, and every cache written on the way.

x' = block(x)                      the stream is the block's own output
update = x' - x                    goes to the cache; the older ones move down, the oldest falls out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from tokencache_compile.ir import Block, BlockProgram, CacheSpec, CacheUnit, Companion, StepProgram
from tokencache_compile.passes.cache_ops import load, store
from tokencache_compile.passes.caches import UnitCaches, cache_specs, unit_caches
from tokencache_compile.passes.regions import full_region
from tokencache_compile.passes.step_graph import StepGraph
from tokencache_compile.plan import CachePlan


def make_full(program: BlockProgram, plan: CachePlan, units: Sequence[CacheUnit], extras: Sequence[str]) -> StepProgram:
    """The I-step graph of ``plan``. With no ``units`` nothing is cached: the model itself as a step graph."""
    caches = unit_caches(program, plan, units)
    step = StepGraph(program, cache_specs(caches), extras)
    unit_of = {index: (unit, c) for unit, c in zip(units, caches, strict=True) for index in range(unit.first, unit.last + 1)}
    entry: dict[int, list[Node]] = {}

    def visit(block: Block, inputs: list[Node]) -> list[Node]:
        if block.index not in unit_of:
            return step.plain_block(block, inputs)
        unit, names = unit_of[block.index]
        body = program.body_of(block)
        roles = body.known_roles
        if unit.skipped:
            if block.index == unit.first:
                entry[unit.first] = [inputs[position] for position in (roles.stream_input, *(c.input for c in roles.companions))]
            outputs = step.plain_block(block, inputs)
            if block.index == unit.last:
                stream_in, *others_in = map(step.proxy, entry[unit.first])
                _store(step, plan, names, [step.proxy(outputs[roles.stream_output]) - stream_in])
                _store_companions(step, names, outputs, others_in, roles.companions)
            return outputs
        has_score = names.score is not None
        arguments = [*step.block_weights(block), *inputs]
        if has_score and plan.config.scorer == "change":
            previous: Any = load(step.cache_in[names.updates[0].name], names.updates[0])
            arguments.append(previous.node)
        count = body.num_outputs + bool(names.updates) + has_score + len(names.context)
        results = step.call(
            f"{body.name}_full", lambda: full_region(body, plan.config, program.known_stream, has_score), arguments, count
        )
        outputs, written = results[: body.num_outputs], results[body.num_outputs :]
        _store(step, plan, names, [step.proxy(node) for node in written])
        _store_companions(step, names, outputs, [step.proxy(inputs[c.input]) for c in roles.companions], roles.companions)
        return outputs

    return step.finish("I", (), visit, f"make_full: {len(step.caches)} caches of {len(units)} units")


def _moved_down(step: StepGraph, history: Sequence[CacheSpec], value: Any) -> None:
    """A new value enters a history, the older ones move down, the oldest falls out."""
    for spec, moved in zip(history, [store(value, history[0]), *(step.cache_in[spec.name] for spec in history[:-1])], strict=True):
        step.cache_out[spec.name] = moved


def _stamp(step: StepGraph, stamps: CacheSpec, forecast: int) -> None:
    """All tokens get this step's stamp."""
    batch, tokens, _ = stamps.shape
    now = step.extras["step"].expand(batch, tokens, 1)
    step.cache_out[stamps.name] = torch.cat([now, step.cache_in[stamps.name][..., :forecast]], dim=-1)


def _store(step: StepGraph, plan: CachePlan, names: UnitCaches, written: list[Any]) -> None:
    """Name the caches of one unit: its update where it has one, and what else the region gave."""
    updates = [names.updates] if names.updates else []
    if names.stamps is not None:
        _stamp(step, names.stamps, plan.config.forecast)
    if names.companion_stamps is not None and names.companion_stamps != names.stamps:
        _stamp(step, names.companion_stamps, plan.config.forecast)
    score = [(names.score,)] if names.score is not None else []
    for history, value in zip([*updates, *score, *names.context], written, strict=True):
        _moved_down(step, history, value)


def _store_companions(step: StepGraph, names: UnitCaches, outputs: list[Node], before: list[Any], companions: Sequence[Companion]) -> None:
    """Name the caches of the other streams' updates, where the plan has them."""
    for history, companion, x in zip(names.companions, companions, before, strict=False):
        _moved_down(step, history, step.proxy(outputs[companion.output]) - x)
