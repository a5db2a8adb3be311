"""The gated pass (paper Alg. 1, SPEC section 3): every cached block mixes computing and reusing, token by token.

    x̂ ← x̂ + α_l · f_l(x̂) + (1 − α_l) · reused_l          l = 1 … L−K, on the hatted stream
    loss = mean (x̂^L − x^L)² + λ · mean over the batch of Σ_(l,n) α

``reused`` is what inference gives a token that is not recomputed: its held or forecast update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokencache_compile.ir import Block
from tokencache_compile.learn.deployed import Cached, DeployedBlocks
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.sampling import guided


@dataclass(frozen=True)
class GatedStep:
    """One P-step to learn from, as inference would meet it.

    Attributes:
        kwargs: the model's call at that step.
        first: block 0's tensor inputs in it.
        reused: for every cached block what a token gets that is not recomputed: its held or forecast values.
        target: the uncached model's stream after the last block, [B, N, C].
        output: the uncached model's output, [B, C, …], a learned variance left aside.
    """

    kwargs: Mapping[str, Any]
    first: Sequence[Tensor]
    reused: Sequence[Cached]
    target: Tensor
    output: Tensor


def shifted(logits: Tensor, mean: float) -> Tensor:
    """Gates [B, L, N]: the sigmoid of ``logits`` shifted block by block so that each block's mean over batch and tokens is ``mean``.

    What a static keep count does to the scores, made smooth: only a token's rank within its block is left to learn. The shift
    is found by bisection over the batch of all processes; one Newton step, which leaves its value as it is, gives it its
    gradient. Without that a common rise of all logits would cost nothing and saturate them.
    """
    logits = logits.float()
    every = of_all_processes(logits)
    fixed = every.detach()
    low, high = -fixed.amax((0, 2), keepdim=True) - 30.0, -fixed.amin((0, 2), keepdim=True) + 30.0
    for _ in range(40):
        middle = (low + high) / 2
        above = torch.sigmoid(fixed + middle).mean((0, 2), keepdim=True) > mean
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    shift = (low + high) / 2
    gates = torch.sigmoid(every + shift)
    slope = (gates * (1 - gates)).mean((0, 2), keepdim=True).detach().clamp_min(1e-8)
    excess = gates.mean((0, 2), keepdim=True) - mean
    return torch.sigmoid(logits + shift - (excess - excess.detach()) / slope)


def of_all_processes(value: Tensor) -> Tensor:
    """The ``value`` [B, …] of every process of a distributed run, of one shape in each, along the batch axis; differentiable."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(value.contiguous()))


@dataclass(frozen=True)
class GatedResult:
    """The losses of a gated pass: scalars, and the mean α of every cached block [L−K]."""

    cache_loss: Tensor
    cost: Tensor
    alpha: Tensor


def gated_stream(blocks: DeployedBlocks, step: GatedStep, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
    """x̂^L [B, N, C] for gates ``alpha`` [B, ≥ L−K, N], and the model's output for it. None: all gates 0.

    Gradients flow to the gates through every later block. Block activations are recomputed in the backward pass, so memory holds
    one block's at a time.
    """
    streams: list[Tensor] = []

    def compute(block: Block, inputs: list[Tensor]) -> Tensor:
        if block.index < len(step.reused):
            return blocks.kept(block, inputs, step.reused[block.index])
        return blocks.stack.compute(block, inputs)

    def visit(block: Block, inputs: list[Tensor]) -> Tensor:
        x = blocks.stack.stream_of(block, inputs)
        if alpha is None and block.index < len(step.reused):
            streams[:] = [x + step.reused[block.index].update]
            return streams[0]
        computed: Tensor = checkpoint(compute, block, inputs, use_reentrant=False) if x.requires_grad else compute(block, inputs)
        if alpha is not None and block.index < len(step.reused):
            gate = alpha[:, block.index, :, None]
            computed = x + gate * (computed - x) + (1 - gate) * step.reused[block.index].update
        streams[:] = [computed]
        return computed

    output = blocks.stack.run(step.kwargs, visit)
    return streams[0], output[:, : step.output.shape[1]]


class GatedPass(nn.Module):
    """The trainable module: the predictor, and a forward that gives its losses. The base model is no part of it.

    Args:
        guidance: 1 takes the error of the stream (Eq. 9). Else rows are guidance pairs, and the error is that of the guided
            output: errors that both halves share cancel in it, others are multiplied.
        pair: both halves of a guidance pair share their scores, as under ``selection="pair"``.
    """

    def __init__(self, blocks: DeployedBlocks, predictor: CachePredictor, guidance: float = 1.0, pair: bool = False) -> None:
        super().__init__()
        self.predictor = predictor
        self.blocks = blocks
        self.guidance, self.pair = guidance, pair

    def forward(self, step: GatedStep, budget: float | None = None) -> GatedResult:
        """The losses of one step (Eq. 9).

        With a ``budget`` every block's gates are shifted to that mean (:func:`shifted`), and the cache loss is a share of the
        loss with nothing recomputed: that one grows by four orders of magnitude over a run, and the last steps would drown the rest.
        """
        logits = self.blocks.stack.logits(self.predictor, step.first)[:, : len(step.reused)]
        if self.pair:
            first, second = logits.chunk(2)
            logits = torch.cat([first + second, first + second]) / 2
        gates = torch.sigmoid(logits) if budget is None else shifted(logits, budget)
        cache_loss = self._error(step, gates)
        if budget is not None:
            unaided = self._error(step, None)
            cache_loss = cache_loss / of_all_processes(unaided[None]).mean().clamp_min(1e-12)
        return GatedResult(cache_loss, gates.sum((1, 2)).mean(), gates.mean((0, 2)))

    def _error(self, step: GatedStep, gates: Tensor | None) -> Tensor:
        stream, output = gated_stream(self.blocks, step, gates)
        if self.guidance == 1.0:
            return mean_square(stream - step.target)
        return mean_square(guided(output, self.guidance) - guided(step.output, self.guidance))


def mean_square(error: Tensor) -> Tensor:
    """Mean over batch, tokens and channels."""
    return error.float().square().mean()
