"""Which cache tensors a plan needs: the same list, in the same order, for every step graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import BlockProgram, CacheSpec, CacheUnit
from tokencache_compile.opaque_modules import ON_GRID
from tokencache_compile.passes.modules import reused_outputs
from tokencache_compile.plan import CacheConfig, CachePlan

SHARED_STAMPS = "stamps"


@dataclass(frozen=True)
class UnitCaches:
    """The caches of one unit, by what they hold."""

    updates: tuple[CacheSpec, ...]
    stamps: CacheSpec | None
    score: CacheSpec | None
    context: tuple[tuple[CacheSpec, ...], ...]
    companions: tuple[tuple[CacheSpec, ...], ...]
    companion_stamps: CacheSpec | None

    @property
    def all(self) -> tuple[CacheSpec, ...]:
        beside = [spec for history in self.companions for spec in history]
        stamps = [self.companion_stamps] if self.companion_stamps is not None else []
        return (*self.updates, *self.single, *self.flat_context, *beside, *stamps)

    @property
    def flat_context(self) -> tuple[CacheSpec, ...]:
        """What the context keeps (keys and values, or attention outputs), each with its older values after it."""
        return tuple(spec for history in self.context for spec in history)

    @property
    def single(self) -> tuple[CacheSpec, ...]:
        """Stamps and score, where there are any."""
        return tuple(spec for spec in (self.stamps, self.score) if spec is not None)


def written_in_p_steps(caches: UnitCaches, config: CacheConfig) -> tuple[CacheSpec, ...]:
    """The caches of a unit that a P-step changes: the history if it takes computed updates, keys and values if cached."""
    history = (*caches.updates, *caches.single) if config.history == "computed" else ()
    return (*history, *(caches.flat_context if config.context == "cached" else ()))


def _values(name: str, shape: Sequence[int], computed: torch.dtype, config: CacheConfig) -> CacheSpec:
    """A cache of what blocks compute, stored as the plan asks."""
    stored = computed if config.cache_dtype is None else getattr(torch, config.cache_dtype)
    return CacheSpec(name, tuple(shape), stored, computed)


def _context_caches(program: BlockProgram, plan: CachePlan, unit: CacheUnit) -> tuple[tuple[CacheSpec, ...], ...]:
    stream = program.known_stream
    body = program.body_of(program.blocks[unit.first])
    roles, nodes = body.known_roles, {n.name: n for n in body.graph_module.graph.nodes}
    specs: list[tuple[CacheSpec, ...]] = []
    context = plan.config.context
    outputs = reused_outputs(body, stream, plan.config)
    unbatched = [a.node for a in roles.attentions if context == "cached" and not a.has_batch]
    unbatched += [o.node for o in outputs if not o.has_batch]
    if unbatched:
        raise UnsupportedModelError(
            program.blocks[unit.first].fqn,
            f"its attention runs sample by sample, so context={plan.config.context!r} has nothing of the whole batch to cache",
            'Use context="kept" or "full".',
        )
    if plan.config.context == "cached":
        for number, attention in enumerate(roles.attentions):
            suffix = f"{unit.name}_{number}" if len(roles.attentions) > 1 else unit.name
            for name, part in zip(("key", "value"), nodes[attention.node].args[1:3], strict=True):
                shape = (stream.batch, stream.tokens, *_per_token_shape(part))
                specs.append((_values(f"{name}_{suffix}", shape, part.meta["val"].dtype, plan.config),))
    elif plan.config.context == "reuse":
        kind = "module" if plan.config.granularity == "module" else "attention"
        # Reused attention is forecast like the updates, where their stamps are its own: those of the I-steps.
        depth = plan.config.forecast + 1 if plan.config.history == "full_steps" else 1
        for number, output in enumerate(outputs):
            suffix = f"{unit.name}_{number}" if len(outputs) > 1 else unit.name
            node = nodes[output.node]
            shape = (stream.batch, output.rows, *_per_token_shape(node))
            dtype = node.meta["val"].dtype
            specs.append(tuple(_values(f"{kind}_{suffix}_{i}", shape, dtype, plan.config) for i in range(depth)))
    elif plan.config.context == "kept":
        on_grid: list[Any] = [n for n in nodes.values() if n.target is ON_GRID]
        for number, node in enumerate(on_grid):
            suffix = f"{unit.name}_{number}" if len(on_grid) > 1 else unit.name
            x, axis, dims = node.args[0].meta["val"], node.args[3], len(node.args[4])
            rest = (*x.shape[1:axis], *x.shape[axis + dims :])
            specs.append((_values(f"grid_{suffix}", (stream.batch, stream.tokens, *map(int, rest)), x.dtype, plan.config),))
    return tuple(specs)


def _companion_caches(program: BlockProgram, plan: CachePlan, unit: CacheUnit) -> tuple[tuple[CacheSpec, ...], ...]:
    """Updates of the streams beside the cached one: only where a P-step skips the unit, for they are computed wherever it runs."""
    if all(keep[unit.first] > 0 for keep in plan.profiles):
        return ()
    return tuple(
        tuple(_values(f"companion_{unit.name}_{number}_{i}", c.shape, c.dtype, plan.config) for i in range(plan.config.forecast + 1))
        for number, c in enumerate(program.body_of(program.blocks[unit.first]).known_roles.companions)
    )


def _per_token_shape(node: object) -> tuple[int, ...]:
    """[B, heads, N, D] → (heads, D); [B, N, D] → (D,)."""
    shape = node.meta["val"].shape  # type: ignore[attr-defined]
    return (int(shape[1]), int(shape[3])) if len(shape) == 4 else (int(shape[2]),)


def _stamps(config: CacheConfig, unit: CacheUnit, grid: tuple[int, int]) -> CacheSpec:
    """The steps at which a token's updates were computed; one list for all tokens of all units where only I-steps enter the history."""
    if config.history == "full_steps":
        return _i_step_stamps(config)
    return CacheSpec(f"stamps_{unit.name}", (*grid, config.forecast + 1), torch.float32, torch.float32, -1.0)


def _i_step_stamps(config: CacheConfig) -> CacheSpec:
    return CacheSpec(SHARED_STAMPS, (1, 1, config.forecast + 1), torch.float32, torch.float32, -1.0)


def cache_specs(caches: Sequence[UnitCaches]) -> tuple[CacheSpec, ...]:
    """The caches of a program in the order of its graphs' inputs, each once."""
    return tuple(dict.fromkeys(spec for unit in caches for spec in unit.all))


def unit_caches(program: BlockProgram, plan: CachePlan, units: Sequence[CacheUnit]) -> tuple[UnitCaches, ...]:
    """The caches of every unit."""
    stream, config = program.known_stream, plan.config
    found = []
    for unit in units:
        body = program.body_of(program.blocks[unit.first])
        grid = (stream.batch, stream.tokens + body.known_roles.layout.others)
        shape = (*grid, stream.channels)
        depth = 0 if config.granularity == "module" else config.forecast + 1
        updates = tuple(_values(f"update_{unit.name}_{i}", shape, stream.dtype, config) for i in range(depth))
        stamps = _stamps(config, unit, grid) if config.forecast or config.scorer == "attention" else None
        scored = config.scorer in ("change", "norm", "attention") and not unit.skipped
        score = CacheSpec(f"score_{unit.name}", (stream.batch, stream.tokens), torch.float32, torch.float32) if scored else None
        context = () if unit.skipped else _context_caches(program, plan, unit)
        companions = _companion_caches(program, plan, unit)
        # What a P-step computes of a companion does not enter its history.
        companion_stamps = _i_step_stamps(config) if companions and config.forecast else None
        found.append(UnitCaches(updates, stamps, score, context, companions, companion_stamps))
    return tuple(found)
