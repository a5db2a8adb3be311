"""What is known of one input signature's steps once they are compiled: plan, caches and costs. No graph, no model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tokencache_compile.export.buffers import allocate
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
    _initial: dict[torch.device, list[Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        """The caches of a new request: to be read only, for every request has these, and those that are alike share memory."""
        if device not in self._initial:
            alike: dict[tuple[Any, ...], Tensor] = {}
            there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # DLPack takes the current device's alone
            with torch.inference_mode(False), there:  # they serve calls outside of inference mode too
                for spec in self.caches:
                    kind = spec.shape, spec.dtype, spec.fill
                    if kind not in alike:
                        alike[kind] = allocate(spec.nbytes, device).view(spec.dtype).view(spec.shape).fill_(spec.fill)
                kinds = ((spec.shape, spec.dtype, spec.fill) for spec in self.caches)
                self._initial[device] = [from_dlpack(alike[kind]) for kind in kinds]  # own storages: torch.compile takes no views
        return list(self._initial[device])
