"""What do step weights fitted to whole runs gain over a forecast by step numbers? On a reference model, for several schedules.

    python benchmarks/fit_step_weights.py pixart          # → benchmarks/results/step_weights_pixart.json: pareto.py has rows of it
    python benchmarks/fit_step_weights.py dit --noises 16

Nothing recomputed. The noises are others than pareto.py measures on; PSNR is that of the quarter that the fit did not see.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from judged import save
from pareto import REFERENCES

from tokencache_compile import CacheConfig, Schedule
from tokencache_compile.demo import machine
from tokencache_compile.json_data import to_json
from tokencache_compile.learn.step_weights import fit_step_weights

RESULTS = Path(__file__).resolve().parent / "results"
FIRST = 500  # number of the first noise that is fitted to


def denser_late(steps: int, full_steps: int) -> Schedule:
    """I-steps of which the first and the last step are two, and the intervals between them grow shorter towards the end."""
    places = (1 - (1 - j / (full_steps - 1)) ** 1.5 for j in range(full_steps))
    return Schedule(steps, tuple(sorted({round((steps - 1) * place) for place in places})))


def schedules_of(steps: int) -> dict[str, Schedule]:
    """Even spacings, with and without the last step, and uneven ones for the speed-ups that methods are compared at."""
    found = {f"every {every}": Schedule(every) for every in (2, 3, 4)}
    counts = (round(share * steps) for share in (0.4, 0.3, 0.35, 0.45, 0.65, 0.55))
    found |= {f"{count} I-steps, denser late": denser_late(steps, count) for count in counts}
    return found | {f"every {every} and the last": Schedule.with_last(steps, every) for every in (2, 3)}


def main(
    model: Annotated[Literal["dit", "pixart"], typer.Argument(help="Which reference model.")],
    noises: Annotated[int, typer.Option(help="Of the fit, a quarter of them held out.")] = 12,
    iterations: Annotated[int, typer.Option(help="Of Gauss-Newton.")] = 4,
    schedules: Annotated[str, typer.Option(help="Those whose names hold this.")] = "",
    threads: int = 2,
) -> None:
    """Fit what is missing."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    out = RESULTS / f"step_weights_{model}.json"
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"settings": {}, "rows": {}}
    subject = REFERENCES[model].subject(1000)
    settings = {"model": subject.name, "steps": subject.steps, **subject.settings, "noises": noises, "iterations": iterations}
    if result["settings"] not in ({}, settings):
        raise typer.BadParameter(f"{out} holds fits of {result['settings']}, and asked for is {settings}. Delete it to fit anew.")
    result["settings"], result["machine"] = settings, machine()
    noise, conditions = subject.draw(FIRST, noises)
    for name, schedule in schedules_of(subject.steps).items():
        if name in result["rows"] or schedules not in name:
            continue
        start = time.perf_counter()
        config = CacheConfig(ratio=1.0, schedule=schedule)
        found = fit_step_weights(subject.load(), subject.scheduler(), noise, conditions, subject.steps, config, iterations=iterations)
        row = {"polynomial_db": found.polynomial_db, "fitted_db": found.fitted_db, "seconds": time.perf_counter() - start}
        result["rows"][name] = row | {"config": to_json(found.config)}
        print(name, row, flush=True)
        save(result, out)


if __name__ == "__main__":
    typer.run(main)
