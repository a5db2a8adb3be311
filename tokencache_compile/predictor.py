"""The Cache Predictor (paper section III-C, SPEC section 2): α [B, L, N] from the token stream, once a P-step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tokencache_compile.errors import ConfigError


class CachePredictor(nn.Module):
    """A copy of block 1 with a head ``Linear(C → L)`` and a sigmoid: one score per block and token.

    Args:
        block: block 1 of the model; copied with its weights.
        channels: C, width of the token stream.
        num_blocks: L, blocks of the model.

    The head starts at 0, and so α at 0.5 everywhere.
    """

    def __init__(self, block: nn.Module, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)
        example = next(block.parameters())
        self.head = nn.Linear(channels, num_blocks, device=example.device, dtype=example.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """α [B, L, N] in (0, 1); takes exactly what block 1 takes, the stream [B, N, C] after patch embedding first."""
        hidden: Tensor = self.block(*args, **kwargs)
        return torch.sigmoid(self.head(hidden)).transpose(1, 2)

    def check_fits(self, channels: int, num_blocks: int, weights: dict[str, tuple[int, ...]]) -> None:
        """Raise a ConfigError unless this predictor was made for a model of this width, depth and block structure."""
        own = {name: tuple(t.shape) for name, t in [*self.block.named_parameters(), *self.block.named_buffers()]}
        different = [f"block.{n} {own.get(n)} for {shape}" for n, shape in weights.items() if own.get(n) != shape]
        if self.head.in_features != channels or self.head.out_features != num_blocks:
            different.insert(0, f"head {self.head.in_features}→{self.head.out_features} for {channels}→{num_blocks}")
        if different:
            raise ConfigError(
                f"the predictor does not fit this model: {'; '.join(different[:4])}. "
                "Make one for it with CachePredictor(block, channels, num_blocks) from its first block."
            )
