"""A compiled step as CUDA graphs: one launch in the place of hundreds, which take longer than the kernels of a P-step.

    tensors ──▶ Bindings.place ──▶ the step on fixed addresses: recorded for each new table of addresses, then replayed

Nothing a recording reads or writes moves: what a step takes from the caller is copied into fixed buffers, caches are read where they lie
and come back to the same few addresses, and weights that moved (a model that left the GPU and is back) are another table. A step's first
recording is held against the step itself.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.dlpack import from_dlpack

from tokencache_compile.export.buffers import Bindings, Placement, Recordings
from tokencache_compile.ir import StepProgram, TensorSpec

_LOG = logging.getLogger(__name__)
_CAPACITY = 64  # recordings of a step: the tables of a run of as many steps
_ROUNDING = 1e-2
Work = Callable[[], None]


class Recorder:
    """Records work on one device. All its recordings have one scratch memory, so they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[int]:
        """The caller's turn: what it has its stream do comes after whatever was done here before. Yields the stream's handle."""
        with self._lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            yield stream.cuda_stream
            self._done.record(stream)

    def record(self, work: Work) -> Work:
        """What does ``work`` again on the same memory. Raises a RuntimeError if it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads go on allocating
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


@functools.cache
def recorder(device: torch.device) -> Recorder:
    """The one recorder of ``device``."""
    with torch.cuda.device(device):
        return Recorder(device)


class RecordedStep:
    """Runs ``run``, the compiled form of ``step``, by recordings.

    Args:
        run: ``(*inputs, *extras, *caches) -> (*outputs, *caches)``; writes to none of what it is given.
        make_recorder: of the device of the first call's tensors.
    """

    def __init__(
        self, step: StepProgram, run: Callable[..., Sequence[Tensor]], make_recorder: Callable[[torch.device], Recorder] = recorder
    ) -> None:
        graph = step.module.graph
        self._run, self._make_recorder = run, make_recorder
        self._names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
        self._num_outputs = step.num_outputs
        results: Sequence[Node] = graph.output_node().args[0]  # type: ignore[assignment]
        # A cache that only moves, or stays, is the caller's own tensor; the model's outputs are always new.
        self._results = [
            str(node.target) if node.op == "placeholder" and place >= step.num_outputs else f"result {place}"
            for place, node in enumerate(results)
        ]
        self._caches = self._names[len(self._names) - len(step.caches) :]
        self._weights = list(step.module.parameters())
        self._recordings = Recordings(_CAPACITY, at_once=True)
        self._records = True
        self._bindings: Bindings | None = None
        self._warm = self._checked = False

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The step's outputs and caches, in the order of the caller's stream."""
        values = dict(zip(self._names, tensors, strict=True))
        recorder = self._make_recorder(tensors[0].device)
        # The fixed buffers outlive the call, so they must not be tensors of inference mode.
        with recorder.turn() as lane, torch.inference_mode(False), torch.no_grad():
            if self._bindings is None:
                return self._first(values)
            placed = self._bindings.place(values, lane)
            if self._records and self._warm:
                table = (*placed.addresses, *(weight.data_ptr() for weight in self._weights))
                self._recordings.run(table, partial(self._plainly, placed), partial(self._recorded, placed, recorder))
            else:
                self._plainly(placed)  # whatever is made ready at a first run on such tensors is made outside of a recording
                self._warm = True
            found = values | placed.results(self._bindings.empty_copies())
        return [found[name] for name in self._results]

    def _first(self, values: dict[str, Tensor]) -> list[Tensor]:
        """Compile, and see what the results are like."""
        results = [result.contiguous() for result in self._of(values)]
        inputs = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in values.items()]
        new = [
            TensorSpec(name, tuple(result.shape), result.dtype)
            for name, result in zip(self._results, results, strict=True)
            if name not in values
        ]
        self._bindings = Bindings(inputs, new, self._caches, self._num_outputs, results[0].device)
        return [values.get(name, result) for name, result in zip(self._results, results, strict=True)]

    def _of(self, values: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The step of ``values``, each as a storage of its own: torch.compile takes no views of one memory."""
        return self._run(*map(from_dlpack, values.values()))

    def _plainly(self, placed: Placement) -> None:
        for name, result in zip(self._results, self._of(placed.inputs), strict=True):
            if name in placed.outputs:
                placed.outputs[name].copy_(result)

    def _recorded(self, placed: Placement, recorder: Recorder) -> Work | None:
        """A recording of the step on these addresses; None where it cannot be recorded, which then stays so."""
        try:
            replay = recorder.record(partial(self._plainly, placed))
            if not self._checked:
                self._check(placed, replay)
                self._checked = True
            return replay
        except RuntimeError as error:
            _LOG.warning("A step runs without CUDA graphs, launch by launch: %s", error)
            self._records = False
            return None

    def _check(self, placed: Placement, replay: Work) -> None:
        """Raise a RuntimeError unless ``replay`` gives what the step itself does, up to what other kernels may round."""
        self._plainly(placed)
        expected = {name: result.clone() for name, result in placed.outputs.items()}
        for result in placed.outputs.values():
            result.zero_()
        replay()
        for name, wanted in expected.items():
            difference = (placed.outputs[name].double() - wanted.double()).norm()
            if not bool(difference <= _ROUNDING * wanted.double().norm()):
                raise RuntimeError(f"{name} of a replay is not what the step gives")
