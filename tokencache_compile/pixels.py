"""Images in [-1, 1] as 8 bits and back: one rounding for pictures, files of samples and the networks that judge them."""

from __future__ import annotations

import torch
from torch import Tensor


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded to the nearest as DiT and diffusers save them; what lies outside is clamped."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8 as float32 in [-1, 1], for which :func:`to_bytes` gives the same again."""
    return pixels.float().div(127.5).sub(1)
