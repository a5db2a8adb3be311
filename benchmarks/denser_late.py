"""Do I-steps that grow denser towards the end pay? On two reference models, for short runs, beside the default schedule of as many.

    python benchmarks/denser_late.py                      # → benchmarks/results/denser_late.json

Nothing recomputed, forecast 2; PSNR in dB of what the sampler ends with to the uncached run, over the range of that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DPMSolverMultistepScheduler
from judged import save
from pareto import REFERENCES

from tokencache_compile import CacheConfig, Schedule
from tokencache_compile.api import transform
from tokencache_compile.demo import machine
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.metrics import psnr
from tokencache_compile.sampling import sample

OUT = Path(__file__).resolve().parent / "results" / "denser_late.json"
POWERS = (1.2, 1.5)
_KEPT = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")


def samplers(subject: Subject) -> dict[str, Any]:
    """The subject's own sampler, and DPM-Solver++ with its noise."""
    own = subject.scheduler()
    return {"DDIM": own, "DPM-Solver++": DPMSolverMultistepScheduler(**{name: own.config[name] for name in _KEPT})}


def main(
    steps: Annotated[str, typer.Option(help="Numbers of sampling steps, with commas.")] = "20",
    noises: int = 12,
    threads: int = 2,
) -> None:
    """Measure what is missing."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    result: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"rows": {}}
    result |= {"noises": noises, "machine": machine()}
    for model in ("dit", "pixart"):
        subject = REFERENCES[model].subject(noises, "cpu")
        net, (noise, conditions) = subject.load(), subject.draw(0, noises)
        for count in map(int, steps.split(",")):
            default = Schedule.of_run(count)
            full = sum(map(default.is_full, range(count)))
            schedules = {"default": default} | {f"power {power:g}": Schedule.denser_late(count, full, power) for power in POWERS}
            for name, scheduler in samplers(subject).items():
                key = f"{subject.name}, {count} {name} steps, {full} of them I-steps"
                if key in result["rows"]:
                    continue
                reference = sample(net, scheduler, noise, count, conditions)
                row = {}
                for title, schedule in schedules.items():
                    config = CacheConfig(ratio=1.0, schedule=schedule)
                    cached = transform(net, config=config, backend="eager", scheduler=scheduler)
                    images = sample(cached, scheduler, noise, count, conditions)
                    row[title] = psnr(images, reference, 2.0 * float(reference.abs().max()))
                result["rows"][key] = row
                print(key, row, flush=True)
                save(result, OUT)


if __name__ == "__main__":
    typer.run(main)
