"""Attention within groups of tokens: each token attends to the tokens that carry its own group number.

The same mathematics in two forms. :func:`same_group_mask` holds for any set of tokens, so a block that uses it can run on a
subset of them. :func:`attend_in_groups` needs groups of one size and pays for no pair across groups: the model takes it when
it runs on all tokens, and so does an I-step (``passes/groups.py``), from this one function, so that both give the same bits.

Shapes: query, key, value [B, heads, N, D]; group [B, N] (int64); bias [B, N], added to the scores of each key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def same_group_mask(group: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mask [B, 1, N, N] for ``scaled_dot_product_attention``: which pairs are of one group, or their key's bias and -inf."""
    same = (group[:, :, None] == group[:, None, :])[:, None]
    return same if bias is None else torch.where(same, bias[:, None, None, :], float("-inf"))


def attend_in_groups(query: Tensor, key: Tensor, value: Tensor, group: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
    """Attention [B, heads, N, D] of each token to its group, where the numbers make ``groups`` groups of N / groups tokens."""
    order = group.argsort(dim=1, stable=True)[:, :, None, None]
    back = order.argsort(dim=1)

    def rows(x: Tensor) -> Tensor:
        """Each group becomes a row of the batch: [B, N, heads, D] → [B·groups, heads, N/groups, D]."""
        ordered: Tensor = torch.take_along_dim(x, order, dim=1).unflatten(1, (groups, -1)).flatten(0, 1)
        return ordered.transpose(1, 2)

    mask = None if bias is None else rows(bias[:, :, None, None]).transpose(2, 3)
    query, key, value = rows(query.transpose(1, 2)), rows(key.transpose(1, 2)), rows(value.transpose(1, 2))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    result: Tensor = torch.take_along_dim(out.unflatten(0, (-1, groups)).flatten(1, 2), back, dim=1)
    return result.transpose(1, 2)
