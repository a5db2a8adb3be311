"""Judge the reference DiT: does a guided sample show the class that was asked for, and do the samples of a class differ?

    python benchmarks/judge_reference.py --out out/judge_reference.json

1. Train a small CNN on the real training images and print its accuracy on the real test images.
2. Draw guided DDIM samples, the same number a class.
3. Agreement: the share of samples that the CNN takes for the class that was asked for. The CNN's recall on real test images
   stands beside it, because that is what a perfect generator would score: shirts are hard to tell from T-shirts and coats.
4. Diversity: the mean pixel distance between two samples of a class, divided by the same for real test images of that class.
   A class that collapsed to one picture scores 0, one as varied as the real images 1. Guidance lowers it, and noise that the
   sampler left behind would raise it.
5. Write everything as JSON, and a contact sheet of ten samples a class beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel
from fashion_mnist import CLASS_NAMES, load_fashion_mnist
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

CLASSES = len(CLASS_NAMES)
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "tokencache_compile" / "reference" / "dit"
DEFAULT_OUT = Path("out/judge_reference.json")
PROGRESS_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())


def make_classifier() -> nn.Module:
    """A CNN of three stages for images [n, 1, 32, 32]; 44,000 weights."""

    def stage(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*stage(1, 24), *stage(24, 48), *stage(48, 64), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 4 * 4, CLASSES))


def train_classifier(images: Tensor, labels: Tensor, epochs: int, seed: int, batch: int = 128) -> nn.Module:
    """Train on ``images`` [n, 1, 32, 32], each shown mirrored half of the time; the learning rate rises and falls once."""
    torch.manual_seed(seed)
    model = make_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    with Progress(*PROGRESS_COLUMNS) as bar:
        task = bar.add_task("classifier: steps", total=steps)
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for start in range(0, len(images) - batch + 1, batch):
                pick = order[start : start + batch]
                shown = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images[pick].flip(-1), images[pick])
                loss = nn.functional.cross_entropy(model(shown), labels[pick], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.advance(task)
    return model.eval()


@torch.inference_mode()
def classify(model: nn.Module, images: Tensor) -> Tensor:
    """The most likely class of each image, [n]."""
    return torch.cat([model(part).argmax(dim=1) for part in images.split(500)])


@torch.inference_mode()
def sample(model: Any, labels: Tensor, steps: int, guidance: float, batch: int, seed: int) -> Tensor:
    """One guided DDIM sample for each of ``labels``, [n, 1, 32, 32] in [-1, 1].

    The noise of all samples is drawn at once, so that the batch size does not decide who gets which.
    """
    noise = torch.randn(len(labels), 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    scheduler.set_timesteps(steps)
    done = []
    with Progress(*PROGRESS_COLUMNS) as bar:
        task = bar.add_task("samples: batches x steps", total=steps * -(-len(labels) // batch))
        for image, label in zip(noise.split(batch), labels.split(batch), strict=True):
            label_pair = torch.cat([label, torch.full_like(label, NULL_LABEL)])
            for timestep in scheduler.timesteps:
                predicted = model(torch.cat([image, image]), timestep=timestep.expand(len(label_pair)), class_labels=label_pair).sample
                conditional, unconditional = predicted.chunk(2)
                epsilon = unconditional + guidance * (conditional - unconditional)
                image = scheduler.step(epsilon, timestep, image).prev_sample
                bar.advance(task)
            done.append(image)
    return torch.cat(done).clamp(-1, 1)


def share_correct(predicted: Tensor, labels: Tensor) -> list[float]:
    """For each class, the share of its images that were taken for it."""
    return [float((predicted[labels == index] == index).double().mean()) for index in range(CLASSES)]


def taken_for(predicted: Tensor) -> dict[str, int]:
    """How many of ``predicted`` are of each class, classes that do not occur left out."""
    counts = torch.bincount(predicted, minlength=CLASSES).tolist()
    return {name: count for name, count in zip(CLASS_NAMES, counts, strict=True) if count}


def mean_pairwise_distance(images: Tensor) -> float:
    """Mean Euclidean distance in pixels between two different ones of ``images``."""
    return float(torch.pdist(images.flatten(1)).mean())


def diversity(images: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> list[float]:
    """For each class, the mean pairwise distance within ``images`` divided by that within ``real``."""
    return [
        mean_pairwise_distance(images[labels == index]) / mean_pairwise_distance(real[real_labels == index])
        for index in range(CLASSES)
    ]  # fmt: skip


def contact_sheet(images: Tensor, labels: Tensor, columns: int = 10, zoom: int = 2) -> Image.Image:
    """One row a class, its name on the left, then its first ``columns`` samples in the order in which they were drawn."""
    cell, margin = 32 * zoom + 2, 90
    columns = min(columns, len(images) // CLASSES)
    sheet = Image.new("L", (margin + columns * cell, CLASSES * cell), color=255)
    pen = ImageDraw.Draw(sheet)
    grey = images.add(1).mul(127.5).round().byte()[:, 0].numpy()
    for row, name in enumerate(CLASS_NAMES):
        pen.text((6, row * cell + cell // 2 - 6), name, fill=0)
        for column, index in enumerate((labels == row).nonzero()[:columns, 0].tolist()):
            picture = Image.fromarray(grey[index]).resize((32 * zoom, 32 * zoom), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * cell, row * cell))
    return sheet


def machine() -> dict[str, Any]:
    """What the run depends on besides its settings."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads_used": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def report(result: dict[str, Any]) -> Table:
    """The figures of each class and overall as a table."""
    table = Table("class", "agreement", "CNN on real images", "diversity")
    for name, row in result["classes"].items():
        table.add_row(name, f"{row['agreement']:.1%}", f"{row['classifier_recall']:.1%}", f"{row['diversity']:.2f}")
    table.add_section()
    overall = result["overall"]
    table.add_row("all", f"{overall['agreement']:.1%}", f"{overall['classifier_accuracy']:.1%}", f"{overall['diversity']:.2f}")
    return table


def main(
    model: Annotated[Path, typer.Option(help="Folder of the DiT, as save_pretrained wrote it.")] = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="JSON file to write; the contact sheet is the PNG of that name.")] = DEFAULT_OUT,
    samples: Annotated[int, typer.Option(help="Samples in total, a multiple of 10 and at least 20.")] = 1000,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Weight of classifier-free guidance; 1 is none.")] = 2.5,
    batch: Annotated[int, typer.Option(help="Samples drawn together; guidance doubles the rows.")] = 50,
    classifier_epochs: Annotated[int, typer.Option(help="Passes of the CNN over its training images.")] = 4,
    classifier_images: Annotated[int, typer.Option(help="Training images the CNN may see.")] = 60_000,
    seed: Annotated[int, typer.Option(help="Of the CNN's training and of the samples' noise.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Train the judge, sample the reference model, and report agreement and diversity a class."""
    if samples % CLASSES or samples < 2 * CLASSES:
        raise typer.BadParameter(f"--samples is {samples}; it must be a multiple of {CLASSES} and at least {2 * CLASSES}.")
    if not (model / "config.json").exists():
        raise typer.BadParameter(f"There is no config.json in {model}: name the folder that train_reference.py wrote, with --model.")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    console = Console()

    train_images, train_labels = load_fashion_mnist("train")
    test_images, test_labels = load_fashion_mnist("test")
    start = time.monotonic()
    classifier = train_classifier(train_images[:classifier_images], train_labels[:classifier_images], classifier_epochs, seed)
    classifier_seconds = time.monotonic() - start
    test_predicted = classify(classifier, test_images)
    accuracy = float((test_predicted == test_labels).double().mean())
    recall = share_correct(test_predicted, test_labels)
    console.print(f"The CNN is right on {accuracy:.2%} of the real test images.")

    transformer = DiTTransformer2DModel.from_pretrained(model).eval()
    labels = torch.arange(CLASSES).repeat_interleave(samples // CLASSES)
    start = time.monotonic()
    drawn = sample(transformer, labels, steps, guidance, batch, seed)
    sampling_seconds = time.monotonic() - start

    drawn_predicted = classify(classifier, drawn)
    agreement = share_correct(drawn_predicted, labels)
    spread = diversity(drawn, labels, test_images, test_labels)
    result = {
        "overall": {"agreement": sum(agreement) / CLASSES, "diversity": sum(spread) / CLASSES, "classifier_accuracy": accuracy},
        "classes": {
            name: {
                "agreement": agreement[index], "diversity": spread[index], "classifier_recall": recall[index],
                "taken_for": taken_for(drawn_predicted[labels == index]),
            }
            for index, name in enumerate(CLASS_NAMES)
        },
        "settings": {
            "model": str(model), "weights_sha256": hashlib.sha256((model / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest(),
            "sampler": "DDIM", "scheduler": SCHEDULER_CONFIG, "steps": steps, "guidance": guidance, "samples": samples, "batch": batch,
            "classifier_epochs": classifier_epochs, "classifier_images": min(classifier_images, len(train_images)), "seed": seed,
        },
        "machine": machine(),
        "seconds": {"classifier": round(classifier_seconds, 1), "sampling": round(sampling_seconds, 1)},
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    contact_sheet(drawn, labels).save(out.with_suffix(".png"))
    console.print(report(result))
    console.print(f"Written: {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
