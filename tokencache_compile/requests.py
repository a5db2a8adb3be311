"""Which request, guidance branch and step a call belongs to: read from the call itself, never from counting calls.

A request is one run of a sampler. Two sources tell where one begins:

- a :class:`SchedulerWatch`, where the sampler's scheduler is known: ``set_timesteps`` begins a request, in the thread that
  calls it, and names every step of it. This is exact, also after an aborted run.
- the timesteps alone: one that rises, or a sample of another shape, dtype or device, begins a request; one that repeats with the
  same sample is the next guidance branch of that step, and with another sample a new request. Some models' time rises in a run
  (Z-Image: from 0, all noise, to 1); that is told apart only where the scheduler is known, for it then marks the begin.

A branch has its own signature: prompt and negative prompt may differ in length. A branch whose signature changes begins a request.

State is kept per thread, so two threads never mix.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.ahead import Ahead, as_given

_ROUNDING = 0.005  # of a timestep in bfloat16


class SchedulerWatch:
    """Notes, per thread, when a diffusers scheduler's ``set_timesteps`` begins a request and which timesteps it has."""

    def __init__(self) -> None:
        self._local = threading.local()
        self.is_attached = False

    def attach(self, scheduler: Any) -> None:
        """Watch ``scheduler``. A copy of it stays watched, other watches go on; its class and settings are untouched."""
        self.is_attached = True
        original = scheduler.set_timesteps.__func__

        @functools.wraps(original)
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            watch._begin(self.timesteps)
            return result

        watch = self
        scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)

    def _begin(self, timesteps: Tensor) -> None:
        values = [float(t) for t in timesteps.tolist()]
        self._local.marker = object()
        # A scheduler of second order repeats timesteps: its calls are counted instead.
        self._local.repeats = len(set(values)) < len(values)
        self._local.positions = {} if self._local.repeats else {t: i for i, t in enumerate(values)}

    @property
    def marker(self) -> object | None:
        """Changes with every request of this thread; None where no watched scheduler was set up in it."""
        return getattr(self._local, "marker", None)

    @property
    def repeats(self) -> bool:
        """Whether this thread's schedule evaluates some timestep more than once, as Heun's method does."""
        return getattr(self._local, "repeats", False)

    def position(self, timestep: float) -> int | None:
        """Index of ``timestep`` in this thread's schedule."""
        found: int | None = getattr(self._local, "positions", {}).get(timestep)
        return found

    def num_steps(self, timestep: float) -> int | None:
        """How many steps this thread's schedule has, if ``timestep`` is of it; None where its run is another or not known.

        Models are given it in one of the ways of :func:`as_given`, rounded to their dtype.
        """
        times, one = self.timesteps, torch.tensor(timestep)
        found = any(bool(torch.isclose(given, one, rtol=_ROUNDING, atol=0.0).any()) for given in as_given(torch.tensor(times)))
        return len(times) if found else None

    @property
    def timesteps(self) -> Sequence[float]:
        """This thread's schedule; nothing where it repeats timesteps."""
        return tuple(getattr(self._local, "positions", {}))


@dataclass
class BranchState:
    """The caches of one guidance branch, the ``steps`` that wrote them, and by keep profile the values made ahead for its P-steps."""

    steps: object
    caches: list[Tensor]
    ahead: dict[int, Ahead] = field(default_factory=dict)


@dataclass
class Request:
    """One run of a sampler in one thread.

    Attributes:
        position: of the timestep in the watched schedule; None for a timestep of another scale.
        num_steps: of the watched schedule; None where this is no run of it.
        rises: whether timesteps rise, known from the second one on.
        seen: branches that were called at this timestep.
        signatures: of the branches.
    """

    marker: object | None
    timestep: float
    sample: Tensor
    step: int
    position: int | None
    num_steps: int | None
    rises: bool | None = None
    seen: list[str] = field(default_factory=list)
    signatures: dict[str, Hashable] = field(default_factory=dict)
    branches: dict[str, BranchState] = field(default_factory=dict)


class RequestTracker:
    """Places calls into requests; one per dispatcher, its state is the calling thread's own."""

    def __init__(self, watch: SchedulerWatch) -> None:
        self.watch = watch
        self._local = threading.local()

    @property
    def current(self) -> Request | None:
        return getattr(self._local, "request", None)

    def clear(self) -> None:
        """Forget this thread's request: its next call begins a new one."""
        self._local.request = None

    def place(self, signature: Hashable, timestep: float, sample: Tensor, context: str | None) -> tuple[Request, str]:
        """The request and branch of a call.

        Args:
            signature: shapes, dtypes, devices and constants of the call.
            context: name of the branch where the pipeline gives one (``cache_context``).
        """
        marker, position = self.watch.marker, self.watch.position(timestep)
        request = self.current
        if request is None or self._begins(request, sample, marker, timestep, position):
            return self._new(signature, marker, timestep, sample, position, context)
        if timestep != request.timestep:
            self._advance(request, timestep, sample, position)
        elif not torch.equal(request.sample, sample):
            if not self.watch.repeats:
                return self._new(signature, marker, timestep, sample, position, context)
            self._advance(request, timestep, sample, position)  # a second evaluation at one timestep
        elif context in request.seen:
            return self._new(signature, marker, timestep, sample, position, context)
        branch = self._branch(request, context)
        if request.signatures.get(branch, signature) != signature:
            return self._new(signature, marker, timestep, sample, position, context)
        return request, self._enter(request, branch, signature)

    @staticmethod
    def _begins(request: Request, sample: Tensor, marker: object | None, timestep: float, position: int | None) -> bool:
        known = request.sample
        if (sample.shape, sample.dtype, sample.device) != (known.shape, known.dtype, known.device) or marker is not request.marker:
            return True
        if position is not None and request.position is not None:
            return position < request.position
        if timestep == request.timestep:
            return False
        rises = timestep > request.timestep
        return rises and marker is None if request.rises is None else rises != request.rises

    def _new(
        self, signature: Hashable, marker: object | None, timestep: float, sample: Tensor, position: int | None, context: str | None
    ) -> tuple[Request, str]:
        if position is not None and timestep * 1000 == self.watch.timesteps[0]:
            position = None  # a flow model's first timestep, in thousandths of the schedule's: it may be the schedule's last one too
        request = Request(marker, timestep, sample.clone(), position or 0, position, self.watch.num_steps(timestep))
        self._local.request = request
        return request, self._enter(request, self._branch(request, context), signature)

    @staticmethod
    def _advance(request: Request, timestep: float, sample: Tensor, position: int | None) -> None:
        if request.position is None:
            position = None  # not a run of the watched schedule, though single timesteps may coincide: it is counted to its end
        request.step = position if position is not None else request.step + 1
        if timestep != request.timestep:
            request.rises = timestep > request.timestep
        request.timestep, request.sample, request.position, request.seen = timestep, sample.clone(), position, []

    @staticmethod
    def _branch(request: Request, context: str | None) -> str:
        return context if context is not None else f"branch {len(request.seen)}"

    @staticmethod
    def _enter(request: Request, branch: str, signature: Hashable) -> str:
        request.seen.append(branch)
        request.signatures[branch] = signature
        return branch
