"""Which settings measure best on the reference DiT: PSNR to the uncached run over MACs, beside fewer steps of the same MACs.

    python benchmarks/choose_defaults.py --out benchmarks/results/choose_defaults.json

Every row is one 50-step guided DDIM run from the same noises. ``margin_db`` is its PSNR minus that of the plain sampler with
the least number of steps whose MACs are at least the row's. Rows are appended as they come, so a killed run resumes.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel
from rich.progress import track
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

import tokencache_compile as tc
from tokencache_compile.plan import CacheConfig


def sample(net: Any, scheduler: DDIMScheduler, noise: torch.Tensor, labels: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """Images [B, 1, 32, 32] of one guided DDIM run."""
    scheduler.set_timesteps(steps)
    x, rows = noise, torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
    for t in scheduler.timesteps:
        with torch.no_grad():
            noise_pred = net(torch.cat([x, x]), timestep=t.expand(len(rows)), class_labels=rows, return_dict=False)[0]
        cond, uncond = noise_pred.chunk(2)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x.clamp(-1, 1)


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Decibels, range 2, from the mean squared error over all images."""
    return 10 * math.log10(4.0 / float((images - reference).square().mean()))


def grid(quick: bool) -> list[dict[str, Any]]:
    """The settings measured, as fields of CacheConfig (``every`` stands for the schedule)."""
    contexts, orders = ("kept", "cached", "full", "reuse"), (0, 1, 2)
    rows = [dict(ratio=0.9, last_k=4, context=c, forecast=f, scorer="change", every=4) for c, f in itertools.product(contexts, orders)]
    rows += [dict(ratio=0.9, last_k=4, context=c, forecast=f, scorer=s, every=4) for c, f, s in itertools.product(("full",), (1, 2), ("norm", "random"))]
    rows += [dict(ratio=0.9, last_k=4, context="full", forecast=f, scorer="change", every=e) for f, e in itertools.product(orders, (2, 3, 5))]
    rows += [dict(ratio=r, last_k=4, context="full", forecast=f, scorer="change", every=4) for r, f in itertools.product((1.0, 0.8, 0.7, 0.5), (1, 2))]
    rows += [dict(ratio=r, last_k=k, context="full", forecast=f, scorer="change", every=4) for r, k, f in itertools.product((1.0, 0.9), (0, 2), (1, 2))]
    return rows[:12] if quick else rows


def main(
    out: Annotated[Path, typer.Option(help="JSON file, appended to.")],
    model: Annotated[Path, typer.Option(help="Folder of the reference DiT.")] = Path("tokencache_compile/reference/dit"),
    samples: int = 40,
    steps: int = 50,
    guidance: float = 2.5,
    quick: bool = False,
) -> None:
    """Measure the grid."""
    net = DiTTransformer2DModel.from_pretrained(model).eval()
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(1234))
    labels = torch.arange(samples) % 10
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"fewer_steps": {}, "rows": []}
    result["settings"] = dict(samples=samples, steps=steps, guidance=guidance, seed=1234, torch=torch.__version__, machine=platform.processor())
    reference = sample(net, scheduler, noise, labels, steps, guidance)

    def fewer(count: int) -> float:
        if str(count) not in result["fewer_steps"]:
            images = sample(net, scheduler, noise, labels, count, guidance)
            result["fewer_steps"][str(count)] = psnr(images, reference) if count < steps else math.inf
        return float(result["fewer_steps"][str(count)])

    done = {json.dumps(row["config"], sort_keys=True) for row in result["rows"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in track(grid(quick), "settings"):
        if json.dumps(row, sort_keys=True) in done:
            continue
        settings = dict(row)
        config = CacheConfig(schedule=tc.Schedule(every=settings.pop("every")), **settings)
        cached = tc.transform(net, config=config, backend="eager", scheduler=scheduler)
        value = psnr(sample(cached, scheduler, noise, labels, steps, guidance), reference)
        summary = cached.summary()
        equivalent = summary.macs / summary.macs_uncached * steps
        margin = value - fewer(math.ceil(equivalent))
        result["rows"].append(dict(config=row, psnr_db=value, full_step_equivalents=equivalent, margin_db=margin))
        out.write_text(json.dumps(result, indent=1))
    for row in sorted(result["rows"], key=lambda r: -r["margin_db"]):
        print(f"{row['margin_db']:+6.2f} dB  PSNR {row['psnr_db']:5.2f}  MACs of {row['full_step_equivalents']:5.2f} steps  {row['config']}")


if __name__ == "__main__":
    typer.run(main)
