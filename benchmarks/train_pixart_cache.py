"""Train the reference PixArt's cache predictor on emoji and write its artefact.

    python benchmarks/train_pixart_cache.py --run out/pixart_predictor --out tokencache_compile/reference/pixart_cache

The recipe is train_predictor.py's, on 20 guided DPM-Solver++ steps. A stopped run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from emoji import encode, load_emoji
from judge_pixart import GUIDANCE, MODEL, STEPS
from torch import Tensor
from train_pixart import SCHEDULER_CONFIG

import tokencache_compile as tc
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.fingerprint import fingerprint
from tokencache_compile.learn.train import TrainingConfig, train_predictor


class Captioned:
    """The pairs that the model was trained on, as ``train_predictor`` reads them."""

    def __init__(self) -> None:
        emoji = load_emoji()
        states, masks = encode(emoji.captions)
        seen = ~emoji.held_out
        self.images, self.states, self.masks = emoji.images[seen], states[seen], masks[seen]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.images[index], {"encoder_hidden_states": self.states[index], "encoder_attention_mask": self.masks[index]}


def main(
    run: Annotated[Path, typer.Option(help="Folder of the run: checkpoint and log.")],
    out: Annotated[Path, typer.Option(help="Artefact directory to write.")],
    model: Annotated[Path, typer.Option(help="Folder of the reference PixArt.")] = MODEL,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 400,
    batch: Annotated[int, typer.Option(help="Samples a step; each is a guidance pair.")] = 8,
    lr: float = 5e-4,
    every: Annotated[int, typer.Option(help="An I-step every so many steps.")] = 3,
    ratio: float = 0.9,
    context: str = "reuse",
    forecast: int = 1,
    threads: int = 1,
    seed: int = 0,
) -> None:
    """Train and save."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    net = PixArtTransformer2DModel.from_pretrained(model).eval()
    config = tc.CacheConfig(ratio=ratio, context=context, forecast=forecast, selection="pair", schedule=tc.Schedule(every))  # type: ignore[arg-type]
    training = TrainingConfig(
        steps=steps, batch=batch, lr=lr, cost_weight=None, label_dropout=0.0, guidance=GUIDANCE, sampling_steps=STEPS, ema_decay=0.98,
        checkpoint_every=50, seed=seed,
    )  # fmt: skip
    states, mask = encode([""])
    null = {"encoder_hidden_states": states[0], "encoder_attention_mask": mask[0]}
    predictor = train_predictor(net, Captioned(), DPMSolverMultistepScheduler(**SCHEDULER_CONFIG), config, training, run, null)
    provenance = {"training": asdict(training), "torch": torch.__version__, "data": "emoji of food and drink, the pairs not held out"}
    artefact = CacheArtefact(
        config=replace(config, scorer="predictor"), base=fingerprint(net), predictor=predictor, steps=STEPS, provenance=provenance
    )
    artefact.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
