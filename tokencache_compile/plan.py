"""What to cache: the user's wish (:class:`CacheConfig`) and, for one input signature, the static plan (:class:`CachePlan`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, get_args

from tokencache_compile.errors import ConfigError
from tokencache_compile.schedule import Schedule, is_ints

Context = Literal["kept", "cached", "full", "reuse"]
Scorer = Literal["change", "norm", "attention", "random", "tome", "predictor"]
Selection = Literal["sample", "pair", "batch"]
History = Literal["full_steps", "computed"]
Granularity = Literal["block", "module"]
CacheDtype = Literal["float16", "bfloat16", "float8_e4m3fn"]


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} was asked for; {name} is one of {', '.join(map(repr, choices))}.")


def _is_fresh(value: object, depth: int = 3) -> bool:
    """Whether ``value`` is tuples within tuples, ``depth`` of them and none empty, of truth values."""
    if depth == 0:
        return isinstance(value, bool)
    return isinstance(value, tuple) and bool(value) and all(_is_fresh(item, depth - 1) for item in value)


@dataclass(frozen=True)
class CacheConfig:
    """Settings of the cache, before anything is known of the model.

    Attributes:
        ratio: share r of the cached blocks' tokens that a P-step does *not* recompute, in [0, 1]. 0 turns caching off;
            1 recomputes nothing.
        last_k: the last K blocks run in full on every step: the paper's K, there 4 of 28 or 2. 0 measures best at equal MACs.
        context: what a kept token attends to (SPEC section 4): ``kept`` tokens only, keys and values ``cached`` at
            their last computation, recomputed in ``full``, or the attention output reused whole (``reuse``).
        forecast: order of the extrapolation of what is not recomputed: 0 holds the last update (the paper), 1 and 2
            extrapolate each token's own last computed updates. (:func:`transform` without a config takes 0 with samplers that add noise.)
        history: which of a token's updates the cache holds. ``computed``: its last computed ones, those of P-steps included
            (the paper). ``full_steps``: those of I-steps, evenly spaced, which is what a forecast extrapolates well from; what
            a P-step recomputes then serves that step alone.
        scorer: which tokens to keep: those whose update changed most between its last two computations (``change``),
            of largest update (``norm``), ``random``, or the learned ``predictor``. ``attention`` is ToCa's: the attention that a token
            received at the last I-step, more for every ``schedule.every`` steps of age, and more for the best of every 2×2 cell of
            the image's grid. ``tome`` is ToMe's: one random token of every 4×4 cell, then those least like any of these at the
            block's input.
        selection: one index set per ``sample``, per guidance ``pair`` (batch = two halves), or one for the ``batch``.
        schedule: which steps run in full; None is :meth:`Schedule.of_run`, by the number of steps where a scheduler tells it.
        keep: keep profiles, each the tokens kept in every cached block; None is one profile of equal counts.
        groups: the profile of every P-step by step index (the last entry goes on); empty uses the first for all.
        granularity: what a cache holds. ``block``: the whole update of a block, gates included. ``module``: what its attentions and its
            feed-forward give, before the gates; a P-step gates and adds them with its own conditioning (FORA, TaylorSeer).
        fresh: with ``module``, instead of kept tokens: profiles of which modules a P-step computes on every token, a truth value for
            each module of each cached block in the order in which the block runs them. ``groups`` names the profile of a step.
        cache_dtype: what updates and what the context keeps are stored in; None keeps the model's own dtype. Values beyond a
            dtype's largest (448 for ``float8_e4m3fn``) are stored as that.
        max_cache_bytes: the most that the caches of one guidance branch may take, in bytes; the last blocks that do not fit run in full.
        step_weights: the forecast of every step of a run of so many steps, instead of an extrapolation by step numbers: what the updates
            of the last ``forecast`` + 1 I-steps are weighted with, newest first (``learn/step_weights.py`` fits them).
    """

    ratio: float = 0.9
    last_k: int = 0
    context: Context = "reuse"
    forecast: int = 2
    history: History = "full_steps"
    scorer: Scorer = "random"
    selection: Selection = "sample"
    schedule: Schedule | None = None
    keep: tuple[tuple[int, ...], ...] | None = None
    groups: tuple[int, ...] = ()
    granularity: Granularity = "block"
    fresh: tuple[tuple[tuple[bool, ...], ...], ...] = ()
    cache_dtype: CacheDtype | None = None
    max_cache_bytes: int | None = None
    step_weights: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0.0 <= self.ratio <= 1.0:
            raise ConfigError(
                f"ratio={self.ratio!r} was asked for; the cache ratio is a number in [0, 1] (0.9 recomputes a tenth of the tokens)."
            )
        if not is_ints((self.last_k,)) or self.last_k < 0:
            raise ConfigError(f"last_k={self.last_k!r} was asked for; it is the number of last blocks never cached, 0 or more.")
        if not is_ints((self.forecast,)) or self.forecast not in (0, 1, 2):
            raise ConfigError(f"forecast={self.forecast!r} was asked for; the order of the forecast is 0 (hold), 1 or 2.")
        _choice("context", self.context, get_args(Context))
        _choice("history", self.history, get_args(History))
        _choice("scorer", self.scorer, get_args(Scorer))
        _choice("selection", self.selection, get_args(Selection))
        _choice("granularity", self.granularity, get_args(Granularity))
        if self.granularity == "module" and self.context != "reuse":
            raise ConfigError(
                f'granularity="module" was asked for with context={self.context!r}; it caches attention outputs, so it needs '
                'context="reuse".'
            )
        if self.granularity == "module" and self.history == "computed" and (self.forecast or self.fresh):
            raise ConfigError(
                f'granularity="module" with history="computed" was asked for with forecast={self.forecast!r} and {len(self.fresh)} '
                "profiles in fresh; attention is computed at I-steps alone, so it needs forecast=0 and none."
            )
        if self.granularity == "module" and self.scorer == "change":
            raise ConfigError('granularity="module" keeps no updates whose change scorer="change" could measure; use "norm" or another.')
        if self.scorer == "attention" and (self.granularity, self.history) != ("module", "computed"):
            raise ConfigError(
                f'scorer="attention" was asked for with granularity={self.granularity!r} and history={self.history!r}; it goes with '
                'granularity="module" and history="computed".'
            )
        if self.fresh and (self.granularity != "module" or self.keep is not None or not _is_fresh(self.fresh)):
            raise ConfigError(
                f"fresh={self.fresh!r} was asked for; it is a tuple of profiles, each with a tuple of truth values for every cached "
                'block, and goes with granularity="module" and without keep.'
            )
        if not isinstance(self.schedule, Schedule | None):
            raise ConfigError(f"schedule={self.schedule!r} was asked for; pass a tokencache_compile.Schedule, or None for the default.")
        if self.keep is not None and not (isinstance(self.keep, tuple) and self.keep and all(map(is_ints, self.keep))):
            raise ConfigError(f"keep={self.keep!r} was asked for; it is a tuple of keep profiles, each a tuple of token counts.")
        if self.cache_dtype is not None:
            _choice("cache_dtype", self.cache_dtype, get_args(CacheDtype))
        if self.max_cache_bytes is not None and (not is_ints((self.max_cache_bytes,)) or self.max_cache_bytes < 0):
            raise ConfigError(f"max_cache_bytes={self.max_cache_bytes!r} was asked for; it is a number of bytes, or None for no limit.")
        if self.step_weights:
            self._check_step_weights()
        if not is_ints(self.groups):
            raise ConfigError(f"groups={self.groups!r} was asked for; it is a tuple with the index of a keep profile for every step.")

    def _check_step_weights(self) -> None:
        if not self.forecast or self.history != "full_steps":
            raise ConfigError(
                f"step_weights were given with forecast={self.forecast} and history={self.history!r}; they weight the updates of I-steps, "
                'so they need forecast=1 or 2 and history="full_steps".'
            )
        values = [value for row in self.step_weights for value in row]
        if any(len(row) != self.forecast + 1 for row in self.step_weights) or not all(map(math.isfinite, values)):
            raise ConfigError(
                f"step_weights of {sorted({len(row) for row in self.step_weights})} values a step were given; forecast={self.forecast} "
                f"needs {self.forecast + 1} finite numbers for each step of the run."
            )

    def nodes(self, step: int) -> tuple[int, ...]:
        """The last ``forecast`` + 1 I-steps before ``step`` of the run that the step weights are for, newest first; -1 for none."""
        schedule = self.schedule_of(len(self.step_weights))
        before = [earlier for earlier in range(step - 1, -1, -1) if schedule.is_full(earlier)][: self.forecast + 1]
        return (*before, *[-1] * (self.forecast + 1 - len(before)))

    @property
    def extras(self) -> tuple[str, ...]:
        """What a step graph takes beside the model's tensors and the caches: its index, and scores drawn at random if it uses them."""
        return ("step", "random_scores") if self.scorer in ("random", "tome") else ("step",)

    def schedule_of(self, steps: int | None) -> Schedule:
        """Which of a run's ``steps`` sampling steps run in full; ``steps`` is None where their number is not known."""
        return Schedule.of_run(steps) if self.schedule is None else self.schedule

    @classmethod
    def paper(cls, ratio: float = 0.9, steps: int = 50, full_steps: int = 12) -> CacheConfig:
        """The paper to the letter: attention among kept tokens, held updates, the predictor, K = 4 (2 for 250 steps).

        ``full_steps`` is the paper's #Full (Table I: 50, 12, 9, 6 for 250, 50, 20, 10 steps at 256²). Needs a predictor.
        """
        schedule = Schedule.uniform(steps, full_steps)
        return cls(ratio, 2 if steps >= 250 else 4, "kept", 0, "computed", "predictor", "sample", schedule)


@dataclass(frozen=True)
class CachePlan:
    """Everything static about the cached graphs of one model and input signature.

    Attributes:
        config: the settings the plan was made from.
        tokens: N, tokens of the cached stream.
        num_blocks: L, and ``last_k`` of them are never cached: the K asked for, or more where ``max_cache_bytes`` ended earlier.
        profiles: keep counts n_l of the cached blocks, one profile a P-graph.
    """

    config: CacheConfig
    tokens: int
    num_blocks: int
    last_k: int
    profiles: tuple[tuple[int, ...], ...]

    @property
    def num_cached(self) -> int:
        return self.num_blocks - self.last_k

    def fresh_of(self, profile: int, block: int) -> tuple[bool, ...]:
        """Which modules of a cached block the P-graph ``profile`` computes on every token; none is said where it keeps tokens instead."""
        return self.config.fresh[profile][block] if self.config.fresh else ()

    def profile_of(self, step: int) -> int:
        """Which P-graph serves step ``step``."""
        groups = self.config.groups
        return groups[min(step, len(groups) - 1)] if groups else 0

    def __str__(self) -> str:
        c = self.config
        keeps = "; ".join(_counts(profile) for profile in self.profiles)
        lines = (
            f"CachePlan: {self.num_cached} of {self.num_blocks} blocks cached, {self.tokens} tokens, ratio {c.ratio}\n"
            f"  kept tokens a block   {keeps}\n"
            f"  context {c.context}, forecast order {c.forecast} from {c.history}, scores {c.scorer}, one index set per {c.selection}\n"
            f"  I-steps               {c.schedule or 'every 2nd to 4th step, by the number of steps, and the last one'}"
        )
        if c.granularity == "module":
            lines += "\n  granularity           module: attention and feed-forward outputs, gated by the step itself"
        for number, fresh in enumerate(c.fresh):
            lines += f"\n  fresh, profile {number:<6} {sum(map(sum, fresh))} of {sum(map(len, fresh))} modules"
        if c.step_weights:
            lines += f"\n  step weights          fitted for {len(c.step_weights)} steps"
        if c.cache_dtype is not None:
            lines += f"\n  caches stored as      {c.cache_dtype}"
        if self.last_k > c.last_k:
            lines += f"\n  max_cache_bytes       {c.max_cache_bytes}, so {self.last_k} last blocks run in full and not {c.last_k}"
        return lines


def _counts(profile: tuple[int, ...]) -> str:
    """(6, 6, 6, 0) → "6 in 3 blocks, 0 in 1 block"."""
    runs = [(kept, len(list(run))) for kept, run in groupby(profile)]
    return ", ".join(f"{kept} in {length} block{'s' if length > 1 else ''}" for kept, length in runs)


def resolve_plan(config: CacheConfig, num_blocks: int, tokens: int, must_share: bool, batch: int) -> CachePlan:
    """Fix the keep counts for a model of ``num_blocks`` blocks and ``tokens`` tokens.

    ``must_share``: a block's per-token side input has no batch axis, so the whole batch keeps the same tokens.

    Raises:
        ConfigError: no block is left to cache, or ``keep`` does not fit the model.
    """
    cached = num_blocks - config.last_k
    if cached <= 0:
        raise ConfigError(
            f"last_k={config.last_k} was asked for and the model has {num_blocks} blocks, so none is left to cache. "
            f"Pass last_k={num_blocks - 1} or less, or leave it out."
        )
    for fresh in config.fresh:
        if len(fresh) != cached:
            raise ConfigError(f"fresh={fresh} was asked for; {cached} entries are needed, one a cached block.")
    profiles = ((0,) * cached,) * len(config.fresh) if config.fresh else config.keep
    if profiles is None:
        # Equal counts, rounded once: one body for all blocks, where largest remainders would make two.
        profiles = ((int((1.0 - config.ratio) * tokens + 0.5),) * cached,)
    for keep in profiles:
        if len(keep) != cached or any(not 0 <= n <= tokens for n in keep):
            raise ConfigError(f"keep={keep} was asked for; {cached} counts from 0 to {tokens} are needed, one a cached block.")
    if any(not 0 <= group < len(profiles) for group in config.groups):
        raise ConfigError(f"groups={config.groups} was asked for; there are {len(profiles)} keep profiles to name.")
    if config.selection == "pair" and batch % 2:
        raise ConfigError(f'selection="pair" was asked for; a batch of {batch} has no two halves. Use selection="sample" or "batch".')
    if must_share and config.selection != "batch":
        config = replace(config, selection="batch")
    return CachePlan(config, tokens, num_blocks, config.last_k, profiles)
