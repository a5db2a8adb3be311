"""Export: a transformed model's steps as a bundle, a directory that :func:`tokencache_compile.load` runs without the model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tokencache_compile.errors import BundleError, ConfigError, ExportError
from tokencache_compile.export.graphs import check_room, disk_errors, write_graphs
from tokencache_compile.export.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    EngineEntry,
    Fingerprints,
    Manifest,
    ModelInfo,
    StepEntry,
    engine_file,
    files_of,
    pass_sources,
    read_manifest,
    write_manifest,
)
from tokencache_compile.export.onnx import OPSET
from tokencache_compile.export.tensorrt_build import TensorRTSettings, build_engine, check_limits, progress_bar
from tokencache_compile.export.tensorrt_flavour import load_flavour
from tokencache_compile.fingerprint import fingerprint, weights_digest
from tokencache_compile.ir import EngineGraph
from tokencache_compile.output_format import OutputFormat
from tokencache_compile.passes.engine_graph import SelectionPlace, engine_graphs
from tokencache_compile.runtime import Captured, Dispatcher
from tokencache_compile.whole_directory import written_whole

Check = Callable[[list[EngineGraph]], None]
BuildEngines = Callable[[Path, tuple[StepEntry, ...]], EngineEntry]  # (folder with the ONNX files, graphs) -> engines written there


def export_onnx(
    transformed: Any,
    directory: str | os.PathLike[str],
    *,
    selection: SelectionPlace = "graph",
    example_inputs: Mapping[str, Any] | None = None,
) -> Path:
    """Write the I-step and every P-step as ONNX (opset 20) with one weights file, as a bundle.

        net = tokencache_compile.transform(transformer, ratio=0.9, example_inputs=inputs)
        tokencache_compile.export_onnx(net, "bundle")

    Args:
        transformed: a Dispatcher, or a pipeline whose transformer is one. Graphs have its dtype (float32, float16, bfloat16).
        directory: is there whole afterwards, or as it was before; an older bundle in it is replaced.
        selection: "graph" puts the top-k into the P-graphs, "host" outside: they take indices then.
        example_inputs: keyword arguments of a call of the signature to export; the last that was captured if left out.

    Returns:
        The directory.

    Raises:
        ConfigError: nothing was captured yet, or ``transformed`` is no transformed model.
        ExportError: the graphs cannot be exported, a package is missing, the disk is full.
        BundleError: ``directory`` holds something else.
    """
    return write_bundle(transformed, directory, selection, example_inputs)


def export_tensorrt(
    transformed: Any,
    directory: str | os.PathLike[str],
    *,
    settings: TensorRTSettings | None = None,
    selection: SelectionPlace = "graph",
    example_inputs: Mapping[str, Any] | None = None,
) -> Path:
    """Write a bundle as :func:`export_onnx` does, and a TensorRT engine of every graph beside its ONNX file.

        settings = TensorRTSettings(flavour="tensorrt_rtx", compute_capabilities=("SM80", "SM89"))  # needs no GPU
        tokencache_compile.export_tensorrt(net, "bundle", settings=settings)

    Args:
        settings: the flavour, the GPUs to build for, and what else TensorRT is told; the GPU at hand if left out.

    Raises:
        As :func:`export_onnx`; also ExportError where TensorRT is missing or refuses: a keep count over its TopK's limit (pass
        ``selection="host"``), an operator, a GPU it does not build for.
    """
    chosen = settings or TensorRTSettings()
    flavour = load_flavour(chosen.flavour)

    def check(graphs: list[EngineGraph]) -> None:
        for graph in graphs:
            check_limits(graph.io, flavour)

    def build(folder: Path, steps: tuple[StepEntry, ...]) -> EngineEntry:
        for graph in (g for step in steps for g in (step.graph, step.scores) if g is not None):
            check_room(folder, (folder / WEIGHTS).stat().st_size)
            with progress_bar(graph.name) as progress:
                built = build_engine(folder / f"{graph.name}.onnx", graph.io.inputs, graph.io.outputs, chosen, progress)
            (folder / engine_file(graph.name, flavour.name)).write_bytes(built.data)
        return EngineEntry(built.target, built.refittable)

    return write_bundle(transformed, directory, selection, example_inputs, check, build)


def write_bundle(
    transformed: Any,
    directory: str | os.PathLike[str],
    selection: SelectionPlace,
    example_inputs: Mapping[str, Any] | None,
    check: Check | None = None,
    build: BuildEngines | None = None,
) -> Path:
    """A bundle with ONNX files, and with the engines of ``build``. ``check`` refuses graphs before anything is written."""
    dispatcher = _dispatcher_of(transformed)
    target = Path(directory).resolve()
    _check_replaceable(target)
    captured = dispatcher.captured(example_inputs)
    if not captured.steps.program.shares_weights_of(dispatcher.model):
        raise ConfigError("the model's weights were replaced since it was captured: call it once more, or pass example_inputs.")
    if captured.autocast:
        raise ExportError("the model was captured under autocast, which is no part of a graph. Cast the model itself, as by .half().")
    output = OutputFormat.of(captured.steps.output_spec)
    graphs = engine_graphs(captured.steps, output.names, selection)
    if check is not None:
        check(graphs)
    with disk_errors(target), written_whole(target) as folder:
        entries = write_graphs(graphs, folder)
        engines = (build(folder, entries),) if build is not None else ()
        write_manifest(folder, _manifest(dispatcher, captured, output, entries, engines, folder))
    return target


def _dispatcher_of(transformed: Any) -> Dispatcher:
    found = getattr(transformed, "transformer", None) if not isinstance(transformed, torch.nn.Module) else transformed
    if not isinstance(found, Dispatcher):
        raise ConfigError(f"a {type(transformed).__name__} was given; pass what tokencache_compile.transform returned.")
    return found


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise BundleError(f"{target} is there and is no bundle, so it is not replaced. Name a directory of its own.")
    try:
        read_manifest(target)
    except BundleError as error:
        raise BundleError(f"{target} is not replaced, because it is no whole bundle: {error} Remove it first.") from error


def _manifest(
    dispatcher: Dispatcher,
    captured: Captured,
    output: OutputFormat,
    entries: tuple[StepEntry, ...],
    engines: tuple[EngineEntry, ...],
    folder: Path,
) -> Manifest:
    steps, model, predictor = captured.steps, dispatcher.model, dispatcher.predictor
    scores = None if predictor is None else weights_digest(predictor)
    return Manifest(
        format_version=FORMAT_VERSION,
        package_version=version("tokencache-compile"),
        opset=OPSET,
        model=ModelInfo(type(model).__name__, _json_config(model), steps.program.known_stream.dtype),
        fingerprints=Fingerprints(fingerprint(model), scores, pass_sources()),
        call=captured.call,
        output=output,
        plan=steps.plan,
        caches=steps.caches,
        macs=(steps.macs_full, *steps.macs_cached),
        steps=entries,
        engines=engines,
        files=files_of(folder),
    )


def _json_config(model: Any) -> dict[str, Any]:
    """The model's diffusers configuration, which pipelines read from the transformer; what JSON cannot hold is left out."""
    config = getattr(model, "config", None)
    items = dict(config).items() if isinstance(config, Mapping) else ()
    return {str(k): v for k, v in items if _is_json(v) and not str(k).startswith("_")}


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, bool | int | str | None)
