"""Train the reference PixArt: text-to-image on emoji, 32x32, patch 4, 64 tokens, MiniLM token states, v-prediction.

    python benchmarks/train_pixart.py --out benchmarks/reference/run_pixart

Checkpoints, resuming and averaged weights are as in train_reference.py. The captions are encoded once. v-prediction, because at the noisy
end, where the caption decides what will be seen, the error of ε hardly depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from diffusers import DDPMScheduler, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from emoji import encode, load_emoji, save_captions
from reference_training import CaptionDropout, EmaDecay, MixedPrecision, PeakRate, train
from torch import Tensor

MODEL_CONFIG = dict(
    num_attention_heads=5, attention_head_dim=32, in_channels=3, out_channels=3, num_layers=8, sample_size=32, patch_size=4,
    cross_attention_dim=160, caption_channels=384, use_additional_conditions=False,
)  # fmt: skip
EXAMPLES = (
    "red apple, twitter style", "green apple, twitter style", "hot dog, fluent style", "watermelon, twitter style", "pizza, google style",
    "tropical drink, google style", "tangerine, fluent style", "strawberry, twitter style",
)  # fmt: skip  (the last two are held out)
SCHEDULER_CONFIG = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log and averaged weights.")],
    images: Annotated[int, typer.Option(help="Training images in total.")] = 320_000,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 32,
    peak_lr: PeakRate = 1e-3,
    ema_decay: EmaDecay = 0.999,
    caption_dropout: CaptionDropout = 0.1,
    mixed_precision: MixedPrecision = "bf16",
    minutes_between_checkpoints: float = 3.0,
    seed: int = 0,
) -> None:
    """Train, or go on training, the reference PixArt in OUT."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())
    emoji = load_emoji()
    seen = ~emoji.held_out
    states, masks = encode(emoji.captions)
    data, states, masks = emoji.images[seen], states[seen], masks[seen]
    null_states, null_mask = encode([""])
    save_captions(out / "ema" / "captions.safetensors", EXAMPLES)
    scheduler = DDPMScheduler(**SCHEDULER_CONFIG)
    model = PixArtTransformer2DModel(**MODEL_CONFIG)
    model.set_attn_processor(AttnProcessor())  # written out: the gradient of the fused attention takes half of a step's time on a CPU

    def loss_of(net: Any, draw: torch.Generator, device: torch.device) -> Tensor:
        pick = torch.randint(len(data), (batch,), generator=draw)
        dropped = torch.rand(batch, 1, generator=draw) < caption_dropout
        state = torch.where(dropped[..., None], null_states, states[pick])
        mask = torch.where(dropped, null_mask, masks[pick])
        # One timestep from each of ``batch`` equal stretches: the same distribution as independent ones, with less noise.
        timestep = ((torch.arange(batch) + torch.rand(batch, generator=draw)) * (1000 / batch)).long()
        noise = torch.randn(data[pick].shape, generator=draw)
        noisy = scheduler.add_noise(data[pick], noise, timestep).to(device)
        target = scheduler.get_velocity(data[pick], noise, timestep).to(device)
        predicted = net(
            noisy, timestep=timestep.to(device), encoder_hidden_states=state.to(device), encoder_attention_mask=mask.to(device)
        ).sample
        return (predicted.float() - target).square().mean()

    def on_save(folder: Path, progress: Mapping[str, Any]) -> None:
        facts = {**progress, "batch": batch, "peak_lr": peak_lr, "caption_dropout": caption_dropout}
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")

    train(
        out, model, loss_of, accelerator, images=images, batch=batch, peak_lr=peak_lr, ema_decay=ema_decay,
        minutes_between_checkpoints=minutes_between_checkpoints, seed=seed, on_save=on_save,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
