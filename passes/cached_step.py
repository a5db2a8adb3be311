"""The P-step: each cached block recomputes its n_l best tokens and adds what its cache says for all others.

    index = top-k of the block's scores           x_kept = x[index]
    out = body(x_kept)                            x' = x + (held or forecast update)
    x'[index] = out                               cache[index] = out - x_kept, where the history takes it

The last K blocks run in full; blocks with n_l = 0 only add their cache (see ``fold_skipped``). Where modules are cached apart
(``modules``), every cached block runs its gates and residuals on all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from tokencache_compile.ir import Block, BlockProgram, CacheSpec, CacheUnit, Layout, StepProgram
from tokencache_compile.passes.cache_ops import add_forecast, fitted_weights, forecast_weights, load
from tokencache_compile.passes.caches import SHARED_STAMPS, UnitCaches, cache_specs, unit_caches, written_in_p_steps
from tokencache_compile.passes.kept_rows import KeptRows
from tokencache_compile.passes.modules import refreshed_modules
from tokencache_compile.passes.regions import cached_region, module_region
from tokencache_compile.passes.selection import predictor_scores, select
from tokencache_compile.passes.step_graph import StepGraph
from tokencache_compile.plan import CacheConfig, CachePlan
from tokencache_compile.predictor import CachePredictor

# Constants of a P-step's graph; no model has parameters of such names.
STEP_WEIGHTS, STEP_NODES = "fitted_step_weights", "fitted_step_nodes"


def common_forecast(step: StepGraph, config: CacheConfig, device: torch.device) -> list[Any]:
    """The weights [1, 1, 1] of the last I-steps' updates, the same for all tokens."""
    stamps, number = step.cache_in[SHARED_STAMPS], step.extras["step"]
    if not config.step_weights:
        return forecast_weights(stamps, number, config.forecast)
    rows = [config.nodes(k) for k in range(len(config.step_weights))]
    weights, nodes = (torch.tensor(table, dtype=torch.float32, device=device) for table in (config.step_weights, rows))
    tables = [step.proxy(step.weight(name, value)) for name, value in ((STEP_WEIGHTS, weights), (STEP_NODES, nodes))]
    return fitted_weights(stamps, number, config.forecast, *tables)


def make_cached(
    program: BlockProgram,
    plan: CachePlan,
    units: Sequence[CacheUnit],
    extras: Sequence[str],
    profile: int,
    predictor: CachePredictor | None,
) -> StepProgram:
    """The P-step graph of keep profile number ``profile`` of ``plan``."""
    keep = plan.profiles[profile]
    caches = unit_caches(program, plan, units)
    config, stream = plan.config, program.known_stream
    step = StepGraph(program, cache_specs(caches), extras)
    unit_of = {index: (unit, c) for unit, c in zip(units, caches, strict=True) for index in range(unit.first, unit.last + 1)}
    scores: list[Any] = []
    common: list[Any] = []
    if config.forecast and config.history == "full_steps":
        common = common_forecast(step, config, stream.device)

    def forecast_inputs(names: UnitCaches) -> list[Any]:
        """What a unit's forecast is made from: the weights that hold for all tokens, or its stamps and the step."""
        return [step.cache_in[names.stamps.name], step.extras["step"]] if names.stamps is not None and not common else common

    def skipped(block: Block, inputs: list[Node], unit: CacheUnit, names: UnitCaches, forecast: list[Any]) -> list[Node]:
        """A block that this step does not run: every stream it carries adds its update. Later blocks of a run hand them on."""
        body = program.body_of(block)
        roles = body.known_roles
        pairs = [(roles.stream_input, roles.stream_output), *((c.input, c.output) for c in roles.companions)]
        outputs = inputs[:1] * body.num_outputs  # nothing reads an output that continues no stream: see analysis
        for i, o in pairs:
            outputs[o] = inputs[i]
        if block.index != unit.first:
            return outputs
        weights = common or (forecast_weights(forecast[0], forecast[1], config.forecast) if forecast else [])
        beside = common
        if names.companion_stamps is not None and not common:
            beside = forecast_weights(step.cache_in[names.companion_stamps.name], step.extras["step"], config.forecast)
        for (i, o), history in zip(pairs, (names.updates, *names.companions), strict=True):
            updates = [load(step.cache_in[spec.name], spec) for spec in history]
            held: Any = add_forecast(step.proxy(inputs[i]), updates, weights if history is names.updates else beside)
            outputs[o] = held.node
        return outputs

    def gated(block: Block, inputs: list[Node], kept: int, names: UnitCaches) -> list[Node]:
        """A block whose modules are cached apart: its gates and residuals run, whatever it keeps."""
        body = program.body_of(block)
        arguments = [*step.block_weights(block), *inputs]
        written: list[CacheSpec] = []
        if kept:
            index = select(step, plan, block, inputs, kept, names, scores[0] if scores else None)
            arguments.append(index.node)
            if config.history == "computed":
                written = [specs[0] for specs, is_new in zip(names.context, refreshed_modules(body, stream), strict=True) if is_new]
            if config.history == "computed" and names.stamps is not None:
                now = step.extras["step"].expand(stream.batch, kept, 1)
                step.cache_out[names.stamps.name] = KeptRows(index, stream, kept).put(step.cache_in[names.stamps.name], now, Layout())
        arguments += [value.node for value in (*common, *(step.cache_in[spec.name] for spec in names.flat_context))]
        fresh = plan.fresh_of(profile, block.index)
        name = "_".join([body.name, "gated", str(kept), *(["fresh", "".join(str(int(f)) for f in fresh)] if fresh else [])])
        count = body.num_outputs + len(written)
        results = step.call(name, lambda: module_region(body, config, stream, kept, fresh, names), arguments, count)
        for spec, value in zip(written, results[body.num_outputs :], strict=True):
            step.cache_out[spec.name] = step.proxy(value)
        return results[: body.num_outputs]

    def visit(block: Block, inputs: list[Node]) -> list[Node]:
        body = program.body_of(block)
        if block.index == 0 and predictor is not None and any(keep):
            scores.append(predictor_scores(step, program, predictor, inputs))
        if block.index not in unit_of:
            return step.plain_block(block, inputs)
        unit, names = unit_of[block.index]
        updates = [step.cache_in[spec.name] for spec in names.updates]
        forecast = forecast_inputs(names)
        kept = keep[block.index]
        if config.granularity == "module":
            return gated(block, inputs, kept, names)
        if kept == stream.tokens and config.context in ("kept", "full") and config.history == "full_steps":
            return step.plain_block(block, inputs)  # every token among every token
        if kept == 0:
            return skipped(block, inputs, unit, names, forecast)
        index = select(step, plan, block, inputs, kept, names, scores[0] if scores else None)
        written = written_in_p_steps(names, config)
        kept_caches = [step.cache_in[spec.name] for spec in (names.score, *names.flat_context) if spec is not None]
        arguments = [*step.block_weights(block), *inputs]
        arguments += [value.node for value in (index, *forecast, *updates, *kept_caches)]
        results = step.call(
            f"{body.name}_cached_{kept}",
            lambda: cached_region(body, config, stream, kept, names),
            arguments,
            body.num_outputs + len(written),
        )
        for spec, value in zip(written, results[body.num_outputs :], strict=True):
            step.cache_out[spec.name] = step.proxy(value)
        return results[: body.num_outputs]

    return step.finish("P", keep, visit, f"make_cached: keep {list(keep)}, context {config.context}, forecast {config.forecast}")
