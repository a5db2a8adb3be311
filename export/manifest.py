"""The manifest of a bundle: everything a dispatcher must know to run exported steps, and what the files must hash to.

    manifest.json           this
    weights.safetensors     the weights of all graphs, each once
    full.onnx               the I-step
    cached_0.onnx …         a P-step for each keep profile, and cached_0_scores.onnx where the host selects
    full.tensorrt_rtx.engine …   where engines were built
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tokencache_compile import export, passes
from tokencache_compile.call_format import CallFormat
from tokencache_compile.errors import BundleError
from tokencache_compile.export.tensorrt_flavour import EngineTarget
from tokencache_compile.ir import CacheSpec, StepIO, TensorSpec
from tokencache_compile.json_data import from_json, to_json
from tokencache_compile.output_format import OutputFormat
from tokencache_compile.plan import CachePlan
from tokencache_compile.step_table import StepTable
from tokencache_compile.whole_directory import sha256

FORMAT_VERSION = 1
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"


@dataclass(frozen=True)
class ModelInfo:
    """The exported model: its class, diffusers configuration and weights' dtype."""

    class_name: str
    config: dict[str, Any]
    dtype: torch.dtype


@dataclass(frozen=True)
class Fingerprints:
    """What the bundle was made from.

    Attributes:
        base: :func:`tokencache_compile.fingerprint.fingerprint` of the base model.
        predictor: SHA-256 of the predictor's weights; None without one.
        passes: SHA-256 of the sources of the passes and exporters.
    """

    base: dict[str, Any]
    predictor: str | None
    passes: str


@dataclass(frozen=True)
class GraphEntry:
    """One exported graph: its name, inputs and outputs. Its ONNX file is ``<name>.onnx``, an engine ``<name>.<flavour>.engine``."""

    name: str
    io: StepIO


@dataclass(frozen=True)
class StepEntry:
    """The I-step or a P-step, and the graph of its scores where the host selects."""

    graph: GraphEntry
    scores: GraphEntry | None


@dataclass(frozen=True)
class EngineEntry:
    """Engines of one flavour, one for every graph.

    Attributes:
        target: what they were built with and run on.
        refittable: whether they read their weights from the ONNX files' own.
    """

    target: EngineTarget
    refittable: bool


@dataclass(frozen=True)
class FileEntry:
    """What a file must be."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """See the module. ``steps`` are the I-step and then the P-steps in the order of the plan's profiles."""

    format_version: int
    package_version: str
    opset: int
    model: ModelInfo
    fingerprints: Fingerprints
    call: CallFormat
    output: OutputFormat
    plan: CachePlan
    caches: tuple[CacheSpec, ...]
    macs: tuple[int, ...]
    steps: tuple[StepEntry, ...]
    engines: tuple[EngineEntry, ...]
    files: dict[str, FileEntry]

    @property
    def graphs(self) -> tuple[GraphEntry, ...]:
        """All graphs: what has an ONNX file, and an engine of each flavour."""
        return tuple(graph for step in self.steps for graph in (step.graph, step.scores) if graph is not None)

    @property
    def table(self) -> StepTable:
        return StepTable(self.plan, self.caches, self.macs[0], self.macs[1:])


def engine_file(graph: str, flavour: str) -> str:
    """The file of one graph's engine."""
    return f"{graph}.{flavour}.engine"


def files_of(folder: Path) -> dict[str, FileEntry]:
    """Every file of a bundle that is being written, but for the manifest."""
    return {path.name: FileEntry(sha256(path), path.stat().st_size) for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def pass_sources() -> str:
    """SHA-256 over the sources that decide what a graph is."""
    digest = hashlib.sha256()
    for package in (passes, export):
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Last of all: a folder without a manifest is no bundle."""
    (folder / MANIFEST).write_text(json.dumps(to_json(manifest), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, and every file as it says.

    Raises:
        BundleError: ``folder`` is no bundle, its format is another, or a file is missing, changed or not listed.
    """
    path, again = folder / MANIFEST, "Export or download the bundle again."
    if not path.is_file():
        raise BundleError(f"{path} is missing, so {folder} is no bundle. Pass the directory that export_onnx or export_tensorrt wrote.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no JSON: {error}. {again}") from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {found!r}, and this package ({version('tokencache-compile')}) reads version {FORMAT_VERSION}. "
            "Install the package that wrote it, or export again."
        )
    try:
        manifest = from_json(Manifest, content, str(path))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{error} {again}") from error
    _check_consistent(manifest, path)
    _check_files(folder, manifest.files, again)
    return manifest


def _check_consistent(manifest: Manifest, path: Path) -> None:
    """The parts of a manifest fit each other, so that no step meets a tensor it was not made for."""
    keeps = [(), *(manifest.plan.profiles if manifest.plan.config.ratio > 0 else ())]
    wrong = []
    if [step.graph.io.keep for step in manifest.steps] != keeps or len(manifest.macs) != len(keeps):
        wrong.append(f"{len(manifest.steps)} steps and MACs of {len(manifest.macs)} for {len(keeps) - 1} keep profiles")
    for step in manifest.steps:
        wrong += _wrong_in(step, manifest)
    needed = [WEIGHTS, *(f"{graph.name}.onnx" for graph in manifest.graphs)]
    needed += [engine_file(graph.name, engine.target.flavour) for engine in manifest.engines for graph in manifest.graphs]
    wrong += [f"{name} is not listed" for name in needed if name not in manifest.files]
    if wrong:
        raise BundleError(f"{path} contradicts itself: {wrong[0]}. Export or download the bundle again.")


def _wrong_in(step: StepEntry, manifest: Manifest) -> list[str]:
    """How a step's inputs and outputs differ from what the call, the plan and the caches say."""
    io, name = step.graph.io, step.graph.name
    extras = [TensorSpec("step", (), torch.float32)]
    if "random_scores" in manifest.plan.config.extras:
        extras.append(TensorSpec("random_scores", manifest.table.random_shape, torch.float32))
    given = [leaf.spec for leaf in manifest.call.leaves if leaf.spec is not None]
    caches = [TensorSpec(cache.name, cache.shape, cache.dtype) for cache in manifest.caches]
    known = {spec.name: spec for spec in (*given, *extras, *caches)}
    indices = {f"index_{block:02d}" for block, _ in io.selects}
    wrong = []
    if io.arguments != tuple(known):
        wrong.append(f"{name} takes {', '.join(io.arguments)}, and the call and the caches give {', '.join(known)}")
    for graph in (step.graph, step.scores) if step.scores is not None else (step.graph,):
        wrong += [f"{graph.name} reads {spec}" for spec in graph.io.inputs if spec.name not in indices and known.get(spec.name) != spec]
    if io.num_outputs != len(manifest.output.names) or len(io.outputs) < io.num_outputs:
        wrong.append(f"{name} gives {io.num_outputs} of the model's {len(manifest.output.names)} outputs")
    scored = [f"scores_{block:02d}" for block, _ in io.selects]
    if scored != ([spec.name for spec in step.scores.io.outputs] if step.scores is not None else []):
        wrong.append(f"{name} leaves blocks {[block for block, _ in io.selects]} to the host, and other scores are there")
    computed = known | {spec.name: spec for spec in io.outputs}
    if len(io.next_caches) != len(caches):
        wrong.append(f"{name} gives {len(io.next_caches)} of {len(caches)} caches")
    for cache, after in zip(caches, io.next_caches, strict=False):
        if computed.get(after) != replace(cache, name=after):
            wrong.append(f"{name} gives {after} for the cache {cache.name} {cache.shape} {cache.dtype}")
    return wrong


def _check_files(folder: Path, listed: Mapping[str, FileEntry], again: str) -> None:
    there = {path.name for path in folder.iterdir() if path.name not in (MANIFEST, "README.md")}
    if unknown := sorted(there - listed.keys()):
        raise BundleError(f"{folder / unknown[0]} is there, and {MANIFEST} does not list it. Remove it, or export again.")
    for name, entry in listed.items():
        path = folder / name
        if Path(name).name != name:
            raise BundleError(f"{folder / MANIFEST} lists {name!r}, which is no file's name. {again}")
        if not path.is_file():
            raise BundleError(f"{path} is missing. {again}")
        if (size := path.stat().st_size) != entry.nbytes:
            raise BundleError(f"{path} was cut short or changed: it has {size} bytes, and {MANIFEST} says {entry.nbytes}. {again}")
        if (found := sha256(path)) != entry.sha256:
            raise BundleError(f"{path} was changed: its SHA-256 is {found}, and {MANIFEST} says {entry.sha256}. {again}")
