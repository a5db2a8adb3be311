"""TensorRT engines from ONNX, ahead of time: with ``tensorrt_rtx`` for GPUs that need not be here.

    step.onnx ──parse──▶ network, its I/O table compared with the step's ──build──▶ BuiltEngine

TensorRT throws nothing: it returns None or False and writes to its logger. Here each of those becomes an ExportError in its own words.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tokencache_compile.errors import ExportError
from tokencache_compile.export.tensorrt_flavour import IO_DTYPES, TOPK_LIMIT, EngineTarget, Flavour, current_capability, load_flavour
from tokencache_compile.ir import StepIO, TensorSpec

_LOG = logging.getLogger(__name__)
_PARSING = "Parsing node: "

Progress = Callable[[str, int, int], None]
"""``(phase, steps done, steps in all)``; phases follow each other and may repeat."""


@dataclass(frozen=True)
class TensorRTSettings:
    """How engines are built.

    Attributes:
        flavour: "tensorrt" or "tensorrt_rtx"; None takes what is installed.
        compute_capabilities: GPUs to build for, such as ("SM80", "SM89"), all in one engine; None is the GPU of this machine.
            Only ``tensorrt_rtx`` builds for others.
        workspace: bytes of scratch memory a kernel may use; None leaves it to TensorRT.
        timing_cache: a file that keeps the timings of kernels between builds (``tensorrt`` only).
        refittable: leave the weights out of the engine, so that I- and P-engines share those beside the ONNX files; loading
            an engine then reads them. Needs a GPU to build.
    """

    flavour: str | None = None
    compute_capabilities: tuple[str, ...] | None = None
    workspace: int | None = None
    timing_cache: str | os.PathLike[str] | None = None
    refittable: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine.

    Attributes:
        data: the bytes to write to a file; TensorRT's own memory, not copied.
        target: what it runs with and on.
        refittable: whether its weights were left out.
        seconds: that parsing and building took.
        inputs, outputs: as the network has them.
    """

    data: memoryview
    target: EngineTarget
    refittable: bool
    seconds: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def check_limits(io: StepIO, flavour: Flavour) -> None:
    """Refuse what no engine can do, before the time is spent on finding out.

    Raises:
        ExportError: the graph selects more tokens than TensorRT's TopK takes, or a dtype is not one of an engine's.
    """
    if io.kind == "P" and io.next_caches and not io.selects:  # a graph of scores, which selects nothing, has no caches
        over = [f"block {block} keeps {kept}" for block, kept in enumerate(io.keep) if kept > TOPK_LIMIT]
        if over:
            raise ExportError(
                f"{', '.join(over)} tokens, and {flavour.name}'s TopK takes at most {TOPK_LIMIT}. "
                'Pass selection="host", which selects them outside the engine, or a higher ratio.'
            )
    odd = [f"{spec.name} ({spec.dtype})" for spec in (*io.inputs, *io.outputs) if spec.dtype not in IO_DTYPES]
    if odd:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in IO_DTYPES)
        raise ExportError(f"{', '.join(odd)}: {flavour.name} has no such dtype for inputs and outputs; it has {known}.")


def build_engine(
    onnx_path: str | os.PathLike[str],
    io_inputs: Sequence[TensorSpec],
    io_outputs: Sequence[TensorSpec],
    settings: TensorRTSettings,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Parse an ONNX file (its external weights lie beside it) and build its engine.

    Args:
        io_inputs, io_outputs: what the network must have, by name.
        progress: told of every step; :func:`progress_bar` gives one that draws.

    Raises:
        ExportError: a setting the flavour does not have, no such file, an operator it does not know, an I/O table other than
            the one asked for, or a build that fails.
    """
    flavour = load_flavour(settings.flavour)
    targets = _targets(flavour, settings)
    path = Path(onnx_path)
    start = time.perf_counter()
    trt, log = flavour.module, logger_of(flavour)
    builder = made(trt.Builder(log), log, "no builder could be created")
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = made(builder.create_network(0 if flag is None else 1 << int(flag)), log, "no network could be created")
    _parse(flavour, network, log, path)
    inputs = tuple(_spec(flavour, network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(_spec(flavour, network.get_output(i)) for i in range(network.num_outputs))
    compare_tables("inputs", inputs, io_inputs, str(path))
    compare_tables("outputs", outputs, io_outputs, str(path))
    config = made(builder.create_builder_config(), log, "no builder configuration could be created")
    _configure(flavour, config, settings, log)
    monitor = _make_monitor(flavour, progress) if progress is not None else None
    config.progress_monitor = monitor
    data = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.error is not None:
        raise monitor.error
    if data is None:
        hint = " Leaving the weights out needs a GPU here: build without refittable." if settings.refittable else ""
        raise ExportError(f"{flavour.name} {flavour.version} does not build {path} for {', '.join(targets)}: {log.words()}{hint}")
    _save_timing_cache(config, settings, log)
    target = EngineTarget(flavour.name, flavour.version, targets)
    return BuiltEngine(memoryview(data), target, settings.refittable, time.perf_counter() - start, inputs, outputs)


def _targets(flavour: Flavour, settings: TensorRTSettings) -> tuple[str, ...]:
    """Names of the GPUs to build for, after checking the settings against the flavour."""
    if settings.timing_cache is not None and not flavour.has_timing_cache:
        raise ExportError(f"{flavour.name} times no kernels and has no timing cache; leave timing_cache out.")
    if settings.workspace is not None and settings.workspace < 1:
        raise ExportError(f"workspace={settings.workspace} was asked for; it is a number of bytes, or None.")
    named = settings.compute_capabilities
    if named is None:
        try:
            return (current_capability(),)
        except ExportError as error:
            known = ", ".join(flavour.capabilities)
            remedy = f"Name compute_capabilities, of {known}." if known else "Build where the GPU is, or with tensorrt_rtx."
            raise ExportError(f"an engine was to be built for the GPU of this machine. {error} {remedy}") from error
    if not flavour.capabilities:
        raise ExportError(
            f"compute_capabilities={named} was asked for; {flavour.name} builds for the GPU at hand only. "
            "Leave it out, or use tensorrt_rtx."
        )
    unknown = [name for name in named if name not in flavour.capabilities]
    if unknown or not named or len(set(named)) < len(named):
        raise ExportError(
            f"compute_capabilities={named} was asked for; {flavour.name} {flavour.version} builds for {', '.join(flavour.capabilities)}, "
            "each at most once."
        )
    return named


def _parse(flavour: Flavour, network: Any, log: Any, path: Path) -> None:
    if not path.is_file():
        raise ExportError(f"{path} is no file.")
    log.node = ""
    parser = flavour.module.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        found = [_parser_error(parser.get_error(i), log) for i in range(parser.num_errors)]
        raise ExportError(f"{flavour.name} {flavour.version} does not take {path}: {'; '.join(found) or log.words()}")


def _parser_error(error: Any, log: Any) -> str:
    """What the parser says, and of which node; where it names none, it is the one whose parsing was announced last."""
    node = f"{error.node_name()} [{error.node_operator()}]" if error.node_operator() else log.node
    return f"{node}: {error.desc()}" if node else str(error.desc())


def _spec(flavour: Flavour, tensor: Any) -> TensorSpec:
    dtype = flavour.dtype(tensor.dtype)
    if dtype is None:
        raise ExportError(f"{tensor.name} is {tensor.dtype}, for which torch has no name.")
    return TensorSpec(tensor.name, tuple(tensor.shape), dtype)


def compare_tables(what: str, found: Sequence[TensorSpec], expected: Sequence[TensorSpec], where: str) -> None:
    """Raise an ExportError unless both have the same names, each with the same shape and dtype; the order is free."""
    have, want = ({spec.name: f"{spec.dtype} {list(spec.shape)}".removeprefix("torch.") for spec in specs} for specs in (found, expected))
    differing = [name for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]
    if differing:
        lines = (f"{name} (found: {have.get(name, 'none')}, expected: {want.get(name, 'none')})" for name in differing)
        raise ExportError(f"{where} has other {what} than the step: {'; '.join(lines)}.")


def _configure(flavour: Flavour, config: Any, settings: TensorRTSettings, log: Any) -> None:
    trt = flavour.module
    if flavour.capabilities:
        names = settings.compute_capabilities or ("CURRENT",)
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), index):
                raise ExportError(f"{flavour.name} {flavour.version} does not build for {name}: {log.words()}")
    # TensorRT-RTX allocates at run time otherwise, which no CUDA graph can capture.
    flags = [trt.BuilderFlag.REQUIRE_USER_ALLOCATION] if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") else []
    if settings.refittable:
        flags += [trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.REFIT_IDENTICAL]
    for flag in flags:
        config.set_flag(flag)
    if torch.get_float32_matmul_precision() == "highest":  # TF32 where torch would use it, and nowhere else
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.workspace is not None:
        pool = trt.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, settings.workspace)
        if config.get_memory_pool_limit(pool) != settings.workspace:
            raise ExportError(f"{flavour.name} does not take a workspace of {settings.workspace} bytes: {log.words()}")
    if settings.timing_cache is not None:
        known = Path(settings.timing_cache)
        cache = config.create_timing_cache(known.read_bytes() if known.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise ExportError(f"the timing cache {known} is of another GPU or version, or damaged: {log.words()} Delete it.")


def _save_timing_cache(config: Any, settings: TensorRTSettings, log: Any) -> None:
    if settings.timing_cache is not None:
        cache = made(config.get_timing_cache(), log, "the timing cache is gone")
        write_beside(Path(settings.timing_cache), made(cache.serialize(), log, "the timing cache cannot be written"))


def write_beside(path: Path, data: Any) -> None:
    """Write ``data`` (a buffer) to ``path``, which at every moment is the old file or the new one.

    Raises:
        ExportError: the disk refuses.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ExportError(f"{path} cannot be written: {error}") from error


def made(value: Any, log: Any, failure: str) -> Any:
    """``value``, unless it is the None that TensorRT returns where something failed."""
    if value is None:
        raise ExportError(f"{failure}: {log.words()}")
    return value


def logger_of(flavour: Flavour) -> Any:
    """The process's logger for this flavour, its errors forgotten.

    It keeps errors for ``words()`` and sends warnings to :mod:`logging`; ``node`` is the ONNX node whose parsing was announced last.
    """
    log = _logger(flavour.module)
    log.errors.clear()
    return log


@cache  # TensorRT ignores a second one for as long as anything made with the first is alive
def _logger(trt: Any) -> Any:
    levels = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.node = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            elif severity == levels.WARNING and "Int64 binding" not in message:  # a reminder; sessions check the dtypes
                _LOG.warning("%s: %s", trt.__name__, message)
            elif message.startswith(_PARSING):
                self.node = message.removeprefix(_PARSING)

        def words(self) -> str:
            """The errors so far, and forget them."""
            said = "; ".join(dict.fromkeys(self.errors))
            self.errors.clear()
            return said or "it gave no reason."

    return Log()


def _make_monitor(flavour: Flavour, progress: Progress) -> Any:
    class Monitor(flavour.module.IProgressMonitor):  # type: ignore[name-defined, misc]
        """Hands on what happens; an exception out of ``progress`` (an interrupt) stops the build and is kept in ``error``."""

        def __init__(self) -> None:
            super().__init__()
            self.totals: dict[str, int] = {}
            self.error: BaseException | None = None

        def tell(self, phase: str, done: int) -> None:
            try:
                progress(phase, done, self.totals[phase])
            except BaseException as error:  # it must not travel through TensorRT
                self.error = error

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.totals[phase] = steps
            self.tell(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self.tell(phase, step + 1)
            return self.error is None

        def phase_finish(self, phase: str) -> None:
            self.tell(phase, self.totals[phase])

    return Monitor()


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar in the terminal that shows the phase at hand, for :func:`build_engine`."""
    from rich.progress import Progress as Bar

    with Bar(transient=True) as bar:
        task = bar.add_task(title)

        def show(phase: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {phase}", completed=done, total=total)

        yield show
