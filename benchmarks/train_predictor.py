"""Train the reference DiT's cache predictor on Fashion-MNIST and write its artefact.

    python benchmarks/train_predictor.py --run out/predictor --out tokencache_compile/reference/cache

The recipe that ships is the defaults below: guidance pairs with one selection and the guided output's error, a fixed budget a
block in the place of λ, every step counted alike, on the deployed path (reused attention forecast). ``accelerate launch`` runs
it on several devices; a stopped run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTTransformer2DModel
from fashion_mnist import load_fashion_mnist
from torch import Tensor
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

import tokencache_compile as tc
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.fingerprint import fingerprint
from tokencache_compile.learn.train import TrainingConfig, train_predictor


class FashionMnist:
    """The training images and their classes, as ``train_predictor`` reads them."""

    def __init__(self) -> None:
        self.images, self.labels = load_fashion_mnist("train")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.images[index], {"class_labels": self.labels[index]}


def main(
    run: Annotated[Path, typer.Option(help="Folder of the run: checkpoint and log.")],
    out: Annotated[Path, typer.Option(help="Artefact directory to write.")],
    model: Annotated[Path, typer.Option(help="Folder of the reference DiT.")] = Path("tokencache_compile/reference/dit"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Samples a step, over all processes; each is a guidance pair.")] = 8,
    lr: float = 5e-4,
    cost_weight: Annotated[float | None, typer.Option(help="λ of Eq. 9; a fixed budget a block if left out.")] = None,
    last_k: int = 0,
    full_steps: Annotated[int, typer.Option(help="I-steps of 50, evenly spread.")] = 12,
    context: str = "reuse",
    forecast: int = 2,
    guidance: float = 2.5,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Train and save."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    net = DiTTransformer2DModel.from_pretrained(model).eval().to(accelerator.device)
    config = tc.CacheConfig(
        last_k=last_k, context=context, forecast=forecast, selection="pair", schedule=tc.Schedule.uniform(50, full_steps)  # type: ignore[arg-type]
    )  # fmt: skip
    training = TrainingConfig(
        steps=steps, batch=batch, lr=lr, cost_weight=cost_weight, label_dropout=0.0, guidance=guidance, ema_decay=0.98, checkpoint_every=50,
        seed=seed,
    )  # fmt: skip
    null = {"class_labels": torch.tensor(NULL_LABEL)}
    predictor = train_predictor(net, FashionMnist(), DDIMScheduler(**SCHEDULER_CONFIG), config, training, run, null, accelerator)
    provenance = {"training": asdict(training), "torch": torch.__version__, "data": "Fashion-MNIST, 60,000 training images"}
    artefact = CacheArtefact(
        config=replace(config, scorer="predictor"), base=fingerprint(net), predictor=predictor, steps=50, provenance=provenance
    )
    artefact.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
