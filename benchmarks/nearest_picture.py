"""Which concept a picture is nearest to: a judge of emoji that was trained on nothing, for pairs that training did not see.

The distance of two pictures is that of their 8x8 means, so that texture and a pixel's shift hardly count. The real picture of a held-out
pair is mostly nearer to other concepts than to its own in other styles: designers draw one thing in many ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from emoji import STYLES, Emoji
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

SIDE, FEW = 8, 5


def coarse(images: Tensor) -> Tensor:
    """Images [n, 3, 32, 32] as rows of their means over an 8x8 grid."""
    return adaptive_avg_pool2d(images.clamp(-1, 1), SIDE).flatten(1)


@dataclass(frozen=True)
class Nearest:
    """Shares of pictures whose nearest concept, of all, is the one asked for (``first``), or one of the five nearest is (``few``)."""

    first: float
    few: float


def nearest_concepts(images: Tensor, pairs: Tensor, emoji: Emoji, without_itself: bool = False) -> Nearest:
    """Judge ``images`` [n, 3, 32, 32] made for captions ``pairs`` [n]; ``without_itself`` leaves out the real picture of the pair."""
    distances = torch.cdist(coarse(images), coarse(emoji.images))
    if without_itself:
        distances = distances.scatter(1, pairs[:, None], torch.inf)
    of_concept = distances.unflatten(1, (len(emoji.names), len(STYLES))).amin(2)
    own = of_concept.gather(1, (pairs // len(STYLES))[:, None])
    nearer = (of_concept < own).sum(1)
    return Nearest(float((nearer == 0).double().mean()), float((nearer < FEW).double().mean()))
