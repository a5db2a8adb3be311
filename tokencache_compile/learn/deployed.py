"""The blocks as inference runs them: an I-step's block with what it caches, and a P-step's block with every token kept.

They are the regions of the step graphs themselves, so that training learns from what a kept token really gets: under
``reuse``, say, its MLP after a forecast attention output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.ir import Block, CacheUnit
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.passes.caches import unit_caches
from tokencache_compile.passes.regions import cached_region, full_region
from tokencache_compile.plan import CacheConfig, CachePlan


@dataclass(frozen=True)
class Cached:
    """What one I-step leaves of one block: its update [B, N, C], and what the context keeps of it, token axis first."""

    update: Tensor
    context: tuple[Tensor, ...]


class DeployedBlocks:
    """Runs the blocks of ``stack`` as the step graphs of ``config`` do.

    Raises:
        ConfigError: ``config`` caches modules apart.
    """

    def __init__(self, stack: BlockStack, config: CacheConfig) -> None:
        if config.granularity == "module":
            raise ConfigError('granularity="module" was asked for; predictors and LoRA are trained for updates of whole blocks ("block").')
        self.stack = stack
        # Forecasts come in ready made and as they are, and no score is kept.
        config = replace(config, forecast=0, history="full_steps", scorer="random", cache_dtype=None)
        program, stream = stack.program, stack.program.known_stream
        plan = CachePlan(config, stream.tokens, len(program.blocks), 0, ((stream.tokens,) * len(program.blocks),))
        first = [next(block.index for block in program.blocks if block.body == number) for number in range(len(program.bodies))]
        caches = unit_caches(program, plan, [CacheUnit(index, index, False) for index in first])
        self._full = [full_region(body, config, stream, has_score=False).graph_module for body in program.bodies]
        self._kept = [
            cached_region(body, config, stream, stream.tokens, names).graph_module
            for body, names in zip(program.bodies, caches, strict=True)
        ]
        self._index = torch.arange(stream.tokens, device=stream.device).expand(stream.batch, -1)

    def full(self, block: Block, inputs: Sequence[Tensor]) -> tuple[Tensor, Cached]:
        """An I-step's block: its output stream [B, N, C], and what it caches."""
        stream, update, *context = self._full[block.body](*self.stack.weights_of(block), *inputs)
        return stream, Cached(update, tuple(context))

    def kept(self, block: Block, inputs: Sequence[Tensor], reused: Cached) -> Tensor:
        """A P-step's block with all tokens kept: its output stream [B, N, C]. ``reused``: held or forecast values."""
        stream: Tensor
        (stream, *_) = self._kept[block.body](*self.stack.weights_of(block), *inputs, self._index, reused.update, *reused.context)
        return stream
