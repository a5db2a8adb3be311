"""Independent reference of Open-Sora-Plan v1.3 and of its cached sampling, from a state dict alone.

One sample at a time, its tokens as rows [N, C]; attention one group of tokens and one head at a time. Shares no code with
`tokencache_compile`. Held updates; scores from outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def groups_of(tokens: int, sparse_n: int, block: int) -> list[list[int]]:
    """The lists of tokens that attend to each other in a block: the published report's single skip, group skip, or all of them."""
    if not 2 <= block < 30 or sparse_n == 1:
        return [list(range(tokens))]
    if block % 2 == 0:
        return [list(range(start, tokens, sparse_n)) for start in range(sparse_n)]
    runs = [range(start, min(start + sparse_n, tokens)) for start in range(0, tokens, sparse_n)]
    return [[token for run in runs[first::sparse_n] for token in run] for first in range(sparse_n)]


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Heads [n, heads, D] of tokens at ``places`` [n, 3], turned as complex numbers: a third of D for frame, row and column."""
    parts = []
    for axis, part in enumerate(x.chunk(3, dim=-1)):
        real, imaginary = part.chunk(2, dim=-1)
        count = real.shape[-1]
        frequency = torch.tensor([10000.0 ** (-i / count) for i in range(count)])
        turn = torch.polar(torch.ones(len(x), count), places[:, axis : axis + 1] * frequency)
        turned = torch.complex(real, imaginary) * turn[:, None]
        parts += [turned.real, turned.imag]
    return torch.cat(parts, dim=-1)


@dataclass
class Conditions:
    """What one sample's blocks see besides the stream."""

    factors: Tensor  # [6, C]
    text: Tensor  # [T, C]
    places: Tensor  # [N, 3]
    token_bias: Tensor  # [N]
    text_bias: Tensor  # [T]


@dataclass
class State:
    """What one cached block of one sample remembers."""

    update: Tensor
    key: Tensor
    value: Tensor
    attention: Tensor


@dataclass
class PlainOpenSora:
    """The model; ``config`` has the published keys."""

    weights: Weights
    config: Any
    states: dict[tuple[int, int], State] = field(default_factory=dict)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def normed(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def heads(self, name: str, x: Tensor) -> Tensor:
        return self.linear(name, x).reshape(len(x), self.config.num_attention_heads, -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Queries [n, heads, D] to keys [m, heads, D] with ``bias`` [m]: [n, heads·D]."""
        heads = []
        for head in range(query.shape[1]):
            scores = query[:, head] @ key[:, head].T / math.sqrt(query.shape[-1]) + bias
            heads.append(scores.softmax(-1) @ value[:, head])
        return torch.cat(heads, dim=-1)

    def self_attention(
        self, block: int, query: Tensor, asking: Sequence[int], key: Tensor, value: Tensor, there: Sequence[int], c: Conditions
    ) -> Tensor:
        """Tokens ``asking`` to those of their group among the tokens ``there``; queries, keys and values are in these orders."""
        out = torch.zeros(len(asking), query[0].numel())
        for group in groups_of(len(c.places), self.config.sparse_n if self.config.sparse1d else 1, block):
            rows = [row for row, token in enumerate(asking) if token in group]
            seen = [row for row, token in enumerate(there) if token in group]
            if rows:
                out[rows] = self.attend(query[rows], key[seen], value[seen], c.token_bias[[there[row] for row in seen]])
        return self.linear(f"transformer_blocks.{block}.attn1.to_out.0", out)

    def modulated(self, block: int, x: Tensor, c: Conditions, first: int) -> Tensor:
        table = self.weights[f"transformer_blocks.{block}.scale_shift_table"] + c.factors
        return self.normed(x) * (1 + table[first + 1]) + table[first]

    def queries(self, block: int, x: Tensor, c: Conditions, tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of ``x`` [n, C], which are the given tokens."""
        name, h = f"transformer_blocks.{block}.attn1", self.modulated(block, x, c, 0)
        places = c.places[list(tokens)]
        return rotated(self.heads(f"{name}.to_q", h), places), rotated(self.heads(f"{name}.to_k", h), places), self.heads(f"{name}.to_v", h)

    def rest(self, block: int, x: Tensor, attention: Tensor, c: Conditions) -> Tensor:
        """What follows self-attention, token by token."""
        name = f"transformer_blocks.{block}"
        table = self.weights[f"{name}.scale_shift_table"] + c.factors
        x = x + table[2] * attention
        query, key, value = (
            self.heads(f"{name}.attn2.to_q", x),
            self.heads(f"{name}.attn2.to_k", c.text),
            self.heads(f"{name}.attn2.to_v", c.text),
        )
        x = x + self.linear(f"{name}.attn2.to_out.0", self.attend(query, key, value, c.text_bias))
        hidden = F.gelu(self.linear(f"{name}.ff.net.0.proj", self.modulated(block, x, c, 3)), approximate="tanh")
        return x + table[5] * self.linear(f"{name}.ff.net.2", hidden)

    def full_block(self, row: int, block: int, x: Tensor, c: Conditions) -> Tensor:
        every = range(len(x))
        query, key, value = self.queries(block, x, c, every)
        attention = self.self_attention(block, query, every, key, value, every, c)
        out = self.rest(block, x, attention, c)
        self.states[row, block] = State(out - x, key, value, attention)
        return out

    def cached_block(self, row: int, block: int, x: Tensor, c: Conditions, kept: Sequence[int], context: str, history: str) -> Tensor:
        """The tokens ``kept`` are computed, the others add the update in their cache."""
        state, rows, every = self.states[row, block], list(kept), range(len(x))
        query, key, value = self.queries(block, x[rows], c, rows)
        if context == "kept":
            attention = self.self_attention(block, query, rows, key, value, rows, c)
        elif context == "full":
            _, key, value = self.queries(block, x, c, every)
            attention = self.self_attention(block, query, rows, key, value, every, c)
        elif context == "cached":
            state.key[rows], state.value[rows] = key, value
            attention = self.self_attention(block, query, rows, state.key, state.value, every, c)
        else:
            attention = state.attention[rows]
        computed = self.rest(block, x[rows], attention, c)
        out = x + state.update
        out[rows] = computed
        if history == "computed":
            state.update[rows] = computed - x[rows]
        return out

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        kept: Sequence[Sequence[int]] | None = None,
        context: str = "kept",
        history: str = "full_steps",
    ) -> Tensor:
        """One model evaluation. ``kept`` lists the tokens that each cached block computes: a P-step."""
        videos = []
        for row, z in enumerate(hidden_states):
            text_mask = None if encoder_attention_mask is None else encoder_attention_mask[row]
            c, embedded = self.conditions(
                z, timestep[row], encoder_hidden_states[row], None if attention_mask is None else attention_mask[row], text_mask
            )
            x = self.patches(z)
            for block in range(self.config.num_layers):
                if kept is None or block >= len(kept):
                    x = self.full_block(row, block, x, c)
                else:
                    x = self.cached_block(row, block, x, c, kept[block], context, history)
            videos.append(self.video(x, embedded, z))
        return torch.stack(videos)

    def conditions(self, z: Tensor, t: Tensor, text: Tensor, mask: Tensor | None, text_mask: Tensor | None) -> tuple[Conditions, Tensor]:
        patch, (_, frames, height, width) = self.config.patch_size, z.shape
        rows, columns = height // patch, width // patch
        places = torch.tensor([[f, r, c] for f in range(frames) for r in range(rows) for c in range(columns)], dtype=torch.float32)
        places = places / torch.tensor([getattr(self.config, f"interpolation_scale_{axis}") for axis in "thw"])
        angles = t * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        embedded = self.linear("adaln_single.emb.timestep_embedder.linear_1", torch.cat([angles.cos(), angles.sin()])[None])
        embedded = self.linear("adaln_single.emb.timestep_embedder.linear_2", F.silu(embedded))
        factors = self.linear("adaln_single.linear", F.silu(embedded)).reshape(6, -1)
        hidden = self.linear("caption_projection.linear_2", F.gelu(self.linear("caption_projection.linear_1", text), approximate="tanh"))
        there = torch.ones(len(places), dtype=torch.bool)
        if mask is not None:  # a token is there if any place of its patch is
            there = mask.reshape(frames, rows, patch, columns, patch).bool().any(4).any(2).flatten()
        text_there = torch.ones(len(text), dtype=torch.bool) if text_mask is None else text_mask.bool()
        return Conditions(factors, hidden, places, -10000.0 * ~there, -10000.0 * ~text_there), embedded[0]

    def patches(self, z: Tensor) -> Tensor:
        patch, (channels, frames, height, width) = self.config.patch_size, z.shape
        cut = z.reshape(channels, frames, height // patch, patch, width // patch, patch).permute(1, 2, 4, 0, 3, 5)
        kernel = self.weights["pos_embed.proj.weight"].flatten(1)
        return cut.reshape(-1, kernel.shape[1]) @ kernel.T + self.weights["pos_embed.proj.bias"]

    def video(self, x: Tensor, embedded: Tensor, z: Tensor) -> Tensor:
        patch, (_, frames, height, width) = self.config.patch_size, z.shape
        shift, scale = self.weights["scale_shift_table"] + embedded
        out = self.linear("proj_out", self.normed(x) * (1 + scale) + shift)
        tiles = out.reshape(frames, height // patch, width // patch, patch, patch, -1)
        return tiles.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, height, width)
