"""Compiled steps by recordings, as far as it shows without a GPU: on fixed addresses, and with what is recorded run in torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from test_tensorrt_session import at_address, guided_run
from tiny import build, conditions, same_bits, sample, transformed
from torch import Tensor
from torch._dynamo.utils import counters

from tokencache_compile import ahead, engine
from tokencache_compile.export.buffers import Placement
from tokencache_compile.export.cuda_graphs import RecordedStep
from tokencache_compile.export.inductor import compile_step
from tokencache_compile.ir import StepProgram, TensorSpec


class AddressRecorder:
    """What a CUDA graph keeps of a step is addresses: they are all that its replay is given."""

    def __init__(self) -> None:
        self.lock, self.recorded, self.replayed = threading.RLock(), 0, 0

    def enter(self) -> int:
        return 0

    def leave(self) -> None:
        pass

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


class PlainEngine:
    """A step's graph in torch, every result new: without what engines make of it for a CPU."""

    def __init__(self, step: StepProgram, compiled: bool) -> None:
        self.num_outputs, self.run = step.num_outputs, self.made(step)

    def made(self, step: StepProgram) -> Callable[..., Sequence[Tensor]]:
        return step.module

    def __call__(self, *given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            results = [*self.run(*(tensor for part in given for tensor in part))]
        return results[: self.num_outputs], results[self.num_outputs :]


def dispatcher_of(model: Any, recorder: AddressRecorder | None, settings: dict[str, Any], compiled: bool = False) -> Any:
    """A dispatcher whose steps run by ``recorder``, or plainly; it has been called once."""

    class RecordedEngine(PlainEngine):
        def made(self, step: StepProgram) -> Callable[..., Sequence[Tensor]]:
            run = compile_step(step.module) if compiled else step.module
            return RecordedStep(step, run, lambda device: recorder)  # type: ignore[arg-type,return-value]

    dispatcher = transformed(model, **settings)
    with pytest.MonkeyPatch.context() as patch:
        for module in (engine, ahead):
            patch.setattr(module, "TorchEngine", RecordedEngine if recorder is not None else PlainEngine)
        dispatcher(sample(), timestep=torch.full((len(sample()),), 5), **conditions("dit"))
    return dispatcher


SETTINGS = [
    {"context": "reuse", "scorer": "random"},
    {"context": "cached", "scorer": "change", "history": "computed"},
    {"ratio": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_whole_runs(settings: dict[str, Any]) -> None:
    """Two branches: what plain steps give bit for bit, and from the third run on there is nothing new to record."""
    model, recorder = build("dit", layers=3), AddressRecorder()
    dispatcher, plain = (dispatcher_of(model, one, settings) for one in (recorder, None))
    found = [guided_run(dispatcher, seed) for seed in (3, 4)]
    recorded, replayed = recorder.recorded, recorder.replayed
    found.append(guided_run(dispatcher, 3))
    assert recorder.recorded == recorded > 0 and recorder.replayed - replayed == 100
    assert all(same_bits(got, guided_run(plain, seed)) for got, seed in zip(found, (3, 4, 3), strict=True))


def test_a_compiled_step_is_compiled_once() -> None:
    """What it is given at its first call, and from fixed buffers later, is of one kind to torch.compile: two graphs, no break."""
    torch._dynamo.reset()
    counters.clear()
    dispatcher = dispatcher_of(build("dit", layers=2), AddressRecorder(), SETTINGS[0], compiled=True)
    first, again = (guided_run(dispatcher, 3, steps=12) for _ in range(2))
    assert same_bits(first, again) and counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_threads() -> None:
    """Each has caches of its own; all outputs of both are kept."""
    model = build("dit", layers=3)
    dispatcher, plain = (dispatcher_of(model, one, SETTINGS[0]) for one in (AddressRecorder(), None))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(partial(guided_run, dispatcher), (3, 4)))
    assert all(same_bits(got, guided_run(plain, seed)) for got, seed in zip(found, (3, 4), strict=True))


def test_weights_that_moved_are_recorded_anew() -> None:
    """As those of a model that left the GPU and is back: the same parameters, other memory."""
    model, recorder = build("dit", layers=3), AddressRecorder()
    dispatcher = dispatcher_of(model, recorder, SETTINGS[0])
    first = [guided_run(dispatcher, 3) for _ in range(2)][-1]
    before = recorder.recorded
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert same_bits(guided_run(dispatcher, 3), first) and recorder.recorded > before


def test_a_step_that_cannot_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """It runs launch by launch, and says so once."""
    recorder = Unrecordable()
    dispatcher = dispatcher_of(build("dit", layers=3), recorder, SETTINGS[0])
    first = guided_run(dispatcher, 3)
    assert same_bits(guided_run(dispatcher, 3), first)
    assert recorder.recorded == caplog.text.count("runs without CUDA graphs") == 2


def test_inference_mode() -> None:
    """The memory that a step keeps is not of inference mode, where its first run was, so that later ones may write to it."""
    with torch.inference_mode():
        dispatcher = dispatcher_of(build("dit", layers=3), AddressRecorder(), SETTINGS[0])
        first = guided_run(dispatcher, 3, steps=12)
    assert same_bits(guided_run(dispatcher, 3, steps=12), first)
