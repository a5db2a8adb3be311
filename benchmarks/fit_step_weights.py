"""What do step weights fitted to whole runs gain over a forecast by step numbers? On a reference model, for several schedules.

    python benchmarks/fit_step_weights.py pixart          # → benchmarks/results/step_weights_pixart.json: pareto.py has rows of it
    python benchmarks/fit_step_weights.py dit --noises 64 --device cuda --processes 9

Nothing recomputed. The noises are others than pareto.py measures on; PSNR is that of the quarter that the fit did not see.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
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


# How much shorter the intervals between I-steps grow towards the end: a run of few steps gains from more of it.
POWERS = {"pixart": 1.5, "dit": 1.2}


def schedules_of(model: str, steps: int) -> dict[str, Schedule]:
    """Even spacings, with the last step and without, and uneven ones for the speed-ups that methods are compared at."""
    counts = (round(share * steps) for share in (0.4, 0.3, 0.35, 0.45, 0.65, 0.55))
    found = {f"{count} I-steps, denser late": Schedule.denser_late(steps, count, POWERS[model]) for count in counts}
    if steps < 36:
        found |= {f"every {every}": Schedule(every) for every in (2, 3, 4)}
    return found | {f"every {every} and the last": Schedule.with_last(steps, every) for every in ((2, 3) if steps < 36 else (2, 3, 4))}


def fitted(model: str, schedule: Schedule, noises: int, iterations: int, threads: int, device: str) -> dict[str, Any]:
    """The fit of one schedule: PSNR before and after, seconds, and the settings with the weights."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    start, subject = time.perf_counter(), REFERENCES[model].subject(1000, device)
    noise, conditions = subject.draw(FIRST, noises)
    run = subject.load(), subject.scheduler(), noise, conditions, subject.steps
    backend = "eager" if device == "cpu" else "inductor"
    found = fit_step_weights(*run, CacheConfig(ratio=1.0, schedule=schedule), iterations=iterations, backend=backend)
    row = {"polynomial_db": found.polynomial_db, "fitted_db": found.fitted_db, "seconds": time.perf_counter() - start}
    return row | {"config": to_json(found.config)}


def main(
    model: Annotated[Literal["dit", "pixart"], typer.Argument(help="Which reference model.")],
    out: Annotated[Path | None, typer.Option(help="JSON file; benchmarks/results/step_weights_MODEL.json if left out.")] = None,
    noises: Annotated[int, typer.Option(help="Of the fit, a quarter of them held out.")] = 12,
    iterations: Annotated[int, typer.Option(help="Of Gauss-Newton.")] = 4,
    schedules: Annotated[str, typer.Option(help="Those whose names hold this.")] = "",
    threads: Annotated[int, typer.Option(help="Of torch, in each process.")] = 2,
    processes: Annotated[int, typer.Option(help="Schedules that are fitted side by side.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Fit what is missing."""
    out = out or RESULTS / f"step_weights_{model}.json"
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"settings": {}, "rows": {}}
    subject = REFERENCES[model].subject(1000, device)
    settings = {"model": subject.name, "steps": subject.steps, **subject.settings, "noises": noises, "iterations": iterations}
    if result["settings"] not in ({}, settings):
        raise typer.BadParameter(f"{out} holds fits of {result['settings']}, and asked for is {settings}. Delete it to fit anew.")
    result["settings"], result["machine"] = settings, machine()
    wanted = {name: one for name, one in schedules_of(model, subject.steps).items() if schedules in name and name not in result["rows"]}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(fitted, model, one, noises, iterations, threads, device): name for name, one in wanted.items()}
        for future in as_completed(futures):
            name, row = futures[future], future.result()
            result["rows"][name] = row
            print(name, {key: value for key, value in row.items() if key != "config"}, flush=True)
            save(result, out)


if __name__ == "__main__":
    typer.run(main)
