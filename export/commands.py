"""The commands ``tokencache export`` and ``tokencache engines``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from tokencache_compile.clean_errors import clean_errors
from tokencache_compile.errors import ConfigError
from tokencache_compile.plan import CacheConfig

Target = Literal["onnx", "tensorrt", "tensorrt-rtx"]
DType = Literal["float32", "float16", "bfloat16"]

_DEFAULTS = CacheConfig()
_Model = Annotated[Path, typer.Argument(help="Folder of a diffusers pipeline, or of its transformer.")]
_Plan = Annotated[Path | None, typer.Option(help="Artefact directory of train, calibrate or tune; the default settings if left out.")]
_Ratio = Annotated[float | None, typer.Option(help="Share of the cached blocks' tokens that a P-step does not recompute.")]
_Batch = Annotated[int, typer.Option(help="Rows of a call; 2 are one image with guidance.")]
_DType = Annotated[DType, typer.Option(help="The weights are cast to this.")]
_Device = Annotated[str, typer.Option(help="Where the model is captured and runs: cpu, cuda.")]


def _transformed(model: Path, plan: Path | None, ratio: float | None, batch: int, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """The transformed model, captured by its eager graphs, and the inputs of one call."""
    import torch
    from torch.utils import _pytree as pytree

    from tokencache_compile.api import transform
    from tokencache_compile.explain import example_inputs
    from tokencache_compile.learn.inputs import load_model

    kind = getattr(torch, dtype)
    net = load_model(model)
    given = pytree.tree_map(
        lambda t: t.to(device, kind) if isinstance(t, torch.Tensor) and t.is_floating_point() else t.to(device), example_inputs(net, batch)
    )
    transformed = transform(net, plan, ratio=ratio, backend="eager")  # an artefact knows the weights as they were loaded
    for module in (net, transformed.predictor):
        if module is not None:
            module.to(device)
        if module is not None and kind != torch.float32:
            module.to(kind)
    transformed.prepare(given)
    return transformed, given


def export(
    model: _Model,
    out: Annotated[Path, typer.Option(help="Directory of the bundle; an older bundle there is replaced.")],
    to: Annotated[Target, typer.Option(help="ONNX files, or these and engines.")] = "onnx",
    plan: _Plan = None,
    ratio: _Ratio = None,
    batch: _Batch = 2,
    dtype: _DType = "float32",
    device: _Device = "cpu",
    selection: Annotated[Literal["graph", "host"], typer.Option(help="Who takes the top-k: the graph, or the host.")] = "graph",
    capability: Annotated[
        list[str] | None, typer.Option(help="GPU to build for, such as SM89; may be given again. The GPU at hand if left out.")
    ] = None,
) -> None:
    """Export the I-step and the P-steps of a model as a bundle for `tokencache_compile.load`."""
    from tokencache_compile.export.tensorrt_build import TensorRTSettings
    from tokencache_compile.export.write import export_onnx, export_tensorrt

    with clean_errors():
        if to == "onnx" and capability:
            raise ConfigError(f"capability={capability} was asked for with ONNX files, which run anywhere; add --to tensorrt-rtx.")
        transformed, _ = _transformed(model, plan, ratio, batch, dtype, device)
        if to == "onnx":
            folder = export_onnx(transformed, out, selection=selection)
        else:
            settings = TensorRTSettings(to.replace("-", "_"), tuple(capability) if capability else None)
            folder = export_tensorrt(transformed, out, settings=settings, selection=selection)
        table = Table("file", "MiB")
        for path in sorted(folder.iterdir()):
            table.add_row(path.name, f"{path.stat().st_size / 2**20:.2f}")
        console = Console()
        console.print(str(transformed.plan), markup=False, highlight=False)
        console.print(table)


def engines(
    model: _Model,
    out: Annotated[Path, typer.Option(help="JSON file of the figures.")],
    plan: _Plan = None,
    ratio: _Ratio = None,
    batch: _Batch = 2,
    dtype: _DType = "float32",
    device: _Device = "cpu",
    backend: Annotated[list[str] | None, typer.Option(help="May be given again; every installed one if left out.")] = None,
    rounds: Annotated[int, typer.Option(help="Each times everything once; figures are medians.")] = 7,
) -> None:
    """Time a model's I- and P-step in every engine that is installed."""
    from tokencache_compile.step_times import step_times as run

    with clean_errors():
        transformed, given = _transformed(model, plan, ratio, batch, dtype, device)
        result = run(transformed.model, given, transformed.cache_config, transformed.predictor, backend, rounds, transformed.lora)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        table = Table("backend", "step", "median, ms", "p90, ms", "I over P")
        for name, row in result["backends"].items():
            for step in ("model", "I", "P"):
                if step in row:
                    ratio_text = f"{row['I_over_P']:.2f}×" if step == "P" else ""
                    table.add_row(name, step, f"{row[step]['seconds'] * 1e3:.2f}", f"{row[step]['p90'] * 1e3:.2f}", ratio_text)
        console = Console()
        console.print(table)
        console.print(f"Written: {out}", markup=False, highlight=False, soft_wrap=True)
