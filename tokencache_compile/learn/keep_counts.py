"""How many tokens each cached block keeps in a P-step, from the scores of a calibration (Eq. 12, SPEC section 4).

    α of a batch ─marked_share─▶ share a block ─mean over samples─▶ shares [T, L-K] ─group_profiles─▶ CacheConfig(keep, groups)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.plan import CacheConfig
from tokencache_compile.schedule import is_ints

Profiles = tuple[tuple[int, ...], ...]


def marked_share(alpha: Tensor, ratio: float) -> Tensor:
    """Share of each block's tokens among the globally largest α of a batch (Eq. 12).

    The round((1 − ratio) · L · N · B) largest of all are marked. Among equal ones every block of a token comes before the next
    token, so that equal scores give equal shares.

    Args:
        alpha: scores [B, L, N] of the cached blocks.
        ratio: share of the tokens that is not recomputed, in [0, 1].

    Returns:
        [L], float64, each in [0, 1]; their mean is 1 − ratio.
    """
    CacheConfig(ratio=ratio)
    if alpha.dim() != 3 or not alpha.numel():
        raise ConfigError(f"scores of shape {tuple(alpha.shape)} were given; [B, L, N] of the cached blocks is needed.")
    if bool(alpha.isnan().any()):
        raise ConfigError("scores with NaN were given, which have no order; check the predictor's weights.")
    batch, blocks, tokens = alpha.shape
    largest_first = alpha.transpose(1, 2).flatten().sort(descending=True, stable=True).indices
    marked = largest_first[: round((1.0 - ratio) * alpha.numel())] % blocks
    return torch.bincount(marked, minlength=blocks).double().cpu() / (batch * tokens)


def keep_counts(share: Tensor, tokens: int, ratio: float, multiple: int = 1) -> tuple[int, ...]:
    """Static keep counts n_l: floor(share_l · N), then largest remainders up to round((1 − ratio) · L · N) in all.

    Args:
        share: [L], of :func:`marked_share` at the same ``ratio``, or a mean of such.
        tokens: N.
        multiple: counts are multiples of it, none above N, and their sum is the budget rounded to a multiple (at most what N
            leaves room for). 0 is a legal count: the block only adds its cached update.

    Raises:
        ConfigError: ``share`` is not one of this ratio, or ``multiple`` is not in 1 … N.
    """
    CacheConfig(ratio=ratio)
    if not is_ints((tokens, multiple)) or not 1 <= multiple <= tokens:
        raise ConfigError(f"multiple={multiple!r} of tokens={tokens!r} was asked for; counts are multiples of 1 to N.")
    values: list[float] = share.double().flatten().tolist()
    if share.dim() != 1 or not values or not all(0.0 <= value <= 1.0 for value in values):
        raise ConfigError(f"share={values} of shape {tuple(share.shape)} was given; one share in [0, 1] for each cached block is needed.")
    wanted = (1.0 - ratio) * len(values) * tokens
    most = tokens // multiple
    units = min(round(round(wanted) / multiple), len(values) * most)
    quotas = [value * tokens / multiple for value in values]
    counts = [min(int(quota), most) for quota in quotas]
    if abs(sum(values) * tokens - wanted) > 1.0 or sum(counts) > units:
        raise ConfigError(
            f"ratio={ratio} was asked for, which keeps {wanted:.1f} of {len(values) * tokens} tokens, and the shares keep "
            f"{sum(values) * tokens:.1f}; pass the ratio that they were calibrated with."
        )
    by_remainder = sorted(range(len(values)), key=lambda block: (counts[block] - quotas[block], block))
    while sum(counts) < units:
        for block in by_remainder:
            if counts[block] < most and sum(counts) < units:
                counts[block] += 1
    return tuple(count * multiple for count in counts)


def group_profiles(
    shares: Tensor, p_steps: Sequence[int], tokens: int, ratio: float, groups: int, multiple: int = 1
) -> tuple[Profiles, tuple[int, ...]]:
    """Keep profiles for contiguous groups of P-steps with similar shares: each profile is one more compiled graph.

    The partition minimises the squared distances of the P-steps' shares to their group's mean, exactly, by dynamic
    programming. Groups whose counts come out equal use one profile.

    Args:
        shares: [T, L], shares of every sampling step.
        p_steps: the P-steps, rising.
        groups: at most so many profiles.

    Returns:
        The profiles, and the profile of each of the T sampling steps (an I-step has that of the next P-step): use them as
        ``CacheConfig(keep=profiles, groups=group_of_step)``.

    Raises:
        ConfigError: no P-step or one that is not among the T steps, ``groups`` < 1, or as in :func:`keep_counts`.
    """
    if shares.dim() != 2:
        raise ConfigError(f"shares of shape {tuple(shares.shape)} were given; [T, L] is needed, one row a sampling step.")
    steps = list(p_steps)
    if not steps or not is_ints(tuple(steps)) or steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] >= len(shares):
        raise ConfigError(f"p_steps={steps} was given; one or more rising steps from 0 to {len(shares) - 1} are needed.")
    if not is_ints((groups,)) or groups < 1:
        raise ConfigError(f"groups={groups!r} was asked for; there are 1, 2, 3 … groups of P-steps.")
    rows = shares.double().cpu()[steps]
    bounds = _partition(rows, min(groups, len(steps)))
    found = [keep_counts(rows[a:b].mean(0), tokens, ratio, multiple) for a, b in pairwise(bounds)]
    profiles = tuple(dict.fromkeys(found))
    group_of_step = []
    for step in range(len(shares)):
        position = next((at for at, p_step in enumerate(steps) if p_step >= step), len(steps) - 1)
        group = sum(position >= bound for bound in bounds[1:])
        group_of_step.append(profiles.index(found[group]))
    return profiles, tuple(group_of_step)


def _partition(rows: Tensor, groups: int) -> list[int]:
    """Bounds 0 = b_0 < … < b_groups = P of the contiguous groups of ``rows`` [P, L] nearest to their means."""
    count = len(rows)
    rows = rows - rows.mean(0)  # else the squares below would cancel
    sums = torch.cat([rows.new_zeros(1, rows.shape[1]), rows.cumsum(0)])
    squares = torch.cat([rows.new_zeros(1), rows.square().sum(1).cumsum(0)])
    length = torch.arange(count + 1) - torch.arange(count + 1).unsqueeze(1)
    spread = squares - squares.unsqueeze(1) - (sums - sums.unsqueeze(1)).square().sum(2) / length.clamp_min(1)
    spread = torch.where(length > 0, spread.clamp_min(0.0), torch.inf)  # [first, end]
    best, begins = spread[0], []
    for _ in range(groups - 1):
        best, begin = (best.unsqueeze(1) + spread).min(0)
        begins.append(begin)
    bounds = [count]
    for begin in reversed(begins):
        bounds.insert(0, int(begin[bounds[0]]))
    return [0, *bounds]
