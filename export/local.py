"""Engines of another runtime for a model that is at hand: its graphs are exported into a folder that does not stay."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tokencache_compile.export.graphs import write_graphs
from tokencache_compile.export.onnxruntime import OnnxSession
from tokencache_compile.export.session import Session, SessionEngine
from tokencache_compile.passes.engine_graph import engine_graphs
from tokencache_compile.passes.pipeline import StepPrograms


def onnxruntime_engines(steps: StepPrograms) -> list[SessionEngine]:
    """The I-step and then each P-step in ONNX Runtime, on the CPU or, for a model on a GPU, by the CUDA provider.

    Raises:
        ExportError: a package or provider is missing, or the graphs cannot be exported.
    """
    device = steps.program.known_stream.device
    provider = "cpu" if device.type == "cpu" else "cuda"
    graphs = engine_graphs(steps, [f"output_{i}" for i in range(steps.full.num_outputs)])
    with TemporaryDirectory(prefix="tokencache-") as folder:
        sessions: list[Session] = []
        for entry in write_graphs(graphs, Path(folder)):
            sessions.append(OnnxSession(Path(folder, f"{entry.graph.name}.onnx"), entry.graph.io, provider, device))
    return [SessionEngine(graph.io, session) for graph, session in zip(graphs, sessions, strict=True)]
