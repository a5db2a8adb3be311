"""A plain DDIM loop with classifier-free guidance, for a model itself and for its transformed self alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OnStep = Callable[[int, Tensor], None]


def sample(
    transformer: Any,
    scheduler: Any,
    labels: Tensor,
    noise: Tensor,
    steps: int,
    guidance: float,
    null_label: int,
    on_step: OnStep | None = None,
) -> Tensor:
    """One image for each of ``labels``; a step is one forward of 2B rows, the conditional ones first.

    Args:
        transformer: a class-conditional noise predictor such as ``DiTTransformer2DModel``, or a Dispatcher of one. Output
            channels beyond the image's own (a learned variance) are left aside.
        scheduler: a diffusers scheduler with ``pred_original_sample``, such as ``DDIMScheduler``. ``set_timesteps`` is called
            here, so a dispatcher that was given this scheduler sees exactly where the request begins.
        labels: class of each image, [B].
        noise: where the sampler starts, [B, C, H, W].
        guidance: weight w of uncond + w · (cond − uncond).
        null_label: the class that stands for "unconditional".
        on_step: called after every step with its index and its prediction of the final images, [B, C, H, W].

    Returns:
        The images [B, C, H, W] as the sampler leaves them, not clamped.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    label_pair = torch.cat([labels, torch.full_like(labels, null_label)])
    images = noise
    with torch.no_grad():
        for index, timestep in enumerate(scheduler.timesteps):
            rows = torch.cat([images, images])
            predicted = transformer(rows, timestep=timestep.expand(len(rows)), class_labels=label_pair).sample
            conditional, unconditional = predicted[:, : noise.shape[1]].chunk(2)
            epsilon = unconditional + guidance * (conditional - unconditional)
            result = scheduler.step(epsilon, timestep, images)
            images = result.prev_sample
            if on_step is not None:
                on_step(index, result.pred_original_sample)
    return images
