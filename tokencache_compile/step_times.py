"""Latency of a model's I- and P-steps in every engine that is installed: whole steps, all in turn in every round."""

from __future__ import annotations

import importlib.util
import inspect
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tokencache_compile.ahead import Ahead, hoisted_engines
from tokencache_compile.calls import TIMESTEP_NAMES, bind_call
from tokencache_compile.engine import check_backend, make_engines
from tokencache_compile.errors import ConfigError
from tokencache_compile.ir import LowRankUpdate
from tokencache_compile.passes.pipeline import StepPrograms, build_steps
from tokencache_compile.plan import CacheConfig
from tokencache_compile.predictor import CachePredictor

RUN = 50  # steps


def installed_backends(device: torch.device) -> list[str]:
    """The backends that can run here: TensorRT needs a GPU."""
    found = ["eager", "inductor"]
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        found.append("onnxruntime")
    if device.type == "cuda":
        found += [name for name in ("tensorrt", "tensorrt_rtx") if importlib.util.find_spec(name)]
    return found


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """One timed call: wall clock, or on a GPU CUDA events."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


class Steps:
    """The I-step and the first P-step of ``programs`` in one backend, as calls on fixed inputs after one I-step.

    The P-step is the one that a run of a known scheduler has: its conditioning is made ahead where that can be.

    Args:
        call: the arguments of one call by name, in the order of the model's forward.
    """

    def __init__(self, programs: StepPrograms, backend: str, call: Mapping[str, Any]) -> None:
        self._inputs = [leaf.contiguous() for leaf in pytree.tree_leaves(dict(call)) if isinstance(leaf, Tensor)]
        device = self._inputs[0].device
        schedule = programs.plan.config.schedule_of(RUN)
        self.num_ahead = sum(not schedule.is_full(step) for step in range(RUN))
        self._timestep = next(float(call[name].flatten()[0]) for name in TIMESTEP_NAMES if name in call)
        self._full, self._cached, *_ = make_engines(backend, programs)
        _, self._caches = self._full(self._inputs, programs.step_inputs(0, device), programs.initial_caches(device))
        self._extras, self._full_extras = programs.step_inputs(1, device), programs.step_inputs(1, device)
        self._hoisted = hoisted_engines(backend, programs, call)[0]
        if self._hoisted is not None and (values := self.ahead()) is not None:
            self._cached, self._extras = self._hoisted.engine, [*self._extras, *values]

    def ahead(self) -> list[Tensor] | None:
        """Make the conditioning of ``num_ahead`` P-steps, those of a run of :data:`RUN` steps; None where it stays in the P-step."""
        to_come = [self._timestep - i for i in range(self.num_ahead)]
        return None if self._hoisted is None else self._hoisted.values(Ahead(), self._inputs, self._timestep, to_come)

    def with_share(self, cached: Sequence[float], ahead: Sequence[float]) -> list[float]:
        """Seconds of P-steps, each with its share of the runs ``ahead`` that were timed beside it."""
        return [p + a / self.num_ahead for p, a in zip(cached, ahead, strict=True)]

    def full(self) -> None:
        """One I-step."""
        self._full(self._inputs, self._full_extras, self._caches)

    def cached(self) -> None:
        """One P-step."""
        self._cached(self._inputs, self._extras, self._caches)


def step_times(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    config: CacheConfig,
    predictor: CachePredictor | None = None,
    backends: Sequence[str] | None = None,
    rounds: int = 7,
    lora: Sequence[LowRankUpdate] = (),
) -> dict[str, Any]:
    """Time the eager model, its I-step and its P-step in each backend.

    Args:
        example_inputs: keyword arguments of one call.
        config: a plan that caches something.
        backends: names as for ``transform``; all that are installed if left out.
        lora: of the P-step, see :func:`load_lora`.
        rounds: every figure is over so many rounds, in each of which everything runs once.

    Returns:
        JSON values: machine and versions, MACs, and by backend seconds (median, p90) of ``model``, ``I`` and ``P``, the speed-up of a
        P-step over the same backend's I-step, and the seconds it took to prepare (compile, export, build). A P-step's seconds hold its
        share of what is made ahead for a run of 50 steps.

    Raises:
        ConfigError: the plan caches nothing, or there is no such backend.
        ExportError: a backend's package is missing, or it refuses the graphs.
    """
    call = bind_call(type(model).__name__, inspect.signature(model.forward), (), example_inputs)
    inputs = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    device = inputs[0].device
    programs = build_steps(model, example_inputs, config, predictor, lora)
    if not programs.cached:
        raise ConfigError(f"ratio={config.ratio} was asked for, which caches nothing: there is no P-step to time. Pass a ratio above 0.")
    for backend in backends or ():
        check_backend(backend)
    runs: dict[tuple[str, str], Callable[[], Any]] = {("eager", "model"): lambda: model(**example_inputs)}
    prepared: dict[str, float] = {}
    measured: dict[str, Steps] = {}
    with torch.no_grad():
        for backend in backends or installed_backends(device):
            start = time.perf_counter()
            steps = Steps(programs, backend, call)
            steps.cached()
            prepared[backend] = time.perf_counter() - start
            runs |= {(backend, "I"): steps.full, (backend, "P"): steps.cached, (backend, "ahead"): steps.ahead}
            measured[backend] = steps
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for _ in track(range(rounds), "rounds"):
            for key, run in runs.items():
                times[key].append(seconds(run, device))
    for backend, steps in measured.items():
        times[backend, "P"] = steps.with_share(times[backend, "P"], times.pop((backend, "ahead")))
    rows: dict[str, Any] = {backend: {"prepare_seconds": value} for backend, value in prepared.items()}
    for (backend, step), values in times.items():
        rows.setdefault(backend, {})[step] = {"seconds": statistics.median(values), "p90": sorted(values)[int(0.9 * (rounds - 1))]}
    for backend in prepared:
        rows[backend]["I_over_P"] = statistics.median(i / p for i, p in zip(times[backend, "I"], times[backend, "P"], strict=True))
    return {
        "model": type(model).__name__,
        "inputs": {str(i): [list(t.shape), str(t.dtype)] for i, t in enumerate(inputs)},
        "plan": str(programs.plan),
        "gmacs": {"I": programs.macs_full / 1e9, "P": programs.macs_cached[0] / 1e9},
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "rounds": rounds,
        "backends": rows,
    }
