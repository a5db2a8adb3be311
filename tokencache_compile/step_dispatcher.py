"""The dispatcher's core: places each call in its request, picks the I- or the P-step, keeps the caches and counts.

It knows steps only as engines. :class:`tokencache_compile.runtime.Dispatcher` captures them from a model, and
:class:`tokencache_compile.export.bundle.BundleDispatcher` reads them from a directory.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tokencache_compile.ahead import Ahead, HoistedEngine
from tokencache_compile.calls import TIMESTEP_NAMES, bind_call
from tokencache_compile.engine import Engine
from tokencache_compile.errors import ConfigError, InputError
from tokencache_compile.plan import CacheConfig
from tokencache_compile.requests import BranchState, Request, RequestTracker, SchedulerWatch
from tokencache_compile.step_table import StepTable


class _CaptureGate:
    """Steps run side by side, a capture alone: ``torch.export`` patches ``nn.Module.__call__`` for every thread."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._running = 0
        self._own = threading.local()

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._turn:
            self._running += 1
        self._own.steps = self._own_steps + 1
        try:
            yield
        finally:
            self._own.steps -= 1
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    @contextmanager
    def capture(self) -> Iterator[None]:
        with self._turn:
            self._turn.wait_for(lambda: self._running == self._own_steps)  # a step may capture a model within the model
            yield

    @property
    def _own_steps(self) -> int:
        steps: int = getattr(self._own, "steps", 0)
        return steps


GATE = _CaptureGate()


@dataclass(frozen=True)
class StepReport:
    """What one call did: given to ``step_callback``.

    Attributes:
        kind: "I" (all computed) or "P" (cached).
        step: index of the sampling step, ``timestep`` its value.
        branch: guidance branch, as ``cache_context`` names it, or "branch 0", "branch 1" … in the order of the calls.
        kept: tokens recomputed in each cached block.
    """

    kind: str
    step: int
    timestep: float
    branch: str
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """Counts over the calling thread's current (or last) request; MACs are those of all its calls."""

    full_steps: int
    cached_steps: int
    tokens_recomputed: tuple[int, ...]
    tokens_total: int
    cache_bytes: int
    macs: int
    macs_uncached: int

    @property
    def macs_saved(self) -> float:
        """Share of the uncached run's MACs that was not computed."""
        return 1.0 - self.macs / self.macs_uncached if self.macs_uncached else 0.0

    def __str__(self) -> str:
        blocks = " ".join(map(str, self.tokens_recomputed)) or "-"
        return (
            f"{self.full_steps} I-steps, {self.cached_steps} P-steps; {self.macs / 1e9:.2f} of {self.macs_uncached / 1e9:.2f} GMACs "
            f"({self.macs_saved:.1%} saved); caches {self.cache_bytes / 2**20:.1f} MiB\n"
            f"tokens recomputed in P-steps, per cached block (of {self.tokens_total}): {blocks}"
        )


@dataclass(frozen=True)
class Compiled:
    """The steps of one input signature with their engines.

    Attributes:
        cached, hoisted: a P-step for each keep profile, and where it can be had the one whose conditioning is made ahead of it.
        rebuild: makes the model's return value from its output tensors.
    """

    steps: StepTable
    full: Engine
    cached: tuple[Engine, ...]
    hoisted: tuple[HoistedEngine | None, ...]
    rebuild: Callable[[list[Tensor]], Any]


@dataclass
class _Counts:
    full: int = 0
    cached: int = 0
    macs: int = 0
    macs_uncached: int = 0
    recomputed: tuple[int, ...] = ()
    compiled: Compiled | None = None
    cache_bytes: int = 0


def _check_step_weights(config: CacheConfig, request: Request) -> None:
    """Raise an InputError if the run has other steps than its step weights are for."""
    fitted = len(config.step_weights)
    if fitted and (request.step >= fitted or request.num_steps not in (None, fitted)):
        found = f"step {request.step + 1}" if request.num_steps in (None, fitted) else f"a run of {request.num_steps} steps"
        raise InputError(
            f"{found} was asked for, and this plan's step_weights are fitted for runs of {fitted} steps. Sample with {fitted} steps, fit "
            "them for the number that you need, or pass step_weights=() for a forecast that any run can have."
        )


class StepDispatcher(nn.Module, ABC):
    """A transformer by its steps: the model's own forward, answered by I- and P-steps.

    Args:
        name: the model's class name, for messages.
        signature: of the model's forward.
        watch: marks where requests begin.

    Raises:
        ConfigError: ``signature`` has no timestep.
    """

    def __init__(self, name: str, signature: inspect.Signature, watch: SchedulerWatch) -> None:
        super().__init__()
        names = list(signature.parameters)
        timestep = next((name for name in TIMESTEP_NAMES if name in names), None)
        if timestep is None:
            raise ConfigError(f"{name}.forward({', '.join(names)}) has no argument named timestep, which tells the steps apart.")
        self.step_callback: Callable[[StepReport], None] | None = None
        self._name, self._signature = name, signature
        self._timestep_name, self._sample_name = timestep, names[0]
        self._tracker = RequestTracker(watch)
        self._local = threading.local()
        self._enabled = True

    # -- what a source of steps provides ------------------------------------------------------------------------------

    @abstractmethod
    def _lookup(self, signature: Hashable, call: dict[str, Any], begins: bool) -> Compiled:
        """The steps for a call of this signature; ``begins``: it is the first of its request and branch."""

    @abstractmethod
    def _uncached(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call returns while caching is disabled."""

    def _check_source(self) -> None:
        """Raise an InputError if no step may run at all now."""

    def _source_state(self) -> Hashable:
        """What steps depend on beside the call: others are compiled for another."""
        return None

    # -- switches -------------------------------------------------------------------------------------------------

    def enable(self) -> None:
        """Use the cached graphs (the state after ``transform``)."""
        self._enabled = True

    def disable(self) -> None:
        """Cache nothing until :meth:`enable`: the original model where there is one, bit for bit, else every step in full."""
        self._enabled = False
        self.reset()

    @property
    def is_cache_enabled(self) -> bool:
        return self._enabled

    def reset(self) -> None:
        """Drop this thread's caches: its next call begins a new request, with an I-step."""
        self._tracker.clear()

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers' pipelines call this when they are done."""
        self.reset()

    @contextmanager
    def cache_context(self, name: str, **place: Any) -> Iterator[None]:
        """Calls inside belong to guidance branch ``name``; diffusers' pipelines enter ``"cond"`` and ``"uncond"``.

        ``place`` is what some pipelines tell of the step (``step_index``, ``sigma`` …); the timesteps tell that themselves.
        """
        before = getattr(self._local, "context", None)
        self._local.context = name
        try:
            yield
        finally:
            self._local.context = before

    # -- the call -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward: same arguments, same return type.

        Raises:
            InputError: an argument is missing, unknown or NaN, or a gradient is asked for.
            UnsupportedModelError, ConfigError: at the first call of a signature, if the model cannot be transformed so; hooks were added.
        """
        if not self._enabled:
            return self._uncached(args, kwargs)
        call = bind_call(self._name, self._signature, args, kwargs)
        as_tuple = not call.pop("return_dict", True)
        signature, tensors = self._signature_of(call)
        signature = (self._source_state(), signature)
        timestep = self._check_values(call, tensors)
        try:
            before = self._tracker.current
            context = getattr(self._local, "context", None)
            request, branch = self._tracker.place(signature, timestep, _sample(call[self._sample_name]), context)
            compiled = self._lookup(signature, call, begins=branch not in request.branches)
            if request is not before:
                self._local.counts = _Counts(compiled=compiled)
                if before is not None:
                    before.branches.clear()  # its caches make room, and so those of every run lie at the same addresses
            outputs = self._run(compiled, request, branch, timestep, tensors)
        except BaseException:
            self.reset()
            raise
        result = compiled.rebuild(outputs)
        if not as_tuple:
            return result
        return result.to_tuple() if isinstance(result, BaseOutput) else tuple(outputs)

    @staticmethod
    def _signature_of(call: dict[str, Any]) -> tuple[Hashable, list[Tensor]]:
        """What graphs are compiled for (shapes, dtypes, devices, constants, autocast), and the call's tensors in graph order."""
        leaves, spec = pytree.tree_flatten(call)
        tensors = [leaf.detach().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        kinds = ((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        devices = sorted({t.device.type for t in tensors})
        autocast = tuple(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in devices)
        return (str(spec), autocast, *kinds), tensors

    def _check_values(self, call: Mapping[str, Any], tensors: list[Tensor]) -> float:
        """The call's timestep, after refusing what must not enter a cache. One read from the device."""
        timestep, samples = call[self._timestep_name], _tensors(call[self._sample_name])
        if not isinstance(timestep, Tensor) or not samples:
            wrong = self._timestep_name if not isinstance(timestep, Tensor) else self._sample_name
            raise InputError(
                f"{wrong}={call[wrong]!r} ({type(call[wrong]).__name__}) was given; a torch tensor is needed, as the model itself needs it."
            )
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in pytree.tree_leaves(dict(call)) if isinstance(leaf, Tensor)):
            raise InputError(
                "an input requires a gradient; the cached graphs are for inference. Call disable() to train, or use torch.no_grad()."
            )
        self._check_source()
        floats = [t for t in tensors if t.is_floating_point()]
        reads = [timestep.detach().flatten()[:1].float(), *(t.isnan().any().float().reshape(1) for t in floats)]
        value, *nans = torch.cat([read.to(samples[0].device) for read in reads]).tolist()  # a timestep may be on another device
        if any(nans):
            names = [name for name, leaf in call.items() if any(t.is_floating_point() and bool(t.isnan().any()) for t in _tensors(leaf))]
            raise InputError(
                f"NaN was found in {', '.join(names)}; it would stay in the caches of this run. Check what came before the transformer."
            )
        return float(value)

    def _run(self, compiled: Compiled, request: Request, branch: str, timestep: float, tensors: list[Tensor]) -> list[Tensor]:
        steps, plan, device = compiled.steps, compiled.steps.plan, request.sample.device
        state = request.branches.get(branch)
        _check_step_weights(plan.config, request)
        first = state is None or state.steps is not steps  # other steps where the model reads values that changed
        if state is None or first:
            state = request.branches[branch] = BranchState(steps, steps.initial_caches(device))
        full = first or not compiled.cached or plan.config.schedule_of(request.num_steps).is_full(request.step)
        group = plan.profile_of(request.step)
        engine, extras = compiled.full if full else compiled.cached[group], steps.step_inputs(request.step, device)
        with GATE.step():
            if not full and (found := self._ahead(compiled, request, state, group, timestep, tensors)) is not None:
                engine, extras = found[0], [*extras, *found[1]]
            outputs, state.caches = engine(tensors, extras, state.caches)
        kept = () if full else plan.profiles[group]
        self._count(compiled, request, full, kept, steps.macs_full if full else steps.macs_cached[group])
        if self.step_callback is not None:
            self.step_callback(StepReport("I" if full else "P", request.step, timestep, branch, kept))
        return outputs

    def _ahead(
        self, compiled: Compiled, request: Request, state: BranchState, group: int, timestep: float, tensors: list[Tensor]
    ) -> tuple[Engine, list[Tensor]] | None:
        """The P-step whose conditioning is made ahead, with its values; None where the steps to come are not known."""
        hoisted, plan = compiled.hoisted[group], compiled.steps.plan
        if hoisted is None:
            return None
        known, to_come = state.ahead.setdefault(group, Ahead()), list[float]()
        if timestep not in known.values:
            schedule = hoisted.schedule(tensors, self._tracker.watch.timesteps, request.step, timestep)
            if schedule is None:
                return None
            cached = plan.config.schedule_of(request.num_steps)
            of_group = (n for n in range(request.step, len(schedule)) if plan.profile_of(n) == group)
            to_come = [schedule[n] for n in of_group if not cached.is_full(n)]
        values = hoisted.values(known, tensors, timestep, to_come)
        return None if values is None else (hoisted.engine, values)

    # -- what happened --------------------------------------------------------------------------------------------

    def _count(self, compiled: Compiled, request: Request, full: bool, kept: tuple[int, ...], macs: int) -> None:
        counts: _Counts = self._local.counts
        counts.full += full
        counts.cached += not full
        counts.macs += macs
        counts.macs_uncached += compiled.steps.macs_full
        if kept:
            counts.recomputed = tuple(a + b for a, b in zip(counts.recomputed or (0,) * len(kept), kept, strict=True))
        counts.cache_bytes = sum(cache.nbytes for state in request.branches.values() for cache in state.caches)

    def summary(self) -> Summary:
        """Counts of this thread's current request, or of its last one; works in the middle of a run."""
        counts: _Counts = getattr(self._local, "counts", _Counts())
        if counts.compiled is None:
            return Summary(0, 0, (), 0, 0, 0, 0)
        tokens = counts.compiled.steps.plan.tokens
        return Summary(counts.full, counts.cached, counts.recomputed, tokens, counts.cache_bytes, counts.macs, counts.macs_uncached)

    def prepare(self, example_inputs: Mapping[str, Any]) -> None:
        """Make ready for the signature of ``example_inputs`` (keyword arguments of one call) ahead of time: capture, compile, warm up."""
        signature, call = self._accept(example_inputs)
        compiled = self._lookup(signature, call, begins=True)
        _, tensors = self._signature_of(call)
        device = _sample(call[self._sample_name]).device
        timestep = float(call[self._timestep_name].flatten()[0])
        extras, caches = compiled.steps.step_inputs(0, device), compiled.steps.initial_caches(device)
        with GATE.step():
            compiled.full(tensors, extras, caches)
            for engine, hoisted in zip(compiled.cached, compiled.hoisted, strict=True):
                values = hoisted.values(Ahead(), tensors, timestep, [timestep]) if hoisted is not None else None
                if hoisted is not None and values is not None:
                    hoisted.engine(tensors, [*extras, *values], caches)
                else:
                    engine(tensors, extras, caches)

    def _accept(self, kwargs: Mapping[str, Any]) -> tuple[Hashable, dict[str, Any]]:
        """The signature and the bound arguments of a call that is not part of a run, checked."""
        call = bind_call(self._name, self._signature, (), kwargs)
        call.pop("return_dict", None)
        signature, tensors = self._signature_of(call)
        self._check_values(call, tensors)
        return (self._source_state(), signature), call


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _sample(value: Any) -> Tensor:
    """The sample, by which calls are told apart; a list of samples (Z-Image) as one row of all their values."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.cat([tensor.detach().flatten() for tensor in _tensors(value)])
