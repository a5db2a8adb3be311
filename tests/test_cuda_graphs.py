"""Compiled steps by recordings, as far as it shows without a GPU: on fixed addresses, and with what is recorded run in torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_tensorrt_session import at_address, guided_run
from tiny import build, inputs, same_bits, transformed
from torch import Tensor
from torch._dynamo.utils import counters

from tokencache_compile.export.buffers import Placement
from tokencache_compile.export.cuda_graphs import RecordedStep
from tokencache_compile.export.inductor import compile_step
from tokencache_compile.ir import StepProgram, TensorSpec


class AddressRecorder:
    """What a CUDA graph keeps of a step is addresses: they are all that its replay is given."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self._lock = threading.RLock()

    @contextmanager
    def turn(self) -> Iterator[int]:
        with self._lock:
            yield 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        assert isinstance(work, partial)
        (placed,), step = work.args, work.func.__self__  # type: ignore[attr-defined]
        self.recorded += 1
        inputs, outputs = (self._addresses(tensors) for tensors in (placed.inputs, placed.outputs))

        def replay() -> None:
            self.replayed += 1
            step._plainly(Placement(self._at(inputs), self._at(outputs), ()))

        return replay

    @staticmethod
    def _addresses(tensors: dict[str, Tensor]) -> dict[str, tuple[int, TensorSpec]]:
        return {name: (tensor.data_ptr(), TensorSpec(name, tuple(tensor.shape), tensor.dtype)) for name, tensor in tensors.items()}

    @staticmethod
    def _at(places: dict[str, tuple[int, TensorSpec]]) -> dict[str, Tensor]:
        return {name: at_address(*place) for name, place in places.items()}


class Unrecordable(AddressRecorder):
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        raise RuntimeError("operation not permitted when stream is capturing")


class Wrong(AddressRecorder):
    """Its replays do nothing."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return lambda: None


class PlainEngine:
    """Runs a step, every result new: without what engines make of it for a CPU."""

    def __init__(self, step: StepProgram, run: Callable[..., Sequence[Tensor]]) -> None:
        self.num_outputs, self.run = step.num_outputs, run

    def __call__(self, *given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            results = [*self.run(*(tensor for part in given for tensor in part))]
        return results[: self.num_outputs], results[self.num_outputs :]


def plainly(step: StepProgram) -> PlainEngine:
    return PlainEngine(step, step.module)


def recorded_by(recorder: AddressRecorder, compiled: bool = False) -> Callable[[StepProgram], PlainEngine]:
    def engine(step: StepProgram) -> PlainEngine:
        run = compile_step(step.module) if compiled else step.module
        return PlainEngine(step, RecordedStep(step, run, lambda device: recorder))  # type: ignore[arg-type,return-value]

    return engine


def dispatcher_of(settings: dict[str, Any]) -> Any:
    return transformed(build("dit", layers=2), example_inputs=inputs("dit"), **settings)


def run_by(dispatcher: Any, engine: Callable[[StepProgram], PlainEngine], seeds: Sequence[int], steps: int = 24) -> list[list[Tensor]]:
    """Guided runs one after the other, by engines that were made for the first of them."""
    (key, captured), *_ = dispatcher._compiled.items()
    engines = {"full": engine(captured.steps.full), "cached": tuple(map(engine, captured.steps.cached))}
    dispatcher._compiled = {key: replace(captured, **engines)}
    return [guided_run(dispatcher, seed, steps) for seed in seeds]


SETTINGS = [
    {"context": "reuse", "scorer": "random"},
    {"context": "cached", "scorer": "change", "history": "computed"},
    {"ratio": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_whole_runs(settings: dict[str, Any]) -> None:
    """Two branches: what plain steps give bit for bit, also in other threads, and from the third run on there is nothing new to record."""
    dispatcher, recorder = dispatcher_of(settings), AddressRecorder()
    expected = run_by(dispatcher, plainly, (3, 4))
    found = run_by(dispatcher, recorded_by(recorder), (3, 4))
    recorded, replayed = recorder.recorded, recorder.replayed
    found.append(guided_run(dispatcher, 3, steps=24))
    assert recorder.recorded == recorded > 0 and recorder.replayed - replayed == 48
    assert all(same_bits(got, expected[which]) for got, which in zip(found, (0, 1, 0), strict=True))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(partial(guided_run, dispatcher, steps=24), (3, 4)))
    assert all(same_bits(got, wanted) for got, wanted in zip(found, expected, strict=True))


def test_a_compiled_step_is_compiled_once() -> None:
    """What it is given at its first call, and from fixed buffers later, is of one kind to torch.compile: two graphs, no break."""
    torch._dynamo.reset()
    counters.clear()
    first, again = run_by(dispatcher_of(SETTINGS[0]), recorded_by(AddressRecorder(), compiled=True), (3, 3), steps=8)
    assert same_bits(first, again) and counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_weights_that_moved_are_recorded_anew() -> None:
    """As those of a model that left the GPU and is back: the same parameters, other memory."""
    dispatcher, recorder = dispatcher_of(SETTINGS[0]), AddressRecorder()
    _, first = run_by(dispatcher, recorded_by(recorder), (3, 3))
    before = recorder.recorded
    for parameter in dispatcher.model.parameters():
        parameter.data = parameter.data.clone()
    assert same_bits(guided_run(dispatcher, 3, steps=24), first) and recorder.recorded > before


@pytest.mark.parametrize("kind", [Unrecordable, Wrong])
def test_a_step_that_cannot_be_recorded(kind: type[AddressRecorder], caplog: pytest.LogCaptureFixture) -> None:
    """It runs launch by launch, and says so once."""
    dispatcher, recorder = dispatcher_of(SETTINGS[0]), kind()
    expected = run_by(dispatcher, plainly, (3,))
    assert same_bits(run_by(dispatcher, recorded_by(recorder), (3,))[0], expected[0])
    assert recorder.recorded == caplog.text.count("runs without CUDA graphs") == 2


def test_inference_mode() -> None:
    """The memory that a step keeps is not of inference mode, where its first run was, so that later ones may write to it."""
    dispatcher = dispatcher_of(SETTINGS[0])
    with torch.inference_mode():
        first = run_by(dispatcher, recorded_by(AddressRecorder()), (3,))
    assert same_bits(guided_run(dispatcher, 3, steps=24), first[0])
