"""Strategies that choose the I-steps of a run (SPEC section 5). Each returns a :class:`Schedule` with its I-steps listed.

``by_mass`` is the paper's Eq. 13; ``optimal`` minimises measured errors (see :mod:`interval_errors`) and needs no scores.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.schedule import Schedule, is_ints


def _listed(full: Sequence[int], steps: int) -> Schedule:
    """A schedule of exactly these I-steps in a run of ``steps`` (``every`` begins past its end)."""
    return Schedule(steps - full[-1], tuple(full))


def _check_counts(steps: int, full_steps: int = 1) -> None:
    if not is_ints((steps, full_steps)) or not 1 <= full_steps <= steps:
        raise ConfigError(f"{full_steps!r} I-steps of {steps!r} were asked for; from one up to the number of steps are possible.")


def by_mass(
    mean_alpha: Sequence[float], full_steps: int, beta: float, *, accumulated: bool = False, relative: bool = False
) -> Schedule:
    """I-steps at equal masses of exp(β·ᾱ) (Eq. 13 as SPEC section 5 reads it).

    With w_k = exp(β·ᾱ_k − max β·ᾱ) and F its normalised cumulative sum, the I-steps are those where F crosses j / n for
    j = 0 … n−1. Where several fall together, the heaviest interval is split at the middle of its mass (of its length, if it has
    no mass) until there are n.

    Args:
        mean_alpha: ᾱ of every sampling step, in sampling order.
        full_steps: n.
        beta: negative puts I-steps where α is small. The paper's −2000 to −8000 only fit an ᾱ that varies by about 1e-3.
        accumulated: sum cumulatively once more (the double sum as printed) before normalising.
        relative: ``beta`` is in units of 1 / std(ᾱ) (over the steps).

    Raises:
        ConfigError: a value is not finite, ``full_steps`` is not in 1 … T, or ``relative`` with an ᾱ that does not vary.
    """
    alpha = [float(value) for value in mean_alpha]
    _check_counts(len(alpha), full_steps)
    if not all(map(math.isfinite, [*alpha, beta])):
        raise ConfigError(f"beta={beta} and mean_alpha={alpha} were given; finite numbers are needed.")
    if relative:
        spread = statistics.pstdev(alpha)
        if spread == 0.0:
            raise ConfigError("relative=True was asked for and mean_alpha is the same at every step; pass an absolute beta.")
        beta = beta / spread
    exponents = [beta * value for value in alpha]
    mass = [math.exp(exponent - max(exponents)) for exponent in exponents]
    if accumulated:
        mass = list(accumulate(mass))
    before = list(accumulate(mass, initial=0.0))  # mass before each step, and in all
    full = {0} | {_crossing(before, j * before[-1] / full_steps) for j in range(1, full_steps)}
    while len(full) < full_steps:
        intervals = [(a, b) for a, b in pairwise([*sorted(full), len(alpha)]) if b - a > 1]
        first, end = max(intervals, key=lambda pair: (before[pair[1]] - before[pair[0]], pair[1] - pair[0]))
        massless = before[first] == before[end]  # exp() fell to 0
        middle = (first + end) // 2 if massless else _crossing(before, (before[first] + before[end]) / 2)
        full.add(min(max(middle, first + 1), end - 1))
    return _listed(sorted(full), len(alpha))


def _crossing(before: Sequence[float], level: float) -> int:
    """The step within which the cumulative mass rises above ``level``."""
    return next(step for step in range(len(before) - 1) if before[step + 1] > level)


def reverse(schedule: Schedule, steps: int) -> Schedule:
    """The schedule whose interval lengths come in the reverse order, over a run of ``steps`` (Table VIII's "reverse")."""
    _check_counts(steps)
    bounds = [*(step for step in range(steps) if schedule.is_full(step)), steps]
    lengths = [b - a for a, b in pairwise(bounds)]
    return _listed(list(accumulate(reversed(lengths[1:]), initial=0)), steps)


def remap(schedule: Schedule, steps: int, new_steps: int) -> Schedule:
    """A schedule made for ``steps`` sampling steps carried over to ``new_steps``: I-steps are as dense at each part of the run.

    There are round(n · new_steps / steps) I-steps, at least 1, at the relative positions that the n old ones have, or
    between them (linearly) where there are more or fewer.
    """
    _check_counts(steps)
    _check_counts(new_steps)
    bounds = [*(step for step in range(steps) if schedule.is_full(step)), steps]
    old = len(bounds) - 1
    new = max(1, round(old * new_steps / steps))
    full: list[int] = []
    for index in range(new):
        whole, part = divmod(index * old, new)
        position = bounds[whole] + (bounds[whole + 1] - bounds[whole]) * part / new
        earliest = full[-1] + 1 if full else 0
        full.append(min(max(round(position * new_steps / steps), earliest), new_steps - new + index))
    return _listed(full, new_steps)


def optimal(costs: Tensor, steps: int, full_steps: int) -> Schedule:
    """The schedule of ``full_steps`` I-steps with the least sum of errors over the P-steps, by dynamic programming.

    The state is an I-step, the gap to the one before it and how many were used; exact where an error depends on no more.

    Args:
        costs: [T, G+1, G] of :func:`interval_errors`: ``costs[i, g, d]`` is the error of the P-step ``d`` steps after I-step
            ``i``, with the I-step before it at ``i − g`` (g = 0: there was none). G is the largest gap, the one to the end of
            the run included.

    Raises:
        ConfigError: ``costs`` does not fit, or no schedule has so many I-steps, gaps up to G and finite errors.
    """
    _check_counts(steps, full_steps)
    gaps = costs.shape[-1] if costs.dim() == 3 else 0
    if gaps < 1 or tuple(costs.shape) != (steps, gaps + 1, gaps) or bool(costs.isnan().any()):
        raise ConfigError(f"costs of shape {tuple(costs.shape)} were given; [{steps}, G+1, G] of interval_errors without NaN is needed.")
    errors = costs.double().cpu().clone()
    errors[..., 0] = 0.0
    interval = errors.cumsum(2)  # [i, g, h-1]: all P-steps of an interval of h steps
    best = torch.full((steps, gaps + 1), torch.inf, dtype=torch.float64)  # of the steps before I-step i, entered over gap g
    best[0, 0] = 0.0
    came: list[Tensor] = []  # the gap before i, for each number of I-steps used, and each following gap
    for _ in range(full_steps - 1):
        least, gap = (best.unsqueeze(2) + interval).min(1)
        came.append(gap)
        best = torch.full_like(best, torch.inf)
        for h in range(1, min(gaps, steps - 1) + 1):
            best[h:, h] = least[: steps - h, h - 1]
    total, gap = (best.unsqueeze(2) + interval).min(1)
    came.append(gap)
    last = min(range(max(0, steps - gaps), steps), key=lambda i: float(total[i, steps - i - 1]))
    if not math.isfinite(float(total[last, steps - last - 1])):
        raise ConfigError(
            f"{full_steps} I-steps of {steps} were asked for, and none of their schedules has gaps up to {gaps} and finite errors. "
            f"Ask for at least {-(-steps // gaps)} I-steps, or measure larger gaps."
        )
    full, length = [last], steps - last
    for used in reversed(range(1, full_steps)):
        length = int(came[used][full[0], length - 1])
        full.insert(0, full[0] - length)
    return _listed(full, steps)
