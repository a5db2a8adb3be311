"""Engines: what runs a step program. One small protocol; the dispatcher knows nothing else of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.export import cpu_kernels
from tokencache_compile.export.cuda_graphs import RecordedStep
from tokencache_compile.export.inductor import compile_step
from tokencache_compile.ir import StepProgram
from tokencache_compile.passes.pipeline import StepPrograms

Backend = Literal["inductor", "eager", "onnxruntime", "tensorrt", "tensorrt_rtx"]


class Engine(Protocol):
    """Runs one step: ``(inputs, extras, caches) -> (outputs, caches)``; never writes to what it is given."""

    def __call__(
        self, inputs: Sequence[Tensor], extras: Sequence[Tensor], caches: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]: ...


class TorchEngine:
    """Runs the step's graph module with torch: as it is, or compiled, which on a GPU is run by CUDA graphs."""

    def __init__(self, step: StepProgram, compiled: bool) -> None:
        self.num_outputs = step.num_outputs
        module = step.module
        if (compiled or step.kind == "P") and step.on_float32_cpu and cpu_kernels.available():
            module = cpu_kernels.lower_linears(module)
        self.run = compile_step(module) if compiled else module
        self._on_gpu = RecordedStep(step, self.run) if compiled else None

    def __call__(self, inputs: Sequence[Tensor], extras: Sequence[Tensor], caches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        tensors = [*inputs, *extras, *caches]
        with torch.no_grad():
            by_graphs = self._on_gpu is not None and all(tensor.is_cuda for tensor in tensors)
            results = self._on_gpu(*tensors) if self._on_gpu is not None and by_graphs else self.run(*tensors)
        return list(results[: self.num_outputs]), list(results[self.num_outputs :])


def check_backend(backend: str) -> None:
    """Raise a ConfigError for a backend that is not there."""
    if backend not in get_args(Backend):
        raise ConfigError(f"backend={backend!r} was asked for; it is one of {', '.join(map(repr, get_args(Backend)))}.")


def make_engines(backend: str, steps: StepPrograms) -> Sequence[Engine]:
    """The engines of ``backend`` for the I-step and then each P-step; inductor compiles at their first call.

    Raises:
        ExportError: another runtime refuses the graphs, or its package is missing.
    """
    if backend == "onnxruntime":
        from tokencache_compile.export.local import onnxruntime_engines

        return onnxruntime_engines(steps)
    if backend in ("tensorrt", "tensorrt_rtx"):
        from tokencache_compile.export.local import tensorrt_engines

        return tensorrt_engines(steps, backend)
    return [TorchEngine(step, compiled=backend == "inductor") for step in (steps.full, *steps.cached)]
