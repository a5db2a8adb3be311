"""Seconds of an I-step and a P-step of DiT-XL/2 at 256x256, beside their MACs: does the clock follow the arithmetic?

    python benchmarks/step_latency.py --out benchmarks/results/step_latency_cpu.json
    python benchmarks/step_latency.py --out benchmarks/results/step_latency_cuda.json --device cuda

CPU: batch 2, float32. CUDA: batch 16, bfloat16, CUDA events. Random weights. The eager model, the I-step and the P-steps run in
turn in every round; the figures are medians over the rounds. A P-step's seconds hold its share of what is made ahead for all P-steps of a
50-step run (``ahead_seconds``). ``time_over_macs`` is (P/I seconds) / (P/I MACs).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from diffusers import DiTTransformer2DModel
from rich.progress import track

import tokencache_compile as tc
from tokencache_compile.passes.pipeline import StepPrograms, build_steps
from tokencache_compile.step_times import Steps, seconds

DIT_XL_2 = dict(
    num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32, patch_size=2,
    num_embeds_ada_norm=1000, activation_fn="gelu-approximate",
)  # fmt: skip
CONFIGS = {
    "default": tc.CacheConfig(ratio=0.9, last_k=4, schedule=tc.Schedule(4)),
    "kept, hold": tc.CacheConfig(ratio=0.9, last_k=4, context="kept", forecast=0, history="computed", schedule=tc.Schedule(4)),
}


def random_model(device: str, dtype: torch.dtype) -> DiTTransformer2DModel:
    """DiT-XL/2 with random weights, large enough that no block is close to the identity."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(**DIT_XL_2)
    buffers = dict(DiTTransformer2DModel(**{**DIT_XL_2, "num_layers": 1}).named_buffers())
    model.to_empty(device=device)
    draw = torch.Generator(device=device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02, generator=draw)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model.to(dtype).eval().requires_grad_(False)


def main(
    out: Annotated[Path, typer.Option(help="JSON file.")],
    device: str = "cpu",
    rounds: int = 7,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's own choice.")] = 0,
    backends: str = "eager,inductor",
) -> None:
    """Measure and write the JSON."""
    if threads:
        torch.set_num_threads(threads)
    batch, dtype = (2, torch.float32) if device == "cpu" else (16, torch.bfloat16)
    model = random_model(device, dtype)
    draw = torch.Generator().manual_seed(1)
    call = dict(
        hidden_states=torch.randn(batch, 4, 32, 32, generator=draw).to(device, dtype),
        timestep=torch.full((batch,), 500, device=device),
        class_labels=torch.randint(0, 1000, (batch,), generator=draw).to(device),
    )
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    process = psutil.Process()
    result: dict[str, Any] = dict(
        model="DiT-XL/2 256x256, random weights", batch=batch, dtype=str(dtype), device=device, torch=torch.__version__,
        machine=torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(), rounds=rounds, weight_bytes=weight_bytes, load_average=os.getloadavg(), backends={},
    )  # fmt: skip
    first = model.transformer_blocks[0]
    predictor = tc.CachePredictor(first, first.norm1.linear.in_features, len(model.transformer_blocks))
    torch.nn.init.normal_(predictor.head.weight, std=0.02)
    programs: dict[str, StepPrograms] = {}
    result["transform"] = {}
    for name, config in CONFIGS.items():
        for suffix, scorer in (("", None), (", predictor", predictor)):
            before, start = process.memory_info().rss, time.perf_counter()
            chosen = replace(config, scorer="predictor") if scorer else config
            programs[name + suffix] = build_steps(model, call, chosen, scorer)
            growth = process.memory_info().rss - before
            result["transform"][name + suffix] = dict(seconds=time.perf_counter() - start, rss_growth_bytes=growth)
    for backend in backends.split(","):
        compile_start = time.perf_counter()
        steps = {name: Steps(program, backend, call) for name, program in programs.items()}
        runs: dict[str, Callable[[], Any]] = {"model": lambda: model(**call, return_dict=False)}
        runs["I"] = steps["default"].full
        runs |= {f"P, {name}": step.cached for name, step in steps.items()}
        runs |= {f"ahead, {name}": step.ahead for name, step in steps.items()}
        for run in runs.values():
            with torch.no_grad():
                run()
        warm_up = time.perf_counter() - compile_start
        times: dict[str, list[float]] = {name: [] for name in runs}
        with torch.no_grad():
            for _ in track(range(rounds), backend):
                for name, run in runs.items():
                    times[name].append(seconds(run, torch.device(device)))
        medians = {name: statistics.median(values) for name, values in times.items()}
        macs_full = programs["default"].macs_full
        rows = {"model": dict(seconds=medians["model"]), "I": dict(seconds=medians["I"], gmacs=macs_full / 1e9)}
        for name, program in programs.items():
            macs = program.macs_cached[0]
            cached = steps[name].with_share(times[f"P, {name}"], times[f"ahead, {name}"])
            time_ratio = statistics.median(p / i for p, i in zip(cached, times["I"], strict=True))
            rows[f"P, {name}"] = dict(
                seconds=statistics.median(cached), ahead_seconds=medians[f"ahead, {name}"], ahead_steps=steps[name].num_ahead,
                gmacs=macs / 1e9, macs_ratio=macs / macs_full, time_ratio=time_ratio,
                time_over_macs=time_ratio / (macs / macs_full),
            )  # fmt: skip
        result["backends"][backend] = dict(warm_up_seconds=warm_up, rows=rows)
        for name, row in rows.items():
            print(backend, name, {k: round(v, 4) for k, v in row.items()})
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        result["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    print({k: v for k, v in result.items() if k != "backends"})


if __name__ == "__main__":
    typer.run(main)
