"""Tiny diffusers pipelines with random weights, whose transformers :mod:`tiny` builds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, PixArtAlphaPipeline
from tiny import Model, build, draw_weights
from torch import Tensor

Pipeline = Any  # DiffusionPipeline's components are not typed
KINDS = ("dit", "pixart")
TEXT_TOKENS, TEXT_WIDTH = 7, 20


def vae() -> AutoencoderKL:
    """16 × 16 images from 8 × 8 latents."""
    torch.manual_seed(1)
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    draw_weights(model, 0.1)
    return model.eval()


def pipeline(kind: str, transformer: Model = None, decoder: AutoencoderKL | None = None) -> Pipeline:
    """A pipeline of its own, with models of the same weights every time."""
    transformer, decoder = transformer or build(kind), decoder or vae()
    made: Pipeline
    if kind == "dit":
        made = DiTPipeline(transformer=transformer, vae=decoder, scheduler=DDIMScheduler(clip_sample=False))
    else:
        scheduler = DPMSolverMultistepScheduler()
        made = PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=decoder, transformer=transformer, scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def prompt(rows: int = 2, width: int = TEXT_WIDTH, tokens: int = TEXT_TOKENS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a text encoder would have made of a prompt and of a negative one; some tokens are padding."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, tokens + 1, (2, rows, 1), generator=draw)
    masks = (torch.arange(tokens) < lengths).long()
    embeds = torch.randn(2, rows, tokens, width, generator=draw).to(dtype)
    return {
        "prompt_embeds": embeds[0],
        "prompt_attention_mask": masks[0],
        "negative_prompt_embeds": embeds[1],
        "negative_prompt_attention_mask": masks[1],
    }


def images(pipe: Pipeline, steps: int = 8, seed: int = 0, output_type: str = "pt", **options: Any) -> Any:
    """Two images; latents drawn from ``seed``."""
    given: dict[str, Any] = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), "output_type": output_type}
    if isinstance(pipe, DiTPipeline):
        given["class_labels"] = [207, 360]
    else:
        given |= {**prompt(dtype=pipe.transformer.dtype), "negative_prompt": None, "use_resolution_binning": False}
    result = pipe(**given | options)
    return result[0]
