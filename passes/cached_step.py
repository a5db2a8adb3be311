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
from tokencache_compile.passes.cache_ops import add_forecast, forecast_weights
from tokencache_compile.passes.caches import SHARED_STAMPS, UnitCaches, cache_specs, unit_caches, written_in_p_steps
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
    config, stream = plan.config, program.known_stream
    step = StepGraph(program, cache_specs(caches), extras)
    unit_of = {index: (unit, c) for unit, c in zip(units, caches, strict=True) for index in range(unit.first, unit.last + 1)}
    scores: list[Any] = []
    common: list[Any] = []
    if config.forecast and config.history == "full_steps":
        common = forecast_weights(step.cache_in[SHARED_STAMPS], step.extras["step"], config.forecast)

    def forecast_inputs(names: UnitCaches) -> list[Any]:
        """What a unit's forecast is made from: the weights that hold for all tokens, or its stamps and the step."""
        return [step.cache_in[names.stamps.name], step.extras["step"]] if names.stamps is not None and not common else common

    def visit(block: Block, inputs: list[Node]) -> list[Node]:
        body = program.body_of(block)
        roles = body.known_roles
        if block.index == 0 and predictor is not None and any(keep):
            scores.append(predictor_scores(step, program, predictor, inputs))
        if block.index not in unit_of:
            return step.plain_block(block, inputs)
        unit, names = unit_of[block.index]
        updates = [step.cache_in[spec.name] for spec in names.updates]
        forecast = forecast_inputs(names)
        kept = keep[block.index]
        if kept == 0:
            x = step.proxy(inputs[roles.stream_input])
            if block.index != unit.first:
                return [x.node]  # a later block of a folded run: the run's summed update is already added
            weights = common or (forecast_weights(forecast[0], forecast[1], config.forecast) if forecast else [])
            held: Any = add_forecast(x, updates, weights)
            return [held.node]
        index = select(step, plan, block.index, kept, names, scores[0] if scores else None, stream.batch)
        written = written_in_p_steps(names, config)
        kept_caches = [step.cache_in[spec.name] for spec in (names.score, *names.flat_context) if spec is not None]
        arguments = [*step.block_weights(block), *inputs]
        arguments += [value.node for value in (index, *forecast, *updates, *kept_caches)]
        new_stream, *values = step.call(
            f"{body.name}_cached_{kept}",
            lambda: cached_region(body, config, stream, kept, [len(history) for history in names.context]),
            arguments,
            1 + len(written),
        )
        for spec, value in zip(written, values, strict=True):
            step.cache_out[spec.name] = step.proxy(value)
        return [new_stream]

    return step.finish("P", keep, visit, f"make_cached: keep {list(keep)}, context {config.context}, forecast {config.forecast}")
