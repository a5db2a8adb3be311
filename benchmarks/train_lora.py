"""Train LoRA on the reference DiT's last K blocks, behind the shipped predictor and guided as it is deployed.

    python benchmarks/train_lora.py --run out/lora                                    # adapters for K = 1 … 4: out/lora/k1/lora …
    python benchmarks/train_lora.py --run out/lora --k 3 --out tokencache_compile/reference/cache_lora   # and the artefact that ships

Guidance pairs with one selection and the guided output's error, every step counted alike, 12 I-steps of 50, ratio 0.9. A stopped run
goes on. The artefact is the shipped plan but for K and the adapter; its predictor is a link to the shipped one, of the same bytes.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import nn
from train_predictor import FashionMnist
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

import tokencache_compile as tc
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.learn.lora import refine
from tokencache_compile.learn.train import TrainingConfig

PREDICTOR = "predictor.safetensors"


def link_predictor(out: Path, shipped: Path, net: nn.Module) -> None:
    """Put a link to the predictor of the artefact ``shipped`` in the place of the same one in ``out``; ``net`` is their base model."""
    (out / PREDICTOR).unlink()
    (out / PREDICTOR).symlink_to(os.path.relpath(shipped / PREDICTOR, out))
    CacheArtefact.from_pretrained(out, net)  # refuses a predictor of other bytes


def main(
    run: Annotated[Path, typer.Option(help="Folder of the runs, one subfolder for every K.")],
    out: Annotated[Path | None, typer.Option(help="Artefact directory to write, of the last K.")] = None,
    model: Annotated[Path, typer.Option(help="Folder of the reference DiT.")] = Path("tokencache_compile/reference/dit"),
    artefact: Annotated[Path, typer.Option(help="Its artefact, whose predictor chooses the tokens.")] = Path(
        "tokencache_compile/reference/cache"
    ),
    k: Annotated[str, typer.Option(help="The K to train for, commas between.")] = "4,1,2,3",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 120,
    batch: Annotated[int, typer.Option(help="Samples a step; each is a guidance pair.")] = 8,
    lr: float = 1e-3,
    rank: int = 8,
    guidance: float = 2.5,
    threads: int = 1,
    seed: int = 0,
) -> None:
    """Train and save."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    net = DiTTransformer2DModel.from_pretrained(model).eval()
    shipped = CacheArtefact.from_pretrained(artefact, net)
    base = replace(shipped.config, keep=None, groups=(), schedule=tc.Schedule.uniform(50, 12))
    training = TrainingConfig(
        steps=steps, batch=batch, lr=lr, cost_weight=None, label_dropout=0.0, guidance=guidance, ema_decay=0.98,
        checkpoint_every=25, seed=seed,
    )  # fmt: skip
    null = {"class_labels": torch.tensor(NULL_LABEL)}
    for last_k in map(int, k.split(",")):
        config = replace(base, last_k=last_k)
        scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
        adapter = refine(net, shipped.predictor, FashionMnist(), scheduler, config, training, run / f"k{last_k}", rank, null)
    if out is not None:
        refinement = {**asdict(training), "rank": rank, "schedule": asdict(config.schedule)}
        provenance = {**shipped.provenance, "refinement": {**refinement, "data": "Fashion-MNIST, 60,000 training images"}}
        refined = replace(shipped.config, last_k=last_k)
        replace(shipped, config=refined, lora_path=adapter, calibration_path=None, provenance=provenance).save_pretrained(out)
        link_predictor(out, artefact, net)


if __name__ == "__main__":
    typer.run(main)
