"""Train the reference PixArt: text-to-image on emoji, 32x32, patch 4, 64 tokens, MiniLM token states, v-prediction.

    python benchmarks/train_pixart.py --out benchmarks/reference/run_pixart

Checkpoints, resuming and averaged weights are as in train_reference.py. The captions are encoded once. v-prediction, because at the noisy
end, where the caption decides what will be seen, the error of ε hardly depends on it.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from diffusers import DDPMScheduler, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from emoji import encode, load_emoji, save_captions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from train_reference import learning_rate

from tokencache_compile.learn.checkpoint import load_checkpoint, save_checkpoint
from tokencache_compile.learn.loop import generator_of

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
    peak_lr: Annotated[float, typer.Option(help="Learning rate of the plateau.")] = 1e-3,
    ema_decay: Annotated[float, typer.Option(help="Decay of the weight average a step.")] = 0.999,
    caption_dropout: Annotated[float, typer.Option(help="Share of captions replaced by the empty one.")] = 0.1,
    mixed_precision: Annotated[str, typer.Option(help="accelerate's mixed precision: no, bf16 or fp16.")] = "bf16",
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
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model.set_attn_processor(AttnProcessor())  # written out: the gradient of the fused attention takes half of a step's time on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.0, fused=True)
    step, loss_average = 0, float("nan")
    if (out / "checkpoint.safetensors").exists():
        saved = load_checkpoint(out / "checkpoint.safetensors", {"model": model, "ema": ema}, optimizer)
        step, loss_average = saved["step"], saved["loss"]
    net, optimizer = accelerator.prepare(model, optimizer)
    device = accelerator.device
    ema.to(device)

    columns = (
        TextColumn("images"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    log = (out / "log.jsonl").open("a")
    share, total_batch = accelerator.process_index, batch * accelerator.num_processes
    last_save = time.monotonic()
    with Progress(*columns, disable=not accelerator.is_main_process) as bar:
        task = bar.add_task("train", total=images, completed=step * total_batch, loss=loss_average)
        while step * total_batch < images:
            draw = generator_of(seed, share, step)
            pick = torch.randint(len(data), (batch,), generator=draw)
            dropped = torch.rand(batch, 1, generator=draw) < caption_dropout
            state = torch.where(dropped[..., None], null_states, states[pick])
            mask = torch.where(dropped, null_mask, masks[pick])
            # One timestep from each of ``batch`` equal stretches: the same distribution as independent ones, with less noise.
            timestep = ((torch.arange(batch) + torch.rand(batch, generator=draw)) * (1000 / batch)).long()
            noise = torch.randn(data[pick].shape, generator=draw)
            noisy = scheduler.add_noise(data[pick], noise, timestep).to(device)
            target = scheduler.get_velocity(data[pick], noise, timestep).to(device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step * total_batch, images, peak_lr)
            with accelerator.autocast():
                predicted = net(
                    noisy, timestep=timestep.to(device), encoder_hidden_states=state.to(device), encoder_attention_mask=mask.to(device)
                ).sample
                loss = (predicted.float() - target).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            decay = min(ema_decay, (1 + step) / (10 + step))
            source = accelerator.unwrap_model(net)
            torch._foreach_lerp_(list(ema.parameters()), [p.data for p in source.parameters()], 1 - decay)
            value = float(loss.detach())
            loss_average = value if loss_average != loss_average else 0.995 * loss_average + 0.005 * value
            bar.update(task, completed=step * total_batch, loss=loss_average)
            if accelerator.is_main_process and step % 50 == 0:
                log.write(json.dumps({"step": step, "images": step * total_batch, "loss": loss_average}) + "\n")
                log.flush()
            finished = step * total_batch >= images
            if accelerator.is_main_process and (finished or time.monotonic() - last_save > 60 * minutes_between_checkpoints):
                modules = {"model": source, "ema": ema}
                save_checkpoint(out / "checkpoint.safetensors", modules, optimizer.optimizer, {"step": step, "loss": loss_average})
                ema.save_pretrained(out / "ema")
                facts = {
                    "images": step * total_batch, "batch": batch, "peak_lr": peak_lr, "caption_dropout": caption_dropout,
                    "loss": loss_average,
                }  # fmt: skip
                (out / "ema" / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
                last_save = time.monotonic()
    log.close()


if __name__ == "__main__":
    typer.run(main)
