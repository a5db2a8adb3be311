"""Published caching methods as settings of the same compiler (SPEC section 7): what each computes on which step, and at what granularity.

    transform(model, config=baselines.fora(steps=50, interval=3))

Step k counts in sampling order from 0, as everywhere in this project; the methods' own code often counts down from T − 1.
"""

from __future__ import annotations

from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.plan import CacheConfig
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
