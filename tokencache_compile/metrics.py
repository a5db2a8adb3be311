"""How far a cached run is from the uncached one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _check_shapes(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"tensors of one shape are compared; {tuple(first.shape)} and {tuple(second.shape)} were given.")


def psnr(images: Tensor, reference: Tensor, data_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB of ``images`` to ``reference``, both [B, C, H, W]; infinite where they are equal.

    One figure for the whole batch, from the mean squared error over all pixels of all images. ``data_range`` is the distance
    between the darkest and the brightest value: 2 for images in [-1, 1].
    """
    _check_shapes(images, reference)
    return decibels(float((images.double() - reference.double()).square().mean()), data_range)


def decibels(mean_square: float, data_range: float = 2.0) -> float:
    """The peak signal-to-noise ratio that a mean squared error is; infinite where there is none."""
    return 10.0 * math.log10(data_range**2 / mean_square) if mean_square else math.inf


def mean_abs_deviation(first: Tensor, second: Tensor) -> float:
    """Mean of |first − second| over all elements of two tensors of one shape."""
    _check_shapes(first, second)
    return float((first.double() - second.double()).abs().mean())


def deviation_per_step(predictions: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """Mean |Δ pred_x0| of two runs at each sampling step; both hold one [B, C, H, W] a step."""
    return [mean_abs_deviation(one, other) for one, other in zip(predictions, reference, strict=True)]


def ssim(images: Tensor, reference: Tensor, data_range: float = 2.0) -> float:
    """Mean structural similarity of two sets of images [B, C, H, W]: windows of 11 × 11, Gaussian of σ = 1.5 (Wang et al., 2004).

    Windows lie inside the image; of an image narrower than 11 pixels the largest odd window that fits is taken.
    """
    _check_shapes(images, reference)
    side = min(11, *(size - 1 + size % 2 for size in images.shape[-2:]))
    line = torch.arange(side, dtype=torch.float64) - side // 2
    weights = torch.exp(-line.square() / (2 * 1.5**2))
    window = torch.outer(weights, weights)[None, None] / weights.sum() ** 2

    def local_mean(values: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(values, window)

    one, other = (values.double().flatten(0, 1)[:, None] for values in (images, reference))
    mean, other_mean = local_mean(one), local_mean(other)
    variance = local_mean(one.square()) - mean.square() + local_mean(other.square()) - other_mean.square()
    covariance = local_mean(one * other) - mean * other_mean
    first, second = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similar = (2 * mean * other_mean + first) * (2 * covariance + second)
    return float((similar / ((mean.square() + other_mean.square() + first) * (variance + second))).mean())
