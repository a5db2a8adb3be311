"""The P-step: each cached block recomputes its n_l best tokens and adds what its cache says for all others.

    index = top-k of the block's scores           x_kept = x[index]
    out = body(x_kept)                            x' = x + (held or forecast update)
    x'[index] = out                               cache[index] = out - x_kept, where the history takes it

The last K blocks run in full; blocks with n_l = 0 only add their cache (see ``fold_skipped``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from tokencache_compile.ir import Block, BlockProgram, CacheUnit, StepProgram
from tokencache_compile.passes.cache_ops import add_forecast
from tokencache_compile.passes.caches import unit_caches, written_in_p_steps
from tokencache_compile.passes.regions import cached_region
from tokencache_compile.passes.selection import predictor_scores, select
from tokencache_compile.passes.step_graph import StepGraph
from tokencache_compile.plan import CachePlan
from tokencache_compile.predictor import CachePredictor


def make_cached(
    program: BlockProgram,
    plan: CachePlan,
    units: Sequence[CacheUnit],
    extras: Sequence[str],
    keep: tuple[int, ...],
    predictor: CachePredictor | None,
) -> StepProgram:
    """The P-step graph of one keep profile of ``plan``."""
    caches = unit_caches(program, plan, units)
    stream = program.known_stream
    step = StepGraph(program, [spec for unit in caches for spec in unit.all], extras)
    unit_of = {index: (unit, c) for unit, c in zip(units, caches, strict=True) for index in range(unit.first, unit.last + 1)}
    scores: list[Any] = []

    def visit(block: Block, inputs: list[Node]) -> list[Node]:
        body = program.body_of(block)
        roles = body.known_roles
        if block.index == 0 and predictor is not None and any(keep):
            scores.append(predictor_scores(step, program, predictor, inputs))
        if block.index not in unit_of:
            return step.plain_block(block, inputs)
        unit, names = unit_of[block.index]
        updates = [step.cache_in[spec.name] for spec in names.updates]
        stamps = step.cache_in[names.stamps.name] if names.stamps is not None else None
        kept = keep[block.index]
        if kept == 0:
            x = step.proxy(inputs[roles.stream_input])
            if block.index != unit.first:
                return [x.node]  # a later block of a folded run: the run's summed update is already added
            held: Any = add_forecast(x, updates, stamps, step.extras["step"], plan.config.forecast)
            return [held.node]
        index = select(step, plan, block.index, kept, names, scores[0] if scores else None, stream.batch)
        written = written_in_p_steps(names, plan.config)
        arguments = [*step.block_weights(block), *inputs, index.node, step.extras["step"].node]
        arguments += [step.cache_in[spec.name].node for spec in names.all]
        new_stream, *values = step.call(
            f"{body.name}_cached_{kept}",
            lambda: cached_region(body, plan.config, stream, kept, len(names.context)),
            arguments,
            1 + len(written),
        )
        for spec, value in zip(written, values, strict=True):
            step.cache_out[spec.name] = step.proxy(value)
        return [new_stream]

    return step.finish("P", keep, visit, f"make_cached: keep {list(keep)}, context {plan.config.context}, forecast {plan.config.forecast}")
