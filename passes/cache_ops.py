"""The tensor operations a cached graph is made of, in plain torch.

They are called with ``torch.fx`` proxies when a graph is built, and with tensors by whoever wants to check them.
Shapes: stream and updates [B, N, C]; index [B, n] (int64); stamps [B, N, m+1] or, one list for all tokens, [1, 1, m+1] (float32);
score [B, N] (float32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokencache_compile.ir import CacheSpec

# An even spacing extrapolated by one more of it has weights 3, -3, 1. Measured: beyond that a forecast loses to a lower order.
AMPLIFICATION = 7.0

# ToCa's weights: of a token's age, in intervals between I-steps, and of the best token of a cell.
AGE_WEIGHT, CELL_BONUS = 0.25, 0.6

# Rows and columns of a cell of tokens: ToCa raises the best of one, ToMe has one destination in each.
TOCA_CELL, TOME_CELL = 2, 4


def token_rows(index: Tensor, batch: int, tokens: int) -> Tensor:
    """Row numbers [B·n] of the selected tokens in a tensor whose batch and token axes are flattened."""
    first = torch.arange(0, batch * tokens, tokens, device=index.device)
    return (index + first.unsqueeze(1)).flatten()


def take_tokens(value: Tensor, rows: Tensor, batch: int, kept: int) -> Tensor:
    """The selected tokens [B, n, …] of ``value`` [B, N, …]: whole rows, one copy each."""
    taken: Tensor = value.flatten(0, 1).index_select(0, rows).unflatten(0, (batch, kept))
    return taken


def put_tokens(value: Tensor, rows: Tensor, new: Tensor, batch: int, tokens: int) -> Tensor:
    """``value`` [B, N, …] with the selected tokens replaced by ``new`` [B, n, …]; the others are bit-identical."""
    changed: Tensor = value.flatten(0, 1).index_copy(0, rows, new.flatten(0, 1)).unflatten(0, (batch, tokens))
    return changed


def select_tokens(scores: Tensor, kept: int, selection: str, batch: int) -> Tensor:
    """Index [B, n] of the ``kept`` best tokens by ``scores`` [B or 1, N], one set per sample, guidance pair or batch."""
    if selection == "batch":
        scores = scores.mean(0, keepdim=True)
    elif selection == "pair":
        first, second = scores.expand(batch, -1).chunk(2, 0)
        scores = torch.cat([first + second, first + second])
    return torch.topk(scores, kept, dim=1, sorted=False).indices.expand(batch, -1)


def forecast_weights(stamps: Tensor, step: Tensor, order: int) -> list[Tensor]:
    """Weights [B, N, 1] of a token's last m+1 updates whose weighted sum extrapolates to ``step`` (Newton form, SPEC section 4).

    A stamp is the step at which that update was computed, -1 for never. The order falls where a token has fewer values, and
    where the weights would magnify the values' errors by more than :data:`AMPLIFICATION`. The weights sum to 1; order 0 needs
    none.
    """
    if order == 0:
        return []
    s0, s1 = stamps[..., 0:1], stamps[..., 1:2]
    slope = torch.where(s1 >= 0, (step - s0) / (s0 - s1), 0.0)
    line = torch.where(1.0 + 2.0 * slope.abs() <= AMPLIFICATION, slope, 0.0)
    if order == 1:
        return [1.0 + line, -line]
    s2 = stamps[..., 2:3]
    bend = torch.where(s2 >= 0, (step - s0) * (step - s1) / (s0 - s2), 0.0)
    newer = torch.where(s2 >= 0, bend / (s0 - s1), 0.0)
    older = torch.where(s2 >= 0, bend / (s1 - s2), 0.0)
    first, second = 1.0 + slope + newer, -slope - newer - older
    steady = first.abs() + second.abs() + older.abs() <= AMPLIFICATION
    return [torch.where(steady, first, 1.0 + line), torch.where(steady, second, -line), torch.where(steady, older, 0.0)]


def fitted_weights(stamps: Tensor, step: Tensor, order: int, weights: Tensor, nodes: Tensor) -> list[Tensor]:
    """The row of ``weights`` [T, m+1] for ``step``, as weights [1, 1, 1] of the last m+1 updates.

    They are for updates of the I-steps in that row of ``nodes`` [T, m+1]. Where ``stamps`` [1, 1, m+1] say others, as they do for a
    guidance branch that began in the middle of the run, the forecast is that of :func:`forecast_weights`.
    """
    row = step.clamp(0, weights.shape[0] - 1).to(torch.int64).reshape(1)
    own, expected = (table.index_select(0, row).unsqueeze(0) for table in (weights, nodes))
    known = (stamps - expected).abs().sum(-1, keepdim=True) == 0
    return [torch.where(known, own[..., i : i + 1], value) for i, value in enumerate(forecast_weights(stamps, step, order))]


def extrapolate(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The weighted sum of ``values``, newest first, in their own dtype; without ``weights`` the newest as it is."""
    if not weights:
        return values[0]
    total = values[0].float() * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = torch.addcmul(total, value.float(), weight)
    return total.type_as(values[0])


def add_forecast(stream: Tensor, updates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``stream`` plus what each token's block would have added: its last update, or with ``weights`` the extrapolated one."""
    if not weights:
        return stream + updates[0]
    total = stream.float()
    for update, weight in zip(updates, weights, strict=True):
        total = torch.addcmul(total, update.float(), weight)
    return total.type_as(stream)


def load(value: Tensor, spec: CacheSpec) -> Tensor:
    """A cache's values in the dtype that they are computed in."""
    return value if spec.dtype == spec.computed else value.to(spec.computed)


def store(value: Tensor, spec: CacheSpec) -> Tensor:
    """Values as the cache keeps them; where its dtype ends earlier, at the largest that it has."""
    if spec.dtype == spec.computed:
        return value
    largest = torch.finfo(spec.dtype).max
    return value.clamp(-largest, largest).to(spec.dtype)


def update_score(update: Tensor, previous: Tensor | None) -> Tensor:
    """Norm over channels of an update, or of its change since the ``previous`` one: float32, one value a token."""
    change = update.float() if previous is None else update.float() - previous.float()
    norm: Tensor = torch.linalg.vector_norm(change, dim=-1)
    return norm


def attention_received(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """What each token got of every query's attention, mean over heads, scaled to length 1: [B, N] float32, of [B, heads, N, D]."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.softmax((query @ key.transpose(-1, -2)).float() * factor, dim=-1)
    return torch.nn.functional.normalize(weights.mean(1).sum(1), dim=1)


def toca_score(received: Tensor, stamps: Tensor, step: Tensor, interval: int, grid: tuple[int, int]) -> Tensor:
    """ToCa's score [B, N] of tokens on a ``grid``: attention ``received`` and age, the best of every 2×2 cell raised.

    Age counts the steps since the one after a token was computed: 0 for all at the first step behind an I-step.
    """
    score = received + AGE_WEIGHT / interval * (step - stamps.squeeze(-1) - 1)
    rows, columns = (length // TOCA_CELL for length in grid)
    cells = score.unflatten(1, (rows, TOCA_CELL, columns, TOCA_CELL))
    best = cells.amax((2, 4), keepdim=True)
    return torch.where(cells == best, (1 + CELL_BONUS) * cells, cells).flatten(1)


def tome_score(x: Tensor, draws: Tensor, grid: tuple[int, int]) -> Tensor:
    """ToMe as a selector: score [B, N] of the tokens ``x`` [B, N, C] on a ``grid``.

    The token of largest draw in every 4×4 cell is a destination, by ``draws`` [N] in [0, 1). Destinations come first, in the order of their
    draws; all others, the sources, follow by how little they resemble (cosine) the destination that they resemble most.
    """
    rows, columns = (length // TOME_CELL for length in grid)

    def by_cell(values: Tensor) -> Tensor:
        """[N] → [cells, tokens of a cell]."""
        cells: Tensor = values.unflatten(0, (rows, TOME_CELL, columns, TOME_CELL))
        return cells.transpose(1, 2).flatten(2).flatten(0, 1)

    best = by_cell(draws).argmax(1, keepdim=True)
    places = by_cell(torch.arange(grid[0] * grid[1], device=draws.device)).gather(1, best).squeeze(1)
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    resembles = (unit @ unit.index_select(1, places).transpose(1, 2)).amax(-1)
    # A cosine lies in [-1, 1], a destination's own is 1: with 3 more it stands above every source.
    return torch.zeros_like(draws).index_copy(0, places, 3 + draws.index_select(0, places)) - resembles
