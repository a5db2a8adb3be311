"""Train the reference PixArt's cache predictor, and LoRA behind it, on the emoji with captions; write their artefact.

    python benchmarks/train_pixart_cache.py --run out/pixart_cache --out tokencache_compile/reference/cache_pixart

The recipe is the reference DiT's (train_predictor.py, train_lora.py) on another deployment: 20 guided DPM-Solver++ steps, the I-steps of
judge_pixart.py's ratio 0.9, forecast 1. A stopped run goes on. OUT's plan is the best of judge_pixart.py, which recomputes nothing; its
predictor serves who asks for another ratio. The adapter comes with a plan of its own, in OUT_lora, whose predictor is a link to OUT's.
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
from judge_pixart import FEWER_LATE, GUIDANCE, LATE, MODEL, STEPS
from torch import Tensor
from train_lora import link_predictor
from train_pixart import SCHEDULER_CONFIG

import tokencache_compile as tc
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.fingerprint import fingerprint
from tokencache_compile.learn.lora import refine
from tokencache_compile.learn.train import TrainingConfig, train_predictor

CONDITIONS = ("encoder_hidden_states", "encoder_attention_mask")


class CaptionedEmoji:
    """The pairs that the model was trained on, as ``train_predictor`` reads them."""

    def __init__(self) -> None:
        emoji = load_emoji()
        states, masks = encode(emoji.captions)
        seen = ~emoji.held_out
        self.images, self.conditions = emoji.images[seen], (states[seen], masks[seen])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.images[index], dict(zip(CONDITIONS, (values[index] for values in self.conditions), strict=True))


def main(
    run: Annotated[Path, typer.Option(help="Folder of the runs: checkpoints and logs.")],
    out: Annotated[Path, typer.Option(help="Artefact directory to write; the adapter's is named after it.")],
    model: Annotated[Path, typer.Option(help="Folder of the reference PixArt.")] = MODEL,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the predictor.")] = 1000,
    lora_steps: Annotated[int, typer.Option(help="Optimizer steps of the LoRA.")] = 240,
    batch: Annotated[int, typer.Option(help="Samples a step; each is a guidance pair.")] = 8,
    lr: float = 5e-4,
    lora_lr: float = 2e-4,
    last_k: Annotated[int, typer.Option(help="K of the LoRA; the predictor learns for every block.")] = 2,
    rank: int = 8,
    threads: int = 1,
    seed: int = 0,
) -> None:
    """Train and save."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    net = PixArtTransformer2DModel.from_pretrained(model).eval()
    config = tc.CacheConfig(last_k=0, forecast=1, selection="pair", schedule=tc.Schedule(full=FEWER_LATE))
    training = TrainingConfig(
        steps=steps, batch=batch, lr=lr, cost_weight=None, label_dropout=0.0, guidance=GUIDANCE, sampling_steps=STEPS, ema_decay=0.98,
        checkpoint_every=50, seed=seed,
    )  # fmt: skip
    data, scheduler = CaptionedEmoji(), DPMSolverMultistepScheduler(**SCHEDULER_CONFIG)
    null = dict(zip(CONDITIONS, (value[0] for value in encode([""])), strict=True))
    predictor = train_predictor(net, data, scheduler, config, training, run / "predictor", null)
    refining = replace(training, steps=lora_steps, lr=lora_lr, checkpoint_every=25)
    refined = replace(config, last_k=last_k)
    adapter = refine(net, predictor, data, scheduler, refined, refining, run / "lora", rank, null)
    words = f"{len(data)} pairs of emoji and caption"
    provenance = {
        "training": asdict(training), "refinement": {**asdict(refining), "rank": rank}, "torch": torch.__version__, "data": words,
    }  # fmt: skip
    plan = replace(config, ratio=1.0, schedule=tc.Schedule(full=LATE), scorer="predictor")
    shipped = CacheArtefact(config=plan, base=fingerprint(net), predictor=predictor, steps=STEPS, provenance=provenance)
    shipped.save_pretrained(out)
    beside = out.with_name(f"{out.name}_lora")
    replace(shipped, config=replace(refined, scorer="predictor"), lora_path=adapter).save_pretrained(beside)
    link_predictor(beside, out, net)


if __name__ == "__main__":
    typer.run(main)
