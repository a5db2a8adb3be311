"""Load: the dispatcher of a bundle. It needs neither the model's class nor its weights, nor torch.export."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tokencache_compile.calls import bind_call
from tokencache_compile.errors import BundleError, ConfigError, InputError
from tokencache_compile.export.manifest import Manifest, engine_file, read_manifest
from tokencache_compile.export.session import Session, SessionEngine
from tokencache_compile.plan import CachePlan
from tokencache_compile.requests import SchedulerWatch
from tokencache_compile.step_dispatcher import GATE, Compiled, StepDispatcher

Runtime = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]


class BundleDispatcher(StepDispatcher):
    """An exported transformer; use it where the model was: ``pipe.transformer = tokencache_compile.load("bundle")``.

    It answers as the model did for one input signature. It has no model to fall back to: after ``disable()`` every step runs in
    full. Made by :func:`load`.

    Attributes:
        manifest: of the bundle.
        config: the model's diffusers configuration.
    """

    def __init__(self, manifest: Manifest, compiled: Compiled, device: torch.device, watch: SchedulerWatch) -> None:
        super().__init__(manifest.model.class_name, manifest.call.signature, watch)
        from diffusers.configuration_utils import FrozenDict

        self.manifest = manifest
        self.config = FrozenDict(manifest.model.config)
        self.dtype, self.device = manifest.model.dtype, device
        self._compiled = compiled
        self._known: set[Hashable] = set()
        self.eval()

    @property
    def plan(self) -> CachePlan:
        """The plan that was exported."""
        return self.manifest.plan

    def _lookup(self, signature: Hashable, call: dict[str, Any], begins: bool) -> Compiled:
        if signature not in self._known or self.manifest.call.reads_values:
            self.manifest.call.check(call)
            sample = call[self._sample_name]
            if sample.device.type != self.device.type:
                raise InputError(f"{self._sample_name} is on {sample.device}, and the bundle was loaded for {self.device}.")
            self._known.add(signature)
        return self._compiled

    def _uncached(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        call = bind_call(self._name, self._signature, args, kwargs)
        as_tuple = not call.pop("return_dict", True)
        signature, tensors = self._signature_of(call)
        self._lookup(signature, call, begins=True)
        steps = self._compiled.steps
        with GATE.step():
            outputs, _ = self._compiled.full(tensors, steps.step_inputs(0, self.device), steps.initial_caches(self.device))
        return tuple(outputs) if as_tuple else self._compiled.rebuild(outputs)


def load(
    directory: str | os.PathLike[str],
    *,
    runtime: str = "onnxruntime",
    provider: str = "cpu",
    device: str | torch.device | None = None,
    scheduler: Any = None,
    runtime_cache: str | os.PathLike[str] | None = None,
) -> BundleDispatcher:
    """The dispatcher of an exported bundle.

        pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256", transformer=None)
        pipe.transformer = tokencache_compile.load("bundle", scheduler=pipe.scheduler)

    Args:
        directory: what :func:`export_onnx` or :func:`export_tensorrt` wrote. All of it is checked before anything is loaded.
        runtime: "onnxruntime", or the flavour of the engines in the bundle: "tensorrt", "tensorrt_rtx".
        provider: of ONNX Runtime: "cpu", "cuda" or "tensorrt".
        device: where the tensors are; the CPU for provider "cpu", else the current GPU.
        scheduler: the sampler's scheduler, whose ``set_timesteps`` then marks each request's begin.
        runtime_cache: a file that keeps the kernels which TensorRT-RTX compiles when it loads an engine.

    Raises:
        BundleError: the bundle is not as its manifest says, or has no engines for ``runtime``, this version or this GPU.
        ExportError: a package is missing, or the runtime refuses a file.
        ConfigError: ``runtime`` is unknown.
    """
    if runtime not in get_args(Runtime):
        raise ConfigError(f"runtime={runtime!r} was asked for; it is one of {', '.join(map(repr, get_args(Runtime)))}.")
    folder = Path(directory)
    manifest = read_manifest(folder)
    on_gpu = runtime != "onnxruntime" or provider != "cpu"
    where = torch.device(device if device is not None else "cuda" if on_gpu else "cpu")
    if runtime == "onnxruntime":
        sessions = _onnx_sessions(folder, manifest, provider, where)
    else:
        sessions = _engine_sessions(folder, manifest, runtime, where, runtime_cache)
    engines = []
    for step in manifest.steps:
        scores = sessions[step.scores.name] if step.scores is not None else None
        engines.append(SessionEngine(step.graph.io, sessions[step.graph.name], scores))
    compiled = Compiled(manifest.table, engines[0], tuple(engines[1:]), (None,) * len(engines[1:]), manifest.output.rebuild)
    watch = SchedulerWatch()
    if scheduler is not None:
        watch.attach(scheduler)
    return BundleDispatcher(manifest, compiled, where, watch)


def _onnx_sessions(folder: Path, manifest: Manifest, provider: str, device: torch.device) -> dict[str, Session]:
    from tokencache_compile.export.onnxruntime import OnnxSession

    return {graph.name: OnnxSession(folder / f"{graph.name}.onnx", graph.io, provider, device) for graph in manifest.graphs}


def _engine_sessions(
    folder: Path, manifest: Manifest, flavour: str, device: torch.device, runtime_cache: str | os.PathLike[str] | None
) -> dict[str, Session]:
    from tokencache_compile.export.tensorrt_session import TensorRTSession, Workspace

    entry = next((engine for engine in manifest.engines if engine.target.flavour == flavour), None)
    if entry is None:
        there = ", ".join(engine.target.flavour for engine in manifest.engines) or "none"
        raise BundleError(
            f'runtime="{flavour}" was asked for and {folder} has these engines: {there}. '
            'Export with export_tensorrt and that flavour, or load with runtime="onnxruntime".'
        )
    workspace = Workspace(device)
    caches = [cache.name for cache in manifest.caches]
    sessions: dict[str, Session] = {}
    for graph in manifest.graphs:
        weights = folder / f"{graph.name}.onnx" if entry.refittable else None
        file = folder / engine_file(graph.name, flavour)
        sessions[graph.name] = TensorRTSession(
            file, graph.io, caches, entry.target, workspace, weights_from=weights, runtime_cache=runtime_cache
        )
    return sessions
