"""The dispatcher of a transformed model: captures it at the first call of each input signature and runs its steps."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from tokencache_compile.ahead import hoisted_engines
from tokencache_compile.call_format import CallFormat, values_digest
from tokencache_compile.engine import make_engines
from tokencache_compile.errors import ConfigError, InputError
from tokencache_compile.ir import LowRankUpdate
from tokencache_compile.model_state import model_state
from tokencache_compile.passes.pipeline import StepPrograms, build_steps
from tokencache_compile.plan import CacheConfig, CachePlan
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.requests import SchedulerWatch
from tokencache_compile.step_dispatcher import GATE, Compiled, StepDispatcher, StepReport, Summary

__all__ = ["Dispatcher", "StepReport", "Summary"]


@dataclass(frozen=True)
class Captured(Compiled):
    """The steps of one signature of a model, with the programs they came from.

    Attributes:
        call: what the calls look like.
        autocast: whether they run under autocast, which decides dtypes outside the graphs.
    """

    steps: StepPrograms
    call: CallFormat
    autocast: bool


class Dispatcher(StepDispatcher):
    """A transformed diffusion transformer; use it where the model was, for example as ``pipe.transformer``.

    It shares the model's weights and answers for its attributes (``config``, ``dtype``, ``device`` …). Graphs are captured at
    the first call of each input signature. Made by :func:`tokencache_compile.transform`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CacheConfig,
        backend: str,
        predictor: CachePredictor | None,
        watch: SchedulerWatch,
        lora: Sequence[LowRankUpdate] = (),
    ) -> None:
        super().__init__(type(model).__name__, inspect.signature(model.forward), watch)
        self.model = model
        self.predictor = predictor
        self.lora = lora
        self.cache_config = config
        self.backend = backend
        self._compiled: dict[Hashable, Captured] = {}
        self._read: dict[Hashable, frozenset[int]] = {}
        self._lock = threading.RLock()
        self._state = model_state(model)
        self.train(model.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def _uncached(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with GATE.step():
            return self.model(*args, **kwargs)

    def _check_source(self) -> None:
        if self.model.training:
            raise InputError(
                f"{type(self.model).__name__} is in training mode, where it is random (dropped labels, dropout). Call model.eval() first."
            )

    def _source_state(self) -> Hashable:
        """The state of the model; what was captured in another is dropped, as it may share weights that adapters were merged into."""
        with self._lock:  # a capture in another thread may scale adapters for the time of its call
            state = model_state(self.model)
            if state != self._state:
                self._compiled.clear()
                self._read.clear()
                self._state = state
        return state

    def _lookup(self, signature: Hashable, call: dict[str, Any], begins: bool) -> Captured:
        with self._lock:
            key = self._key(signature, call)
            known = self._compiled.get(key)
            if known is not None and begins and not known.steps.program.shares_weights_of(self.model):
                self._compiled.clear()  # weights were replaced (an adapter, load_state_dict(assign=True)): capture anew
            if key not in self._compiled:
                captured = self._compile(call)
                self._read[signature] = self._read.get(signature, frozenset()) | set(captured.steps.read_inputs)
                key = self._key(signature, call)
                self._compiled[key] = captured
            return self._compiled[key]

    def _key(self, signature: Hashable, call: dict[str, Any]) -> Hashable:
        """What a call's graphs hold for: its signature, and the values that the model's forward reads."""
        read = self._read.get(signature)
        if not read:
            return signature
        tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
        return (signature, *(values_digest(tensors[position]) for position in sorted(read)))

    def _compile(self, call: dict[str, Any]) -> Captured:
        # A mode of the caller's, such as a FLOP counter, is meant for the steps that run, and export cannot trace under it.
        with GATE.capture(), _disable_current_modes():
            steps = build_steps(self.model, call, self.cache_config, self.predictor, self.lora)
        full, *cached = make_engines(self.backend, steps)
        rebuild = partial(pytree.tree_unflatten, treespec=steps.output_spec)
        call_format = CallFormat.of(self._signature, call, steps.program.input_names, steps.read_inputs)
        autocast = torch.is_autocast_enabled(steps.program.known_stream.device.type)
        none = (None,) * len(cached)  # where no scheduler tells the timesteps to come
        hoisted = hoisted_engines(self.backend, steps, call) if self._tracker.watch.is_attached else none
        return Captured(steps, full, tuple(cached), hoisted, rebuild, call_format, autocast)

    def captured(self, example_inputs: Mapping[str, Any] | None = None) -> Captured:
        """What is compiled for the signature of ``example_inputs``, captured now if it was not; None: the last signature.

        Raises:
            ConfigError: nothing is captured yet of the model with the adapters it has now.
        """
        if example_inputs is not None:
            signature, call = self._accept(example_inputs)
            return self._lookup(signature, call, begins=True)
        self._source_state()
        if not self._compiled:
            raise ConfigError("nothing is captured yet: call the model once, or pass example_inputs.")
        return list(self._compiled.values())[-1]

    @property
    def plan(self) -> CachePlan:
        """The plan of the last signature that was captured."""
        return self.steps.plan

    @property
    def steps(self) -> StepPrograms:
        """The programs of the last signature that was captured."""
        return self.captured().steps
