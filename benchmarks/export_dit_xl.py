"""DiT-XL/2 at full size (random weights, float16) as an ONNX bundle and as TensorRT-RTX engines, built without a GPU.

    python benchmarks/export_dit_xl.py --out benchmarks/results/export_dit_xl.json

Batch 2, 256x256, ratio 0.9, the default plan. Recorded: seconds and peak memory of every stage, the size of every file, and what a P-graph
takes beside the weights that it shares with the I-graph.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from step_latency import random_model

import tokencache_compile as tc
from tokencache_compile.export.manifest import WEIGHTS, read_manifest
from tokencache_compile.export.tensorrt_build import TensorRTSettings, build_engine


def peak_gib() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(
    out: Annotated[Path, typer.Option(help="JSON file.")],
    capabilities: Annotated[str, typer.Option(help="GPUs to build for, commas between.")] = "SM80,SM89",
    threads: int = 2,
) -> None:
    """Export, build, and write the figures."""
    torch.set_num_threads(threads)
    model = random_model("cpu", torch.float16)
    draw = torch.Generator().manual_seed(1)
    call = dict(
        hidden_states=torch.randn(2, 4, 32, 32, generator=draw).half(),
        timestep=torch.full((2,), 500),
        class_labels=torch.randint(0, 1000, (2,), generator=draw),
    )
    result: dict[str, Any] = dict(
        model="DiT-XL/2 256x256, random weights", batch=2, dtype="float16", torch=torch.__version__, threads=threads,
        machine=f"{platform.machine()}, {os.cpu_count()} cores", load_average=os.getloadavg(), stages={}, files={},
    )  # fmt: skip

    def stage(name: str, start: float, **more: Any) -> None:
        result["stages"][name] = dict(seconds=time.perf_counter() - start, peak_gib=peak_gib(), **more)
        print(name, result["stages"][name], flush=True)

    start = time.perf_counter()
    net = tc.transform(model, ratio=0.9, backend="eager", example_inputs=call)
    stage("capture", start)
    with TemporaryDirectory(dir=out.resolve().parent) as scratch:
        start = time.perf_counter()
        folder = tc.export_onnx(net, Path(scratch, "bundle"))
        stage("onnx", start)
        start = time.perf_counter()
        manifest = read_manifest(folder)
        stage("check", start)
        settings = TensorRTSettings("tensorrt_rtx", tuple(capabilities.split(",")))
        for graph in manifest.graphs:
            start = time.perf_counter()
            engine = build_engine(folder / f"{graph.name}.onnx", graph.io.inputs, graph.io.outputs, settings)
            stage(f"engine {graph.name}", start, nbytes=engine.nbytes, version=engine.target.version, capabilities=capabilities)
            del engine
        result["files"] = {name: entry.nbytes for name, entry in manifest.files.items()}
        shutil.rmtree(folder)
    weights = result["files"][WEIGHTS]
    result["p_graph_share_of_weights"] = result["files"]["cached_0.onnx"] / weights
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if k != "stages"})


if __name__ == "__main__":
    typer.run(main)
