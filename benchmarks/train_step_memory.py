"""One optimizer step of the predictor's training at full size: DiT-XL/2, batch 1, random weights. Seconds and peak memory.

    python benchmarks/train_step_memory.py --out benchmarks/results/train_step_memory.json
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DDIMScheduler
from step_latency import random_model
from torch import Tensor

import tokencache_compile as tc
from tokencache_compile.learn.train import TrainingConfig, train_predictor


class Noise:
    """Latents of nothing in particular."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        draw = torch.Generator().manual_seed(index)
        return torch.randn(4, 32, 32, generator=draw), {"class_labels": torch.tensor(index)}


def main(out: Annotated[Path, typer.Option(help="JSON file.")], steps: int = 2) -> None:
    """Train for ``steps`` steps of the paper's setting (kept, hold, λ = 1e-4) and write what they took."""
    model = random_model("cpu", torch.float32)
    config = tc.CacheConfig(last_k=4, context="kept", forecast=0)
    training = TrainingConfig(steps=steps, batch=1, checkpoint_every=steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train_predictor(model, Noise(), DDIMScheduler(), config, training, Path(folder), {"class_labels": torch.tensor(1000)})
        seconds = time.perf_counter() - start
        losses = [json.loads(line)["cache_loss"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    result = dict(
        model="DiT-XL/2 256x256, random weights", batch=1, steps=steps, seconds=seconds, cache_loss=losses, torch=torch.__version__,
        threads=torch.get_num_threads(), cores=os.cpu_count(), peak_rss_bytes_before=before,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    typer.run(main)
