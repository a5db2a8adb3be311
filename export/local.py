"""Engines of another runtime for a model that is at hand: its graphs are exported into a folder that does not stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tokencache_compile.export.graphs import write_graphs
from tokencache_compile.export.manifest import GraphEntry
from tokencache_compile.export.onnxruntime import OnnxSession
from tokencache_compile.export.session import Session, SessionEngine
from tokencache_compile.export.tensorrt_build import TensorRTSettings, build_engine, check_limits
from tokencache_compile.export.tensorrt_flavour import load_flavour
from tokencache_compile.export.tensorrt_session import TensorRTSession, Workspace
from tokencache_compile.passes.engine_graph import engine_graphs
from tokencache_compile.passes.pipeline import StepPrograms

OpenSession = Callable[[Path, GraphEntry], Session]


def onnxruntime_engines(steps: StepPrograms) -> list[SessionEngine]:
    """The I-step and then each P-step in ONNX Runtime, on the CPU or, for a model on a GPU, by the CUDA provider.

    Raises:
        ExportError: a package or provider is missing, or the graphs cannot be exported.
    """
    device = steps.program.known_stream.device
    provider = "cpu" if device.type == "cpu" else "cuda"
    return _engines(steps, lambda path, graph: OnnxSession(path, graph.io, provider, device))


def tensorrt_engines(steps: StepPrograms, flavour: str) -> list[SessionEngine]:
    """The I-step and then each P-step as TensorRT engines, built for the GPU the model is on.

    Raises:
        ExportError: the package is missing, the model is on no GPU, or TensorRT refuses a graph.
    """
    workspace = Workspace(steps.program.known_stream.device)
    found, settings = load_flavour(flavour), TensorRTSettings(flavour=flavour)
    caches = [cache.name for cache in steps.caches]

    def open_session(path: Path, graph: GraphEntry) -> Session:
        check_limits(graph.io, found)
        built = build_engine(path, graph.io.inputs, graph.io.outputs, settings)
        return TensorRTSession(built.data, graph.io, caches, built.target, workspace)

    return _engines(steps, open_session)


def _engines(steps: StepPrograms, open_session: OpenSession) -> list[SessionEngine]:
    graphs = engine_graphs(steps, [f"output_{i}" for i in range(steps.full.num_outputs)])
    with TemporaryDirectory(prefix="tokencache-") as folder:
        entries = [entry.graph for entry in write_graphs(graphs, Path(folder))]
        return [SessionEngine(graph.io, open_session(Path(folder, f"{graph.name}.onnx"), graph)) for graph in entries]
