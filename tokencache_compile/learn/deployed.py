"""The blocks as inference runs them: an I-step's block with what it caches, and a P-step's block with every token kept.

They are the regions of the step graphs themselves, so that training learns from what a kept token really gets: under
``reuse``, say, its MLP after a forecast attention output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokencache_compile.ir import Block
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.passes.regions import cached_region, full_region
from tokencache_compile.plan import CacheConfig


@dataclass(frozen=True)
class Cached:
    """What one I-step leaves of one block: its update [B, N, C], and what the context keeps of it, token axis first."""

    update: Tensor
    context: tuple[Tensor, ...]


class DeployedBlocks:
    """Runs the blocks of ``stack`` as the step graphs of ``config`` do."""

    def __init__(self, stack: BlockStack, config: CacheConfig) -> None:
        self.stack = stack
        # Forecasts come in ready made, and no score is kept.
        config = replace(config, forecast=0, history="full_steps", scorer="random")
        stream = stack.program.known_stream
        self._full = [full_region(body, config, stream, has_score=False).graph_module for body in stack.program.bodies]
        depths = [[1] * self._num_context(number, config) for number in range(len(stack.program.bodies))]
        self._kept = [
            cached_region(body, config, stream, stream.tokens, depth).graph_module
            for body, depth in zip(stack.program.bodies, depths, strict=True)
        ]
        self._index = torch.arange(stream.tokens, device=stream.device).expand(stream.batch, -1)

    def _num_context(self, number: int, config: CacheConfig) -> int:
        roles = self.stack.program.bodies[number].known_roles
        return {"kept": 0, "full": 0, "cached": 2 * len(roles.attentions), "reuse": len(roles.attention_outputs)}[config.context]

    def full(self, block: Block, inputs: Sequence[Tensor]) -> tuple[Tensor, Cached]:
        """An I-step's block: its output stream [B, N, C], and what it caches."""
        stream, update, *context = self._full[block.body](*self.stack.weights_of(block), *inputs)
        return stream, Cached(update, tuple(context))

    def kept(self, block: Block, inputs: Sequence[Tensor], reused: Cached) -> Tensor:
        """A P-step's block with all tokens kept: its output stream [B, N, C]. ``reused``: held or forecast values."""
        stream: Tensor
        (stream, *_) = self._kept[block.body](*self.stack.weights_of(block), *inputs, self._index, reused.update, *reused.context)
        return stream
