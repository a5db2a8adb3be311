"""Which settings measure best on the reference DiT: PSNR to the uncached run over MACs, beside fewer steps of the same MACs.

    python benchmarks/choose_defaults.py --out benchmarks/results/choose_defaults.json

Every row is one 50-step guided DDIM run from the same noises. ``margin_db`` is its PSNR minus that of the plain sampler with
the least number of steps whose MACs are at least the row's. Rows are appended as they come, so a killed run resumes.
"""

from __future__ import annotations

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
from tokencache_compile.metrics import psnr
from tokencache_compile.plan import CacheConfig
from tokencache_compile.sampling import Conditions, sample

BASE = dict(ratio=0.9, last_k=0, context="reuse", forecast=2, history="full_steps", scorer="random", every=4)


def grid() -> list[dict[str, Any]]:
    """The settings measured: fields of CacheConfig (``every`` stands for the schedule, None for the default one), varied around BASE."""
    changes: list[dict[str, Any]] = [{}, dict(every=None)]
    changes += [dict(last_k=k) for k in (2, 4)]
    changes += [dict(context=c) for c in ("kept", "cached", "full")]
    changes += [dict(forecast=order) for order in (0, 1)]
    changes += [dict(history="computed"), dict(context="kept", forecast=0, history="computed")]
    changes += [dict(scorer=scorer) for scorer in ("norm", "change")]
    changes += [dict(every=every) for every in (2, 3, 5)]
    changes += [dict(ratio=ratio) for ratio in (0.5, 0.7, 1.0)]
    changes += [dict(ratio=1.0, every=every) for every in (2, 3)]
    changes += [dict(cache_dtype=dtype) for dtype in ("bfloat16", "float8_e4m3fn")]
    return [BASE | change for change in changes]


def main(
    out: Annotated[Path, typer.Option(help="JSON file, appended to.")],
    model: Annotated[Path, typer.Option(help="Folder of the reference DiT.")] = Path("tokencache_compile/reference/dit"),
    samples: int = 40,
    steps: int = 50,
    guidance: float = 2.5,
) -> None:
    """Measure the grid."""
    net = DiTTransformer2DModel.from_pretrained(model).eval()
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(1234))
    labels = torch.arange(samples) % 10
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"fewer_steps": {}, "rows": []}
    result["settings"] = dict(
        samples=samples, steps=steps, guidance=guidance, seed=1234, torch=torch.__version__, machine=platform.processor()
    )

    def run(transformer: Any, count: int) -> torch.Tensor:
        return sample(transformer, scheduler, noise, count, Conditions.of_labels(labels, NULL_LABEL, guidance)).clamp(-1, 1)

    reference = run(net, steps)

    def fewer(count: int) -> float:
        if str(count) not in result["fewer_steps"]:
            result["fewer_steps"][str(count)] = psnr(run(net, count), reference)
        return float(result["fewer_steps"][str(count)])

    done = {json.dumps(row["config"], sort_keys=True) for row in result["rows"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in track(grid(), "settings"):
        if json.dumps(row, sort_keys=True) in done:
            continue
        settings = dict(row)
        every = settings.pop("every")
        config = CacheConfig(schedule=None if every is None else tc.Schedule(every), **settings)
        cached = tc.transform(net, config=config, backend="eager", scheduler=scheduler)
        value = psnr(run(cached, steps), reference)
        summary = cached.summary()
        equivalent = summary.macs / summary.macs_uncached * steps
        margin = value - fewer(math.ceil(equivalent))
        result["rows"].append(dict(config=row, psnr_db=value, full_step_equivalents=equivalent, margin_db=margin))
        out.write_text(json.dumps(result, indent=1))
    for row in sorted(result["rows"], key=lambda r: -r["margin_db"]):
        print(
            f"{row['margin_db']:+6.2f} dB  PSNR {row['psnr_db']:5.2f}  MACs of {row['full_step_equivalents']:5.2f} steps  {row['config']}"
        )


if __name__ == "__main__":
    typer.run(main)
