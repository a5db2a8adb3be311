"""Budget: where the caches of a plan would take more memory than allowed, more of the last blocks run in full on every step."""

from __future__ import annotations

from dataclasses import replace

from tokencache_compile.errors import ConfigError
from tokencache_compile.ir import BlockProgram, CacheUnit
from tokencache_compile.passes.caches import cache_specs, unit_caches
from tokencache_compile.passes.fold_skipped import fold_skipped
from tokencache_compile.plan import CachePlan


def planned_bytes(program: BlockProgram, plan: CachePlan, units: tuple[CacheUnit, ...]) -> int:
    """Bytes of all caches of one guidance branch, before any of them exists."""
    return sum(spec.nbytes for spec in cache_specs(unit_caches(program, plan, units)))


def fit_budget(program: BlockProgram, plan: CachePlan) -> CachePlan:
    """``plan``, or the one that caches the most first blocks within ``max_cache_bytes``.

    Raises:
        ConfigError: not even one block's caches fit.
    """
    allowed = plan.config.max_cache_bytes
    if allowed is None:
        return plan
    needed = 0
    for cached in range(plan.num_cached, 0, -1):
        shorter = replace(plan, last_k=plan.num_blocks - cached, profiles=tuple(keep[:cached] for keep in plan.profiles))
        needed = planned_bytes(program, shorter, fold_skipped(program, shorter))
        if needed <= allowed:
            return shorter
    raise ConfigError(
        f"max_cache_bytes={allowed} was asked for, and the caches of one block alone take {needed} bytes "
        f"(context {plan.config.context}, forecast {plan.config.forecast}, {plan.config.cache_dtype or program.known_stream.dtype}). "
        "Allow more, pass ratio=0 to cache nothing, a smaller batch, a lower forecast, or a cache_dtype such as \"float8_e4m3fn\"."
    )
