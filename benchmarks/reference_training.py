"""What the reference models' training has in common: weight average, learning rate, progress bar, log, checkpoints and resuming."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from tokencache_compile.learn.checkpoint import load_checkpoint, save_checkpoint
from tokencache_compile.learn.loop import generator_of

# Options of the scripts
PeakRate = Annotated[float, typer.Option(help="Learning rate of the plateau.")]
EmaDecay = Annotated[float, typer.Option(help="Decay of the weight average a step.")]
CaptionDropout = Annotated[float, typer.Option(help="Share of captions replaced by the empty one.")]
MixedPrecision = Annotated[str, typer.Option(help="accelerate's mixed precision: no, bf16 or fp16.")]

LossOf = Callable[[Any, torch.Generator, torch.device], Tensor]  # the net, what a batch is drawn from, and where the net is


def learning_rate(images: int, total: int, peak: float, warmup: int = 10_000, decay: float = 0.4) -> float:
    """Warm-up, plateau, then a linear fall to zero over the last ``decay`` of ``total`` images."""
    if images < warmup:
        return peak * images / warmup
    return peak * min(1.0, (total - images) / (decay * total))


def train(
    out: Path,
    model: Any,
    loss_of: LossOf,
    accelerator: Accelerator,
    *,
    images: int,
    batch: int,
    peak_lr: float,
    ema_decay: float,
    minutes_between_checkpoints: float,
    seed: int,
    on_save: Callable[[Path, Mapping[str, Any]], None] | None = None,
) -> None:
    """Train, or go on training, ``model`` (diffusers') in ``out``: ``checkpoint.safetensors``, ``log.jsonl`` and the average in ``ema``.

    Args:
        loss_of: of one batch of ``batch`` images; everything random in it comes from its generator, which is made from (seed, process,
            step), so that a resumed run repeats the uninterrupted one.
        images: in total, over all processes.
        on_save: called with the folder of the average, and with the images seen and the loss, whenever it was written.
    """
    ema = copy.deepcopy(model).eval().requires_grad_(False)
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
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step * total_batch, images, peak_lr)
            with accelerator.autocast():
                loss = loss_of(net, generator_of(seed, share, step), accelerator.device)
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
                if on_save is not None:
                    on_save(out / "ema", {"images": step * total_batch, "loss": loss_average})
                last_save = time.monotonic()
    log.close()
