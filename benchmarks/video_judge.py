"""A judge of moving Fashion-MNIST: what class, colour and direction a clip shows, whatever its caption asked for, and how it flickers.

The class is told by a small CNN that was trained on single frames of the training clips; the colour by the ratio of the channels; the
direction by how far the middle of the brightness moves. Real clips of test objects say how far the judge itself can be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from judge_reference import train_classifier
from moving_fashion import COLOURS, DIRECTIONS, FRAMES, MovingFashion, meaning
from torch import Tensor, nn

LEAST_WAY = 0.5  # of the way a real object goes


def grey(clips: Tensor) -> Tensor:
    """The object without its colour, [n, frames, 32, 32] in [0, 1]: the brightest channel."""
    return clips.clamp(-1, 1).add(1).div(2).amax(1)


@dataclass(frozen=True)
class Verdict:
    """What clips [n] show, beside what their captions ask for.

    Attributes:
        kind, colour, direction: [n], whether it is the one asked for.
        likelihood: [n], the probability that the judge gives the class asked for.
        flicker: [n], mean absolute difference between a frame and the one two frames later moved back by the pixel that lies between them,
            over the range of the pixels; 0 for real clips but at the border.
    """

    kind: Tensor
    colour: Tensor
    direction: Tensor
    likelihood: Tensor
    flicker: Tensor

    def shares(self) -> dict[str, float]:
        """Shares that are right and the mean of the three, as VBench averages its aspects; mean likelihood and flicker."""
        right = {name: float(getattr(self, name).double().mean()) for name in ("kind", "colour", "direction")}
        more = {name: float(getattr(self, name).double().mean()) for name in ("likelihood", "flicker")}
        return {**right, "score": sum(right.values()) / 3, **more}


class VideoJudge:
    """Trained when it is made: ``views`` frames of every training object, a minute or two of a core each."""

    def __init__(self, data: MovingFashion, views: int = 2, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        objects = torch.arange(len(data.labels)).repeat(views)
        colours_and_ways = torch.randint(len(COLOURS) * len(DIRECTIONS), (len(objects),), generator=draw)
        captions = data.labels[objects] * len(COLOURS) * len(DIRECTIONS) + colours_and_ways
        frames = torch.randint(FRAMES, (len(objects),), generator=draw)
        images = torch.empty(len(objects), 1, 32, 32)
        for frame in range(FRAMES):
            here = frames == frame
            images[here] = grey(data.clips(captions[here], objects[here], frame, 1))
        self.classifier = train_classifier(images, data.labels[objects], epochs=2, seed=seed)

    @torch.inference_mode()
    def __call__(self, clips: Tensor, captions: Tensor) -> Verdict:
        """Judge ``clips`` [n, 3, 16, 32, 32] in [-1, 1] made for ``captions`` [n]."""
        asked, bright = meaning(captions), grey(clips)
        chances = torch.stack([self.classifier(part[:, None]).softmax(1).mean(0) for part in bright])
        return Verdict(
            kind=chances.argmax(1) == asked.kind,
            colour=colour_of(clips) == asked.colour,
            direction=direction_of(bright) == asked.direction,
            likelihood=chances.gather(1, asked.kind[:, None])[:, 0],
            flicker=flicker(clips, asked.direction),
        )


def colour_of(clips: Tensor) -> Tensor:
    """The colour whose channels are in the ratio of the clip's, [n]."""
    present = nn.functional.normalize(clips.clamp(-1, 1).add(1).sum((2, 3, 4)), dim=1)
    known = nn.functional.normalize(torch.tensor(list(COLOURS.values())), dim=1)
    return (present @ known.T).argmax(1)


def direction_of(bright: Tensor) -> Tensor:
    """Where the middle of the brightness [n, frames, 32, 32] goes from the first frame to the last, [n]; -1 if it hardly moves."""
    places = torch.arange(32.0)
    weight = bright.sum((2, 3)).clamp(min=1e-6)
    middle = torch.stack([(bright.sum(3) * places).sum(2) / weight, (bright.sum(2) * places).sum(2) / weight], -1)  # row, column
    along = (middle[:, -1] - middle[:, 0]) @ torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32).T
    return torch.where(along.amax(1) > LEAST_WAY * (FRAMES - 1) / 2, along.argmax(1), -1)


def flicker(clips: Tensor, direction: Tensor) -> Tensor:
    """See :class:`Verdict`; [n]."""
    found = torch.empty(len(clips))
    for index, way in enumerate(DIRECTIONS.values()):
        here = direction == index
        back = clips[here][:, :, 2:].roll((-way[0], -way[1]), (3, 4))
        found[here] = (back - clips[here][:, :, :-2]).abs().mean((1, 2, 3, 4)) / 2
    return found
