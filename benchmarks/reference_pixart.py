"""The reference PixArt as a subject of the bench: the captions of the emoji in turn, guided DDIM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from emoji import Emoji, encode
from torch import Tensor, nn
from train_pixart import SCHEDULER_CONFIG

from tokencache_compile.evidence.subject import Judge, Subject
from tokencache_compile.evidence.subjects import drawn_from
from tokencache_compile.sampling import Conditions

MODEL = Path(__file__).resolve().parent.parent / "tokencache_compile" / "reference" / "pixart"
STEPS, GUIDANCE, SEED = 20, 2.0, 1234


def captions_in_turn(samples: int, emoji: Emoji) -> Tensor:
    """The caption [samples] of each sample: few are of many concepts, and many begin again at the first."""
    step = max(1, len(emoji.captions) // samples)
    return (torch.arange(samples) * step) % len(emoji.captions)


def pixart_subject(
    pairs: Tensor, emoji: Emoji, judges: Mapping[str, Judge], floors: Mapping[str, float], device: str = "cpu"
) -> Subject:
    """A noise for each of the captions ``pairs`` [n]."""

    def load() -> nn.Module:
        net: nn.Module = PixArtTransformer2DModel.from_pretrained(MODEL).eval().to(device)
        return net

    (states, mask), (null_states, null_mask) = encode(emoji.captions), encode([""])
    given = {"encoder_hidden_states": states[pairs], "encoder_attention_mask": mask[pairs]}
    null = {"encoder_hidden_states": null_states, "encoder_attention_mask": null_mask}
    noise = torch.randn(len(pairs), 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
    settings = {"sampler": "DDIM", "guidance": GUIDANCE, "seed": SEED, "device": device}
    return Subject(
        "reference PixArt",
        load,
        lambda: DDIMScheduler(**SCHEDULER_CONFIG, clip_sample=False),
        drawn_from(noise, Conditions(given, null, GUIDANCE), device),
        STEPS,
        judges=judges,
        floors=floors,
        settings=settings,
    )
