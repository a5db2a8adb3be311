"""Published caching methods as settings of the same compiler (SPEC section 7): what each computes on which step, and at what granularity.

    transform(model, config=baselines.fora(steps=50, interval=3))

Step k counts in sampling order from 0, as everywhere in this project; the methods' own code often counts down from T − 1.
"""

from __future__ import annotations

from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.plan import CacheConfig, Selection
from tokencache_compile.schedule import Schedule


def fora(steps: int, interval: int = 3) -> CacheConfig:
    """FORA: on every ``interval``-th step in full, between them attention and feed-forward outputs held, gated by the step itself.

    Its code counts i = T − 1 − k down and is full where i is divisible by the interval, and on the first step.
    """
    full = tuple(k for k in range(steps) if k == 0 or (steps - 1 - k) % interval == 0)
    return CacheConfig(ratio=1.0, forecast=0, granularity="module", schedule=Schedule(steps, full))


def taylorseer(every: int = 3, order: int = 1) -> CacheConfig:
    """TaylorSeer on modules, as diffusers has it: attention and feed-forward outputs extrapolated to the step."""
    return CacheConfig(ratio=1.0, forecast=order, granularity="module", schedule=Schedule(every))


def deepcache(blocks: int, tokens: int, interval: int = 3, outer: int = 1) -> CacheConfig:
    """DeepCache's analogue for a DiT: between full steps the first and last ``outer`` blocks run, what the middle ones add is held."""
    if not 0 < 2 * outer < blocks:
        raise ConfigError(f"outer={outer} was asked for; of {blocks} blocks at least one must be left in the middle.")
    keep = (tokens,) * outer + (0,) * (blocks - 2 * outer) + (tokens,) * outer
    return _spans((keep,), (), interval)


def delta_dit(blocks: int, tokens: int, span: int, gate: int, interval: int = 2) -> CacheConfig:
    """Δ-DiT: between full steps a span of blocks is left out and what it added is held: the last ``span`` blocks before step ``gate``
    (outlines are drawn early, by the first blocks), the first ``span`` from there on."""
    if not 0 < span < blocks:
        raise ConfigError(f"span={span} was asked for; 1 to {blocks - 1} of {blocks} blocks can be left out.")
    rear = (tokens,) * (blocks - span) + (0,) * span
    return _spans((rear, rear[::-1]), (0,) * gate + (1,), interval)


def tgate(steps: int, blocks: int, gate: int) -> CacheConfig:
    """T-GATE: in full before step ``gate``; from there on cross-attention is held, self-attention and feed-forward run.

    For blocks with those three modules (PixArt). Guidance stays as it is: each row holds its own cross-attention, where T-GATE drops
    the unconditional half. [choice]
    """
    if not 0 < gate < steps:
        raise ConfigError(f"gate={gate} was asked for; of {steps} steps at least one must come before it and one after.")
    schedule = Schedule(steps, tuple(range(gate)))
    return CacheConfig(forecast=0, granularity="module", fresh=(((True, False, True),) * blocks,), schedule=schedule)


def toca(steps: int, blocks: int, tokens: int) -> CacheConfig:
    """ToCa as published for DiT (SPEC section 7): attention held whole, feed-forwards on the tokens of best ``attention`` score.

    What they give stays in the cache. How many tokens depends on block and step, so every P-step is a graph of its own.
    Settings are those of 50 DDIM steps, or from 250 on those of 250. Its code counts i = T − 1 − k down.
    """
    interval, step_weight, block_weight = (4, 0.4, 0.8) if steps >= 250 else (3, 2.0, -0.2)

    def is_full(i: int) -> bool:
        sensitive = int(0.2 * steps) <= i < int(0.4 * steps)
        return i == steps - 1 or i % (2 if sensitive else round(interval / (1.4 - 0.8 * i / steps))) == 0

    def kept(i: int) -> tuple[int, ...]:
        by_step = 1 + step_weight - 2 * step_weight * i / steps
        by_block = [1 + block_weight - 2 * block_weight * block / max(blocks - 1, 1) for block in range(blocks)]
        return tuple(int(min(max(0.07 * share * by_step * 2.5, 0.0), 1.0) * tokens) for share in by_block)

    full = tuple(k for k in range(steps) if is_full(steps - 1 - k))
    keep = [kept(steps - 1 - k) for k in range(steps)]
    distinct = tuple(dict.fromkeys(keep[k] for k in range(steps) if k not in full))
    if not distinct:
        raise ConfigError(f"steps={steps} was asked for; every one of {steps} steps is full by ToCa's schedule. Take more.")
    # An I-step has no profile; it names one that is there.
    groups = tuple(distinct.index(counts) if counts in distinct else 0 for counts in keep)
    return CacheConfig(
        forecast=0, history="computed", scorer="attention", granularity="module", keep=distinct, groups=groups,
        schedule=Schedule(interval, full),
    )  # fmt: skip


def tome(every: int = 4, ratio: float = 0.9, selection: Selection = "sample") -> CacheConfig:
    """ToMe as a selector (SPEC section 7): a random destination in every 4×4 cell is recomputed, and the tokens least like any of these."""
    return CacheConfig(ratio, scorer="tome", selection=selection, schedule=Schedule(every))


def learning_to_cache(router: Tensor, threshold: float = 0.1) -> CacheConfig:
    """Learning-to-Cache: every second step computes only the modules whose gate σ(``router``) exceeds ``threshold``, the others hold.

    Args:
        router: logits [step pairs, blocks, modules of a block]: see :func:`tokencache_compile.learn.router.train_router`.
    """
    profiles: list[tuple[tuple[bool, ...], ...]] = [
        tuple(tuple(bool(value) for value in block) for block in pair) for pair in router.sigmoid() > threshold
    ]
    distinct = tuple(dict.fromkeys(profiles))
    groups = tuple(distinct.index(profile) for profile in profiles for _ in range(2))
    return CacheConfig(forecast=0, granularity="module", fresh=distinct, groups=groups, schedule=Schedule(2))


def _spans(keep: tuple[tuple[int, ...], ...], groups: tuple[int, ...], interval: int) -> CacheConfig:
    """Blocks that run as they are, and blocks that are left out."""
    return CacheConfig(context="full", forecast=0, keep=keep, groups=groups, schedule=Schedule(interval))
