"""Train the reference video model: text-to-video on moving Fashion-MNIST, 16 frames of 32x32, MiniLM token states, v-prediction.

    R=benchmarks/reference T="python benchmarks/train_video.py"
    $T --out $R/run_video_short --frames 2 --batch 64 --peak-lr 1e-3 --clips 260000
    $T --out $R/run_video_typical --initial $R/run_video_short/ema --frames 2 --batch 32 --clips 100000 --typical 64
    $T --out $R/run_video --initial $R/run_video_typical/ema --typical 64

diffusers' ``WanTransformer3DModel``, 512 tokens a clip (patch 2x4x4). The first commands learn what the objects look like, from any two
neighbouring frames at a tenth of the cost; the last learns whole clips. Of all 60,000 objects a model of this size learns outlines in the
time; of 64 typical ones a class it learns what makes them the class. What ships is the average in bfloat16, in the run's folder
``shipped``. Checkpoints, resuming, averaged weights and several processes (torchrun; the batch is each one's) are as in
train_reference.py.

v-prediction: a model that predicts the clean clip must carry its input through its tokens even where there is next to no noise, and errs
in the pattern of its patches.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from diffusers import DDPMScheduler, WanTransformer3DModel
from emoji import encode, save_captions
from moving_fashion import CAPTIONS, FRAMES, MovingFashion
from reference_training import CaptionDropout, EmaDecay, MixedPrecision, PeakRate, train
from torch import Tensor

MODEL_CONFIG = dict(
    patch_size=(2, 4, 4), num_attention_heads=3, attention_head_dim=64, in_channels=3, out_channels=3, text_dim=384, freq_dim=128,
    ffn_dim=768, num_layers=8, cross_attn_norm=True,
)  # fmt: skip
SCHEDULER_CONFIG = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
EXAMPLES = CAPTIONS[::9]


class WrittenOutAttention:
    """Attention of Wan's blocks by its formula: compiled, its gradient takes a third of the fused kernel's time on a CPU."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
        query, key, value = (states.unflatten(2, (attn.heads, -1)) for states in (query, key, value))
        if rotary_emb is not None:
            query, key = rotated(query, *rotary_emb), rotated(key, *rotary_emb)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        with torch.autocast(scores.device.type, enabled=False):
            weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
            mixed = (weights @ value.to(weights.dtype)) / weights.sum(-1, keepdim=True)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``states`` [B, N, H, D] turned by rotary embeddings [1, N, 1, D] of interleaved pairs."""
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(states)


def captions_encoded(captions: tuple[str, ...]) -> Tensor:
    """Token states [n, 12, 384] as Wan's pipeline gives them: zero after the last token, for the model takes no mask."""
    states, mask = encode(captions)
    return states * mask[..., None]


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log and averaged weights.")],
    initial: Annotated[Path | None, typer.Option(help="Folder of a model to begin with, as save_pretrained wrote it.")] = None,
    frames: Annotated[int, typer.Option(help="Neighbouring frames of a training clip.", min=2, max=FRAMES)] = FRAMES,
    clips: Annotated[int, typer.Option(help="Training clips in total.")] = 48_000,
    typical: Annotated[int | None, typer.Option(help="Train on as many typical objects of each class; on all if left out.")] = None,
    batch: Annotated[int, typer.Option(help="Clips a step.")] = 16,
    peak_lr: PeakRate = 7e-4,
    ema_decay: EmaDecay = 0.999,
    caption_dropout: CaptionDropout = 0.1,
    mixed_precision: MixedPrecision = "bf16",
    minutes_between_checkpoints: float = 3.0,
    seed: int = 0,
) -> None:
    """Train, or go on training, the reference video model in OUT."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())
    data = MovingFashion("train", typical)
    states, null_states = captions_encoded(CAPTIONS), captions_encoded(("",))
    save_captions(out / "ema" / "captions.safetensors", EXAMPLES)
    scheduler = DDPMScheduler(**SCHEDULER_CONFIG)
    model = WanTransformer3DModel(**MODEL_CONFIG) if initial is None else WanTransformer3DModel.from_pretrained(initial)
    for block in model.blocks:
        for attention in (block.attn1, block.attn2):
            attention.set_processor(WrittenOutAttention())
        block.compile()

    def loss_of(net: Any, draw: torch.Generator, device: torch.device) -> Tensor:
        captions = torch.randint(len(CAPTIONS), (batch,), generator=draw)
        first = int(torch.randint(FRAMES // 2 - frames // 2 + 1, (), generator=draw)) * 2
        clean = data.clips(captions, data.pick(captions, draw), first, frames)
        dropped = torch.rand(batch, 1, 1, generator=draw) < caption_dropout
        state = torch.where(dropped, null_states, states[captions])
        # One timestep from each of ``batch`` equal stretches: the same distribution as independent ones, with less noise.
        timestep = ((torch.arange(batch) + torch.rand(batch, generator=draw)) * (1000 / batch)).long()
        noise = torch.randn(clean.shape, generator=draw)
        noisy, target = scheduler.add_noise(clean, noise, timestep), scheduler.get_velocity(clean, noise, timestep)
        predicted = net(noisy.to(device), timestep.to(device), state.to(device), return_dict=False)[0]
        return (predicted.float() - target.to(device)).square().mean()

    def on_save(folder: Path, progress: Mapping[str, Any]) -> None:
        facts = {
            "clips": progress["images"], "frames": frames, "objects": len(data.labels), "loss": progress["loss"],
            "batch": batch * accelerator.num_processes, "peak_lr": peak_lr,
        }  # fmt: skip
        before = {} if initial is None else {"before": json.loads((initial / "training.json").read_text())}
        (folder / "training.json").write_text(json.dumps({**facts, "caption_dropout": caption_dropout, **before}, indent=1) + "\n")

    train(
        out, model, loss_of, accelerator, images=clips, batch=batch, peak_lr=peak_lr, ema_decay=ema_decay,
        minutes_between_checkpoints=minutes_between_checkpoints, seed=seed, on_save=on_save,
    )  # fmt: skip
    if accelerator.is_main_process:
        shutil.copytree(out / "ema", out / "shipped", dirs_exist_ok=True)
        WanTransformer3DModel.from_pretrained(out / "ema", torch_dtype=torch.bfloat16).save_pretrained(out / "shipped")
        config = json.loads((out / "shipped" / "config.json").read_text())
        config.pop("_name_or_path")  # a folder of this machine
        (out / "shipped" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    typer.run(main)
