"""`tune` on the reference DiT, guided: the fastest plan at least as close to the uncached run as half the steps are.

    python benchmarks/tune_reference.py --out benchmarks/results/tune_reference.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel
from judge_reference import machine
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

from tokencache_compile.learn.tune import Goal, tune
from tokencache_compile.metrics import psnr
from tokencache_compile.sampling import Conditions, sample


def main(
    out: Annotated[Path, typer.Option(help="JSON file of the result; the measurements lie beside it while it runs.")],
    model: Annotated[Path, typer.Option(help="Folder of the reference DiT.")] = Path("tokencache_compile/reference/dit"),
    samples: int = 20,
    steps: int = 50,
    guidance: float = 2.5,
    budget: int = 24,
    latency: bool = False,
) -> None:
    """Measure half the steps, search, and write the front and the choice."""
    torch.set_flush_denormal(True)
    net = DiTTransformer2DModel.from_pretrained(model).eval()
    noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(77))
    conditions = Conditions.of_labels(torch.arange(samples) % 10, NULL_LABEL, guidance)
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    reference, half = (sample(net, scheduler, noise, count, conditions) for count in (steps, steps // 2))
    bar = psnr(half, reference, data_range=2 * float(reference.abs().max()))
    search = out.with_suffix(".search.json")
    result = tune(net, scheduler, noise, conditions, steps, Goal(psnr=bar), search, budget=budget, measure_latency=latency)
    rows = [
        dict(
            ratio=c.config.ratio, last_k=c.config.last_k, schedule=str(c.config.schedule_of(steps)), context=c.config.context,
            forecast=c.config.forecast, psnr_db=c.psnr, macs_speedup=c.speedup, latency_speedup=c.latency_speedup,
        )
        for c in (result.best, *result.front)
    ]  # fmt: skip
    summary = dict(
        half_the_steps_psnr_db=bar, samples=samples, steps=steps, guidance=guidance, candidates=len(result.candidates),
        best=rows[0], front=rows[1:], machine=machine(),
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(summary, indent=1) + "\n")
    search.unlink()
    print(json.dumps(rows[0]), f"half the steps: {bar:.2f} dB")


if __name__ == "__main__":
    typer.run(main)
