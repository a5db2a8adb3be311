"""Which cache tensors a plan needs: the same list, in the same order, for every step graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokencache_compile.ir import BlockProgram, CacheSpec, CacheUnit
from tokencache_compile.plan import CacheConfig, CachePlan


@dataclass(frozen=True)
class UnitCaches:
    """The caches of one unit, by what they hold."""

    updates: tuple[CacheSpec, ...]
    stamps: CacheSpec | None
    score: CacheSpec | None
    context: tuple[CacheSpec, ...]

    @property
    def all(self) -> tuple[CacheSpec, ...]:
        return (*self.updates, *self.single, *self.context)

    @property
    def single(self) -> tuple[CacheSpec, ...]:
        """Stamps and score, where there are any."""
        return tuple(spec for spec in (self.stamps, self.score) if spec is not None)


def written_in_p_steps(caches: UnitCaches, config: CacheConfig) -> tuple[CacheSpec, ...]:
    """The caches of a unit that a P-step changes: the history if it takes computed updates, keys and values if cached."""
    history = (*caches.updates, *caches.single) if config.history == "computed" else ()
    return (*history, *(caches.context if config.context == "cached" else ()))


def _context_caches(program: BlockProgram, plan: CachePlan, unit: CacheUnit) -> tuple[CacheSpec, ...]:
    stream = program.known_stream
    body = program.body_of(program.blocks[unit.first])
    nodes = {n.name: n for n in body.graph_module.graph.nodes}
    specs = []
    for number, attention in enumerate(body.known_roles.attentions):
        suffix = f"{unit.name}_{number}" if len(body.known_roles.attentions) > 1 else unit.name
        if plan.config.context == "cached":
            for name, part in zip(("key", "value"), nodes[attention.node].args[1:3], strict=True):
                rest = _per_token_shape(part)
                specs.append(CacheSpec(f"{name}_{suffix}", (stream.batch, stream.tokens, *rest), part.meta["val"].dtype))
        elif plan.config.context == "reuse":
            output = nodes[attention.output].meta["val"]
            specs.append(CacheSpec(f"attention_{suffix}", (stream.batch, stream.tokens, int(output.shape[-1])), output.dtype))
    return tuple(specs)


def _per_token_shape(node: object) -> tuple[int, ...]:
    """[B, heads, N, D] → (heads, D); [B, N, D] → (D,)."""
    shape = node.meta["val"].shape  # type: ignore[attr-defined]
    return (int(shape[1]), int(shape[3])) if len(shape) == 4 else (int(shape[2]),)


def unit_caches(program: BlockProgram, plan: CachePlan, units: Sequence[CacheUnit]) -> tuple[UnitCaches, ...]:
    """The caches of every unit."""
    stream, config = program.known_stream, plan.config
    grid = (stream.batch, stream.tokens)
    found = []
    for unit in units:
        updates = tuple(CacheSpec(f"update_{unit.name}_{i}", (*grid, stream.channels), stream.dtype) for i in range(config.forecast + 1))
        stamps = CacheSpec(f"stamps_{unit.name}", (*grid, config.forecast + 1), torch.float32, -1.0) if config.forecast else None
        scored = config.scorer in ("change", "norm") and not unit.skipped
        score = CacheSpec(f"score_{unit.name}", grid, torch.float32) if scored else None
        context = () if unit.skipped else _context_caches(program, plan, unit)
        found.append(UnitCaches(updates, stamps, score, context))
    return tuple(found)
