"""The reference video model as a subject of the bench: the captions of moving Fashion-MNIST, guided ancestral Euler, in bfloat16."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import EulerAncestralDiscreteScheduler, WanTransformer3DModel
from moving_fashion import CAPTIONS, FRAMES, SIZE
from torch import Tensor, nn
from train_video import SCHEDULER_CONFIG, captions_encoded

from tokencache_compile.evidence.subject import Subject
from tokencache_compile.evidence.subjects import drawn_from
from tokencache_compile.sampling import Conditions

MODEL = Path(__file__).resolve().parent.parent / "tokencache_compile" / "reference" / "video"
STEPS, GUIDANCE, SEED = 50, 2.5, 1234


def guided_captions(captions: Tensor) -> Conditions:
    """What the model takes for ``captions`` [n], indices into :data:`CAPTIONS`, guided."""
    states, null_state = captions_encoded(CAPTIONS).bfloat16(), captions_encoded(("",)).bfloat16()
    return Conditions({"encoder_hidden_states": states[captions]}, {"encoder_hidden_states": null_state}, GUIDANCE)


def video_subject(captions: Tensor, device: str = "cpu") -> Subject:
    """A noise for each of ``captions`` [n]."""

    def load() -> nn.Module:
        net: nn.Module = WanTransformer3DModel.from_pretrained(MODEL, torch_dtype=torch.bfloat16).eval().to(device)
        return net

    noise = torch.randn(len(captions), 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED)).bfloat16()
    settings = {"sampler": "Euler ancestral", "guidance": GUIDANCE, "seed": SEED, "device": device, "dtype": "bfloat16"}
    draw = drawn_from(noise, guided_captions(captions), device)
    return Subject(
        "reference video model", load, lambda: EulerAncestralDiscreteScheduler(**SCHEDULER_CONFIG), draw, STEPS, settings=settings
    )
