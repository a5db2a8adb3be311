"""A text-image score for emoji: how well a picture fits its caption, by two small heads on frozen networks.

A linear head on EfficientNet-Lite0's features of the picture and one on MiniLM's mean token state of the caption meet in one space,
trained with CLIP's contrastive loss on the real pictures and captions that the generator was trained on too. It is no CLIP score: the
heads know these concepts only, so it compares runs of one model. Real pairs that they have not seen say how far it can be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from emoji import STYLES, Emoji
from frechet import features, load_network
from torch import Tensor, nn

WIDTH, VIEWS, STEPS, BATCH = 128, 12, 2000, 256


@dataclass(frozen=True)
class Agreement:
    """How well pictures fit their captions.

    Attributes:
        score: [n], 100 · cosine between picture and caption.
        concept, style: [n], whether the caption nearest to the picture, of all of them, is of the concept (style) asked for.
    """

    score: Tensor
    concept: Tensor
    style: Tensor

    def mean(self, rows: Tensor) -> dict[str, float]:
        """Means over ``rows`` [n] (bool)."""
        return {name: float(getattr(self, name)[rows].double().mean()) for name in ("score", "concept", "style")}


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Token states [n, S, 384] averaged over what is no padding, [n, 384]."""
    weights = mask[..., None].to(states)
    return (states * weights).sum(1) / weights.sum(1)


def views(images: Tensor, seed: int) -> Tensor:
    """``images`` [n, 3, 32, 32], each moved by up to 2 pixels, mirrored half of the time, and with a little noise, as samples have it."""
    draw = torch.Generator().manual_seed(seed)
    padded = nn.functional.pad(images, (2, 2, 2, 2), value=1.0)
    shifts = torch.randint(0, 5, (len(images), 2), generator=draw).tolist()
    moved = torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, shifts, strict=True)])
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1, generator=draw) < 0.5, moved.flip(-1), moved)
    return mirrored + 0.1 * torch.rand(len(images), 1, 1, 1, generator=draw) * torch.randn(images.shape, generator=draw)


class TextImageScore:
    """Trained on the pairs of ``emoji`` that are not held out; ``text`` are the mean states of all captions, [n, 384]."""

    def __init__(self, emoji: Emoji, text: Tensor, seed: int = 0) -> None:
        self.network: Any = load_network()
        seen = (~emoji.held_out).nonzero()[:, 0]
        self.text = (text - text[seen].mean(0)) / text[seen].std(0)
        rows = torch.stack([features(self.network, views(emoji.images[seen], seed + view)).float() for view in range(VIEWS)])
        self.centre, self.scale = rows.mean((0, 1)), rows.std((0, 1)) + 1e-3
        rows = (rows - self.centre) / self.scale
        torch.manual_seed(seed)
        self.picture_head, self.text_head = nn.Linear(rows.shape[-1], WIDTH), nn.Linear(text.shape[-1], WIDTH)
        temperature = nn.Parameter(torch.tensor(2.5))  # the logarithm of what cosines are multiplied by
        parameters = [*self.picture_head.parameters(), *self.text_head.parameters(), temperature]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            pick = torch.randperm(len(seen))[:BATCH]
            view = torch.randint(VIEWS, pick.shape)
            pictures = nn.functional.normalize(self.picture_head(nn.functional.dropout(rows[view, pick], 0.3)), dim=-1)
            captions = nn.functional.normalize(self.text_head(self.text[seen[pick]]), dim=-1)
            logits = temperature.exp() * pictures @ captions.T
            own = torch.arange(len(pick))
            loss = nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def __call__(self, images: Tensor, pairs: Tensor) -> Agreement:
        """Judge ``images`` [n, 3, 32, 32] in [-1, 1] made for captions ``pairs`` [n]."""
        rows = (features(self.network, images).float() - self.centre) / self.scale
        pictures = nn.functional.normalize(self.picture_head(rows), dim=-1)
        captions = nn.functional.normalize(self.text_head(self.text), dim=-1)
        cosine = pictures @ captions.T
        nearest, many = cosine.argmax(1), len(STYLES)
        return Agreement(100 * cosine.gather(1, pairs[:, None])[:, 0], nearest // many == pairs // many, nearest % many == pairs % many)
