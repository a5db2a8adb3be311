"""TensorRT engines on torch's own memory: tensors bound by address, one stream and one scratch memory for all engines of a bundle.

    caller's stream ──wait──▶ workspace stream: own inputs into place ▶ enqueue or CUDA graph ▶ own outputs out ──wait──▶ caller's stream

Every return value is checked, since TensorRT throws nothing, and a step that fails has changed nothing that a later one reads.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.errors import ExportError
from tokencache_compile.export.buffers import Bindings, Placement, Recordings, SharedMemory
from tokencache_compile.export.tensorrt_build import compare_tables, logger_of, made, write_beside
from tokencache_compile.export.tensorrt_flavour import EngineTarget, Flavour, current_capability, load_flavour
from tokencache_compile.ir import StepIO, TensorSpec

_LOG = logging.getLogger(__name__)


class Workspace:
    """What the engines of one bundle share: their stream, on which they run one after the other, and their scratch memory.

    Raises:
        ExportError: ``device`` is no CUDA device, or there is none.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        device = torch.device(device)
        if device.type != "cuda":
            raise ExportError(f"device={str(device)!r} was asked for; TensorRT engines run on CUDA devices.")
        self.capability = current_capability(device)
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream(self.device)
        with self.entered():
            self.memory = SharedMemory(self.device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """With the device and the stream as torch's current ones."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield


def check_target(target: EngineTarget, capability: str) -> Flavour:
    """The flavour that runs an engine of ``target`` on a GPU of ``capability`` ("SM89").

    Raises:
        ExportError: it is not installed, is another release than the engine's, or the engine was built for other GPUs.
    """
    flavour = load_flavour(target.flavour)
    if flavour.version != target.version:
        raise ExportError(
            f"the engine was built with {target.flavour} {target.version}, and {flavour.version} is installed: no release reads "
            f"another's engines. Build it again, or pip install {flavour.pip_name}=={target.version}."
        )
    if capability not in target.compute_capabilities:
        raise ExportError(
            f"the engine was built for {', '.join(target.compute_capabilities)}, and this GPU is {capability}. Build it again for that."
        )
    return flavour


class TensorRTSession:
    """An engine, as a :class:`tokencache_compile.export.session.Session`.

    Results are in the order of the stream that is current where :meth:`run` is called. Threads take turns.

    Args:
        engine: the serialized engine, or its file.
        io: the step's inputs and outputs.
        caches: names of the inputs that are caches: they are read where they lie.
        target: what the engine was built with and for.
        workspace: shared by all engines of a dispatcher.
        weights_from: the ONNX file of an engine that was built ``refittable``.
        runtime_cache: a file that keeps the kernels which loading compiles (``tensorrt_rtx`` only); engines may share it.
        graphs: how many CUDA graphs to keep; 0 for none.

    Raises:
        ExportError: the engine cannot run here, or is not the step's.
    """

    def __init__(
        self,
        engine: bytes | memoryview | str | os.PathLike[str],
        io: StepIO,
        caches: Collection[str],
        target: EngineTarget,
        workspace: Workspace,
        *,
        weights_from: str | os.PathLike[str] | None = None,
        runtime_cache: str | os.PathLike[str] | None = None,
        graphs: int = 64,
    ) -> None:
        self.io, self.workspace = io, workspace
        self._flavour = flavour = check_target(target, workspace.capability)
        self._log = log = logger_of(flavour)
        with workspace.lock, workspace.entered():
            self._runtime = flavour.module.Runtime(log)
            with _readable(engine) as data:
                self._engine = self._made(self._runtime.deserialize_cuda_engine(data), "the engine cannot be loaded")
            self._check_table()
            if weights_from is not None:
                self._refit(Path(weights_from))
            self._context = self._create_context(Path(runtime_cache) if runtime_cache is not None else None)
            workspace.memory.reserve(self._engine.device_memory_size_v2)
            self._bindings = Bindings(io.inputs, io.outputs, caches, io.num_outputs, workspace.device)
        self._memory_at: int | None = None
        self._recordings = Recordings(graphs)
        self._records = graphs > 0

    @torch.no_grad()
    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Session`.

        Raises:
            InputError: a value is missing or not what the engine was built for.
            ExportError: TensorRT refuses to run.
        """
        self._bindings.check(values)
        caller = torch.cuda.current_stream(self.workspace.device)
        copies = self._bindings.empty_copies()
        with self.workspace.lock:
            self.workspace.stream.wait_stream(caller)
            try:
                with self.workspace.entered():
                    placed = self._bindings.place(values, lane=caller.cuda_stream)
                    self._execute(placed)
                    return placed.results(copies)
            finally:
                caller.wait_stream(self.workspace.stream)

    def _execute(self, placed: Placement) -> None:
        memory = self.workspace.memory
        if memory.address != self._memory_at:  # another engine made it grow
            self._recordings.clear()
            self._log.errors.clear()
            self._context.set_device_memory(memory.address, memory.nbytes)
            if self._log.errors:
                raise ExportError(f"{self._flavour.name} does not take {memory.nbytes} bytes of scratch memory: {self._log.words()}")
            self._memory_at = memory.address
        if self._records:
            self._recordings.run(placed.addresses, partial(self._enqueue, placed), partial(self._record, placed))
        else:
            self._enqueue(placed)

    def _enqueue(self, placed: Placement) -> None:
        self._bind(placed)
        if not self._context.execute_async_v3(self.workspace.stream.cuda_stream):
            raise ExportError(f"{self._flavour.name} does not run the {self.io.kind}-step: {self._log.words()}")

    def _bind(self, placed: Placement) -> None:
        for name, tensor in (placed.inputs | placed.outputs).items():
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise ExportError(f"{self._flavour.name} does not take an address for {name}: {self._log.words()}")

    def _record(self, placed: Placement) -> Callable[[], None] | None:
        """A CUDA graph of the step on these addresses; None where the engine cannot be captured, which then stays so."""
        self._bind(placed)
        try:
            return self._capture().replay
        except RuntimeError as error:
            _LOG.warning("The %s-step runs without CUDA graphs: %s", self.io.kind, error)
            self._records = False
            return None

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = self.workspace.stream.cuda_stream
        if hasattr(self._context, "is_stream_capturable") and not self._context.is_stream_capturable(stream):
            raise RuntimeError("the engine says that it cannot be captured")
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")  # other threads go on allocating
        try:
            enqueued = self._context.execute_async_v3(stream)
        finally:
            graph.capture_end()
        if not enqueued:
            raise RuntimeError(self._log.words())
        return graph

    def _check_table(self) -> None:
        """Raise an ExportError unless the engine's inputs and outputs are the step's, on the device, in torch's own layout."""
        trt, engine = self._flavour.module, self._engine
        found: dict[Any, list[TensorSpec]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            dtype = self._flavour.dtype(engine.get_tensor_dtype(name))
            on_device = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
            if dtype is None or not on_device or engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
                raise ExportError(f"the engine wants {name} in a form that torch has not: {engine.get_tensor_format_desc(name)}")
            found[engine.get_tensor_mode(name)].append(TensorSpec(name, tuple(engine.get_tensor_shape(name)), dtype))
        compare_tables("inputs", found[trt.TensorIOMode.INPUT], self.io.inputs, "the engine")
        compare_tables("outputs", found[trt.TensorIOMode.OUTPUT], self.io.outputs, "the engine")

    def _refit(self, path: Path) -> None:
        """Read the weights that were left out of the engine from those beside its ONNX file."""
        trt = self._flavour.module
        refitter = trt.Refitter(self._engine, self._log)
        parser = trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(path)) or not refitter.refit_cuda_engine():
            said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            missing = [f"{name} is missing" for name in refitter.get_missing_weights()]
            raise ExportError(f"the engine's weights cannot be read from {path}: {'; '.join(said + missing) or self._log.words()}")

    def _create_context(self, runtime_cache: Path | None) -> Any:
        trt = self._flavour.module
        own_memory = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if runtime_cache is None:
            return self._made(self._engine.create_execution_context(own_memory), "no execution context could be created")
        if not self._flavour.has_runtime_cache:
            raise ExportError(f"{self._flavour.name} compiles nothing when an engine is loaded; leave runtime_cache out.")
        config = self._made(self._engine.create_runtime_config(), "no runtime configuration could be created")
        cache = self._made(config.create_runtime_cache(), "no runtime cache could be created")
        if runtime_cache.exists() and not cache.deserialize(runtime_cache.read_bytes()):
            _LOG.warning("%s is of another GPU, driver or version, and is written anew.", runtime_cache)
            self._log.errors.clear()
        if not config.set_runtime_cache(cache):
            raise ExportError(f"{self._flavour.name} does not take the runtime cache: {self._log.words()}")
        config.set_execution_context_allocation_strategy(own_memory)
        context = self._made(self._engine.create_execution_context(config), "no execution context could be created")
        write_beside(runtime_cache, self._made(cache.serialize(), "the runtime cache cannot be written"))
        return context

    def _made(self, value: Any, failure: str) -> Any:
        return made(value, self._log, f"{self._flavour.name} {self._flavour.version}: {failure}")


@contextmanager
def _readable(engine: bytes | memoryview | str | os.PathLike[str]) -> Iterator[Any]:
    """The bytes of an engine; a file is mapped, not read."""
    if isinstance(engine, bytes | memoryview):
        yield engine
        return
    try:
        with open(engine, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ExportError(f"the engine {os.fspath(engine)} cannot be read: {error}") from error
