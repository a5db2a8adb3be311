"""On what methods are measured: a model with its sampler, noises and conditions, and what else may judge its images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokencache_compile.sampling import Conditions

Judge = Callable[[Tensor], float]  # images [n, C, ...] -> a figure of the whole set


@dataclass(frozen=True)
class Subject:
    """One model under one sampler.

    Attributes:
        name: of the model, for people.
        load: a fresh model in eval mode, on the device it is to run on.
        scheduler: a fresh diffusers scheduler.
        draw: noise [count, C, ...] and conditions of the samples from number ``start`` on, the same whenever they are drawn.
        steps: sampling steps of the uncached run.
        pixels: the samples are images of 1 or 3 channels in [-1, 1], and are clamped to that; latents have no fixed range.
        predicts_x0: the scheduler tells its prediction of the final image at every step.
        decode: what is seen of samples that are latents: images or videos of 1 or 3 channels in [-1, 1].
        judges: figures of a whole set of images, by name, which take more samples than a comparison with the uncached run does;
            ``floors`` are those of as many real ones.
        settings: JSON values that a result holds for: sampler, guidance, seed, weights.
    """

    name: str
    load: Callable[[], nn.Module]
    scheduler: Callable[[], Any]
    draw: Callable[[int, int], tuple[Tensor, Conditions]]
    steps: int
    pixels: bool = True
    predicts_x0: bool = True
    decode: Callable[[Tensor], Tensor] | None = None
    judges: Mapping[str, Judge] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def finished(self, images: Tensor) -> Tensor:
        """Samples as they are compared: float32 on the CPU."""
        images = images.detach().to("cpu", torch.float32)
        return images.clamp(-1, 1) if self.pixels else images
