"""Train the reference DiT: class-conditional Fashion-MNIST, 32x32, patch 4, 64 tokens, epsilon prediction.

    python benchmarks/train_reference.py --images 500000 --out benchmarks/reference/run

Runs on accelerate (CPU, one or several GPUs). It writes a checkpoint every few minutes and resumes from it: batch, noise
and dropped labels of a step are drawn from (seed, step), so a resumed run repeats the uninterrupted one. The averaged
weights are saved at the end, and with every checkpoint, in diffusers' own ``save_pretrained`` layout.
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
from diffusers import DDIMScheduler, DiTTransformer2DModel
from fashion_mnist import load_fashion_mnist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokencache_compile.learn.checkpoint import load_checkpoint, save_checkpoint
from tokencache_compile.learn.loop import generator_of

NULL_LABEL = 10  # the unconditional class of classifier-free guidance
MODEL_CONFIG = dict(
    num_attention_heads=4, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=12, sample_size=32,
    patch_size=4, num_embeds_ada_norm=10,
)  # fmt: skip
SCHEDULER_CONFIG = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)


def learning_rate(images: int, total: int, peak: float, warmup: int = 10_000, decay: float = 0.4) -> float:
    """Warm-up, plateau, then a linear fall to zero over the last ``decay`` of ``total`` images."""
    if images < warmup:
        return peak * images / warmup
    return peak * min(1.0, (total - images) / (decay * total))


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log and averaged weights.")],
    images: Annotated[int, typer.Option(help="Training images in total.")] = 500_000,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    peak_lr: Annotated[float, typer.Option(help="Learning rate of the plateau.")] = 1e-3,
    ema_decay: Annotated[float, typer.Option(help="Decay of the weight average a step.")] = 0.999,
    label_dropout: Annotated[float, typer.Option(help="Share of labels replaced by the null class.")] = 0.1,
    mixed_precision: Annotated[str, typer.Option(help="accelerate's mixed precision: no, bf16 or fp16.")] = "bf16",
    minutes_between_checkpoints: float = 3.0,
    seed: int = 0,
) -> None:
    """Train, or go on training, the reference DiT in OUT."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # tiny gradients of adaLN-zero are denormal, which halves the speed of a CPU
    torch.manual_seed(seed)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())
    data, labels = load_fashion_mnist("train")
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    # eval(): diffusers would otherwise drop labels in each block on its own; they are dropped once, below.
    model = DiTTransformer2DModel(**MODEL_CONFIG).eval()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.0, fused=True)
    step, loss_average = 0, float("nan")
    if (out / "checkpoint.safetensors").exists():
        saved = load_checkpoint(out / "checkpoint.safetensors", {"model": model, "ema": ema}, optimizer)
        step, loss_average = saved["step"], saved["loss"]
    net, optimizer = accelerator.prepare(model, optimizer)
    ema.to(accelerator.device)

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
            clean, label = data[pick], labels[pick].clone()
            label[torch.rand(batch, generator=draw) < label_dropout] = NULL_LABEL
            timestep = torch.randint(1000, (batch,), generator=draw)
            noise = torch.randn(clean.shape, generator=draw)
            noisy = scheduler.add_noise(clean, noise, timestep).to(accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step * total_batch, images, peak_lr)
            with accelerator.autocast():
                predicted = net(noisy, timestep=timestep.to(noisy.device), class_labels=label.to(noisy.device)).sample
                loss = (predicted.float() - noise.to(noisy.device)).square().mean()
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
                last_save = time.monotonic()
    log.close()


if __name__ == "__main__":
    typer.run(main)
