"""What is known of one input signature's steps once they are compiled: plan, caches and costs. No graph, no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokencache_compile.ir import CacheSpec
from tokencache_compile.plan import CachePlan


@dataclass(frozen=True)
class StepTable:
    """What the dispatcher goes by, whichever engine runs the steps.

    Attributes:
        caches: the cache tensors of every step, in the order in which the steps take and return them.
        macs_full, macs_cached: MACs of the I-step and of the P-step of each keep profile, predictor included.
    """

    plan: CachePlan
    caches: tuple[CacheSpec, ...]
    macs_full: int
    macs_cached: tuple[int, ...]

    @property
    def cache_bytes(self) -> int:
        """What the caches of one guidance branch take."""
        return sum(spec.nbytes for spec in self.caches)

    @property
    def random_shape(self) -> tuple[int, int, int]:
        """[1, L cached, N]: scores of the ``random`` scorer, the same for every row."""
        return (1, self.plan.num_cached, self.plan.tokens)

    def step_inputs(self, step: int, device: torch.device) -> list[Tensor]:
        """What a step takes between the model's tensors and the caches: its index, and random scores if it uses them."""
        inputs = [torch.full((), float(step), device=device)]
        if "random_scores" in self.plan.config.extras:
            draw = torch.Generator().manual_seed(step)  # the same for both guidance branches
            inputs.append(torch.rand(self.random_shape, generator=draw).to(device))
        return inputs

    def initial_caches(self, device: torch.device) -> list[Tensor]:
        """The caches of a new request."""
        return [torch.full(spec.shape, spec.fill, dtype=spec.dtype, device=device) for spec in self.caches]
