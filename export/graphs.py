"""The ONNX files of one signature's steps, in one folder beside one weights file: what bundles and engines are made from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from tokencache_compile.errors import ExportError
from tokencache_compile.export.manifest import WEIGHTS, GraphEntry, StepEntry
from tokencache_compile.export.onnx import read_weights, save_onnx, to_onnx, weights_of
from tokencache_compile.export.weights import nbytes, write_weights
from tokencache_compile.ir import EngineGraph

_GRAPH_BYTES = 8 * 2**20  # what an ONNX file without weights stays below: 0.2 MB for 12 blocks


def write_graphs(graphs: Sequence[EngineGraph], folder: Path) -> tuple[StepEntry, ...]:
    """Write ``graphs`` (the I-step, then the P-steps) into ``folder``: ``full.onnx``, ``cached_<profile>.onnx``, the weights.

    Raises:
        ExportError: an operator cannot be exported, caches are 8-bit floats, onnx is missing, or the disk is full.
    """
    if narrow := [spec for graph in graphs for spec in graph.io.inputs if spec.dtype.is_floating_point and spec.dtype.itemsize == 1]:
        raise ExportError(
            f"{narrow[0].name} and {len(narrow) - 1} more caches are {narrow[0].dtype}, which the runtimes do not take as inputs. "
            'Use cache_dtype="bfloat16" or "float16", or backend="inductor".'
        )
    named: dict[str, EngineGraph] = {}
    for number, graph in enumerate(graphs):
        name = "full" if number == 0 else f"cached_{number - 1}"
        named[name] = graph
        if graph.scores is not None:
            named[f"{name}_scores"] = graph.scores
    weights: dict[str, Tensor] = {}
    for graph in named.values():
        weights |= weights_of(graph)
    check_room(folder, nbytes(weights) + _GRAPH_BYTES * len(named))
    models = {name: to_onnx(graph) for name, graph in named.items()}
    read = set().union(*map(read_weights, models.values()))
    weights = {name: tensor for name, tensor in weights.items() if name in read}
    with disk_errors(folder):
        regions = write_weights(folder / WEIGHTS, weights)
        for name, model in models.items():
            save_onnx(model, folder / f"{name}.onnx", weights, regions, WEIGHTS)
    entries = {name: GraphEntry(name, graph.io) for name, graph in named.items()}
    steps = [name for name in entries if not name.endswith("_scores")]
    return tuple(StepEntry(entries[name], entries.get(f"{name}_scores")) for name in steps)


def check_room(folder: Path, needed: int) -> None:
    """Raise an ExportError unless ``needed`` bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder} has {free / 2**20:.0f} MiB free, and {needed / 2**20:.0f} MiB are needed. Free some, or export to another disk."
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Within this context a disk that is full, or that may not be written to, is an ExportError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports the disk's errors as its own
        raise ExportError(f"{folder} cannot be written: {error}. Nothing was left there; free some space or name another.") from error
