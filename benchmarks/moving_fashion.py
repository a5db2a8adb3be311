"""Moving Fashion-MNIST: one coloured object that crosses a black picture, 16 frames of 32x32 RGB in [-1, 1], with an exact caption.

The caption says everything but which object of the class is seen: "red sneaker moving left". The object is 24 pixels large and goes
8 pixels in the direction named, half a pixel a frame, through the middle of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fashion_mnist import CLASS_NAMES, load_fashion_mnist
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

COLOURS = {"red": (1.0, 0.2, 0.2), "green": (0.2, 0.9, 0.2), "blue": (0.25, 0.4, 1.0), "yellow": (1.0, 0.9, 0.1), "white": (1.0, 1.0, 1.0)}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
FRAMES, SIZE, OBJECT = 16, 32, 24
CAPTIONS = tuple(f"{colour} {name} moving {way}" for name in CLASS_NAMES for colour in COLOURS for way in DIRECTIONS)
TEXT_TOKENS = 12


@dataclass(frozen=True)
class Meaning:
    """Of captions [n]: indices into :data:`CLASS_NAMES`, :data:`COLOURS` and :data:`DIRECTIONS`."""

    kind: Tensor
    colour: Tensor
    direction: Tensor


def meaning(captions: Tensor) -> Meaning:
    """What the captions [n], indices into :data:`CAPTIONS`, ask for."""
    ways, colours = len(DIRECTIONS), len(COLOURS)
    return Meaning(captions // (ways * colours), captions // ways % colours, captions % ways)


def starts(direction: Tensor) -> Tensor:
    """First and last place of the object's corner, [n, 2, 2] in half pixels: (first or last, row or column)."""
    way = torch.tensor(list(DIRECTIONS.values()))[direction]
    middle, reach = SIZE - OBJECT, FRAMES // 2
    return torch.stack([middle - reach * way, middle + (FRAMES - 1 - reach) * way], 1)


def most_typical(images: Tensor, labels: Tensor, count: int) -> Tensor:
    """The ``count`` images of each class that are nearest to its mean, compared with the nearest mean of another class; indices."""
    rows = images.flatten(1)
    means = torch.stack([rows[labels == kind].mean(0) for kind in range(len(CLASS_NAMES))])
    distances = torch.cdist(rows, means)
    own = distances.gather(1, labels[:, None])[:, 0]
    margin = distances.scatter(1, labels[:, None], torch.inf).amin(1) - own
    of_kind = ((labels == kind).nonzero()[:, 0] for kind in range(len(CLASS_NAMES)))
    return torch.cat([members[margin[members].topk(count).indices] for members in of_kind])


class MovingFashion:
    """Clips made as they are asked for, from Fashion-MNIST's ``split``: all of its objects, or ``typical`` ones of each class."""

    def __init__(self, split: str, typical: int | None = None) -> None:
        images, self.labels = load_fashion_mnist(split)
        if typical is not None:
            chosen = most_typical(images, self.labels, typical)
            images, self.labels = images[chosen], self.labels[chosen]
        grey = images[:, :, 2:-2, 2:-2].add(1).div(2)  # 28x28, as it comes
        # On a grid of half pixels, so that a step of half a pixel is one cell: no interpolation from frame to frame.
        twice = interpolate(grey, size=(2 * OBJECT, 2 * OBJECT), mode="bilinear", antialias=True)
        self.objects = twice.clamp(0, 1)[:, 0].mul(255).round().byte()
        self.of_kind = [(self.labels == kind).nonzero()[:, 0] for kind in range(len(CLASS_NAMES))]

    def pick(self, captions: Tensor, draw: torch.Generator) -> Tensor:
        """One object of the class asked for, for each of ``captions`` [n]; returns indices [n]."""
        chance = torch.rand(len(captions), generator=draw)
        kinds = meaning(captions).kind.tolist()
        return torch.stack([self.of_kind[kind][int(r * len(self.of_kind[kind]))] for kind, r in zip(kinds, chance.tolist(), strict=True)])

    def clips(self, captions: Tensor, objects: Tensor, first: int = 0, frames: int = FRAMES) -> Tensor:
        """Frames ``first`` to ``first + frames`` for ``captions`` [n] and ``objects`` [n]: [n, 3, frames, 32, 32]."""
        asked = meaning(captions)
        start = starts(asked.direction)[:, 0]
        way = torch.tensor(list(DIRECTIONS.values()))[asked.direction]
        colour = torch.tensor(list(COLOURS.values()))[asked.colour]
        canvas = torch.zeros(len(captions), frames, 2 * SIZE, 2 * SIZE)
        for row, (corner, step, index) in enumerate(zip(start.tolist(), way.tolist(), objects.tolist(), strict=True)):
            drawn = self.objects[index].float().div(255)
            for frame in range(frames):
                top, left = (corner[axis] + (first + frame) * step[axis] for axis in range(2))
                canvas[row, frame, top : top + 2 * OBJECT, left : left + 2 * OBJECT] = drawn
        grey = avg_pool2d(canvas, 2)
        return grey[:, None] * colour[:, :, None, None, None] * 2 - 1
