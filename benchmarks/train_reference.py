"""Train the reference DiT: class-conditional Fashion-MNIST, 32x32, patch 4, 64 tokens, epsilon prediction.

    python benchmarks/train_reference.py --images 500000 --out benchmarks/reference/run

Runs on accelerate (CPU, one or several GPUs). It writes a checkpoint every few minutes and resumes from it: batch, noise
and dropped labels of a step are drawn from (seed, step), so a resumed run repeats the uninterrupted one. The averaged
weights are saved at the end, and with every checkpoint, in diffusers' own ``save_pretrained`` layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTTransformer2DModel
from fashion_mnist import load_fashion_mnist
from reference_training import EmaDecay, MixedPrecision, PeakRate, train
from torch import Tensor

NULL_LABEL = 10  # the unconditional class of classifier-free guidance
MODEL_CONFIG = dict(
    num_attention_heads=4, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=12, sample_size=32,
    patch_size=4, num_embeds_ada_norm=10,
)  # fmt: skip
SCHEDULER_CONFIG = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log and averaged weights.")],
    images: Annotated[int, typer.Option(help="Training images in total.")] = 500_000,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    peak_lr: PeakRate = 1e-3,
    ema_decay: EmaDecay = 0.999,
    label_dropout: Annotated[float, typer.Option(help="Share of labels replaced by the null class.")] = 0.1,
    mixed_precision: MixedPrecision = "bf16",
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

    def loss_of(net: Any, draw: torch.Generator, device: torch.device) -> Tensor:
        pick = torch.randint(len(data), (batch,), generator=draw)
        clean, label = data[pick], labels[pick].clone()
        label[torch.rand(batch, generator=draw) < label_dropout] = NULL_LABEL
        timestep = torch.randint(1000, (batch,), generator=draw)
        noise = torch.randn(clean.shape, generator=draw)
        noisy = scheduler.add_noise(clean, noise, timestep).to(device)
        predicted = net(noisy, timestep=timestep.to(device), class_labels=label.to(device)).sample
        return (predicted.float() - noise.to(device)).square().mean()

    train(
        out, model, loss_of, accelerator, images=images, batch=batch, peak_lr=peak_lr, ema_decay=ema_decay,
        minutes_between_checkpoints=minutes_between_checkpoints, seed=seed,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
