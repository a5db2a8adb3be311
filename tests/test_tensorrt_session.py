"""How engines are run, as far as it shows without a GPU: where their tensors lie, what comes back, what is refused."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny import build, conditions, same_bits, sample, sampler, transformed
from torch import Tensor

from tokencache_compile import runtime
from tokencache_compile.errors import ExportError, InputError
from tokencache_compile.export.buffers import ALIGNMENT, Bindings, OutputBuffers, Recordings, SharedMemory, carve, carved_size
from tokencache_compile.export.session import Session, SessionEngine
from tokencache_compile.export.tensorrt_flavour import EngineTarget, load_flavour
from tokencache_compile.export.tensorrt_session import Workspace, check_target
from tokencache_compile.ir import EngineGraph, TensorSpec
from tokencache_compile.passes.engine_graph import SelectionPlace, engine_graphs

CPU = torch.device("cpu")
SPECS = (TensorSpec("a", (3, 5), torch.bfloat16), TensorSpec("b", (), torch.float32), TensorSpec("c", (70,), torch.int64))
Table = tuple[int, ...]


# -- whole runs on addresses ------------------------------------------------------------------------------------------


class PlainSession:
    """Runs a graph in torch; every result is a new tensor."""

    def __init__(self, graph: EngineGraph, caches: Sequence[str]) -> None:
        self.graph = graph

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            results = self.graph.module(*(values[spec.name] for spec in self.graph.io.inputs))
        return {spec.name: result.clone() for spec, result in zip(self.graph.io.outputs, results, strict=True)}


class AddressSession:
    """Runs a graph as an engine is run: on a table of addresses and nothing else, by recordings from its second time on."""

    def __init__(self, graph: EngineGraph, caches: Sequence[str]) -> None:
        self.graph, self.lock = graph, threading.Lock()
        self.bindings = Bindings(graph.io.inputs, graph.io.outputs, caches, graph.io.num_outputs, CPU)
        self.recordings = Recordings(64)
        self.tables: dict[int, list[Table]] = {}
        self.replays = 0

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.bindings.check(values)
        copies = self.bindings.empty_copies()
        with self.lock:
            placed = self.bindings.place(values)
            self._note(placed.addresses)
            self.recordings.run(placed.addresses, partial(self._execute, placed.addresses), partial(self._record, placed.addresses))
            return placed.results(copies)

    def _note(self, table: Table) -> None:
        """Everything aligned, and no output where an input lies, or another output."""
        assert not any(address % ALIGNMENT for address in table)
        regions = [(address, address + spec.nbytes) for address, spec in zip(table, self._specs, strict=True)]
        for index, (begin, end) in enumerate(regions[len(self.graph.io.inputs) :], len(self.graph.io.inputs)):
            assert all(end <= other or until <= begin for at, (other, until) in enumerate(regions) if at != index)
        self.tables.setdefault(threading.get_ident(), []).append(table)

    @property
    def _specs(self) -> tuple[TensorSpec, ...]:
        return (*self.graph.io.inputs, *self.graph.io.outputs)

    def _execute(self, table: Table) -> None:
        tensors = [at_address(address, spec) for address, spec in zip(table, self._specs, strict=True)]
        count = len(self.graph.io.inputs)
        with torch.no_grad():
            for place, result in zip(tensors[count:], self.graph.module(*tensors[:count]), strict=True):
                place.copy_(result)

    def _record(self, table: Table) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            self._execute(table)

        return replay


def at_address(address: int, spec: TensorSpec) -> Tensor:
    """A tensor over foreign memory, as an engine sees it: it keeps nothing alive."""
    memory = (ctypes.c_uint8 * spec.nbytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(spec.dtype).view(spec.shape)


def run_on(session: Callable[[EngineGraph, Sequence[str]], Any], selection: SelectionPlace, **settings: Any) -> tuple[Any, list[Any]]:
    """A dispatcher of a DiT whose engines are sessions, and those of its steps."""
    made: list[Any] = []

    def make_engines(backend: str, steps: Any) -> list[SessionEngine]:
        caches, engines = [cache.name for cache in steps.caches], []
        for graph in engine_graphs(steps, ["sample"], selection):
            made.append(session(graph, caches))
            scores: Session | None = session(graph.scores, caches) if graph.scores is not None else None
            engines.append(SessionEngine(graph.io, made[-1], scores))
        return engines

    dispatcher = transformed(build("dit", layers=3), **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "make_engines", make_engines)
        given = conditions("dit")
        dispatcher.prepare({"hidden_states": sample(), "timestep": torch.full((len(sample()),), 5), **given})
    return dispatcher, made


def guided_run(dispatcher: Any, seed: int, steps: int = 50, device: str = "cpu") -> list[Tensor]:
    """A DDIM run with two guidance branches; all outputs are kept, and the sample it ends with."""
    scheduler, x, outputs = sampler(steps), sample(seed=seed).to(device), []
    labels = {"cond": torch.arange(len(x), device=device) + seed, "uncond": torch.zeros(len(x), dtype=torch.int64, device=device)}
    for t in scheduler.timesteps.tolist():
        timestep = torch.full((len(x),), t, device=device)
        for branch, given in labels.items():
            with dispatcher.cache_context(branch), torch.no_grad():
                outputs.append(dispatcher(x, timestep=timestep, class_labels=given, return_dict=False)[0])
        noise = outputs[-1] + 2.0 * (outputs[-2] - outputs[-1])
        x = scheduler.step(noise[:, :4], t, x).prev_sample
    return [*outputs, x]


@pytest.mark.parametrize(
    ("selection", "settings", "bounds"),
    [
        # Caches of forecast + 1 I-steps are alive in each of two branches, and one more set is written to: 2 · 3 + 1 sets in turn.
        ("graph", {"context": "reuse", "scorer": "random"}, {"I": 7, "P": 7}),
        # The P-step writes keys and values too: any of 5 sets with any of 5 such.
        ("host", {"context": "cached", "scorer": "change", "forecast": 1}, {"I": 5, "P": 25}),
        # Every step writes all caches, and reads those of the step before.
        ("graph", {"context": "cached", "scorer": "change", "history": "computed"}, {"I": 4, "P": 8}),
    ],
)
def test_whole_runs_on_addresses(selection: SelectionPlace, settings: dict[str, Any], bounds: dict[str, int]) -> None:
    """Two threads with two branches each: bit for bit what new memory at every step gives, on few binding tables."""
    plain, _ = run_on(PlainSession, selection, **settings)
    expected = [guided_run(plain, seed) for seed in (3, 4)]
    dispatcher, sessions = run_on(AddressSession, selection, **settings)
    for session in sessions:
        session.tables.clear()
    meet = threading.Barrier(2)

    def work(seed: int) -> list[Tensor]:
        guided_run(dispatcher, seed + 5, steps=8)
        meet.wait()
        return guided_run(dispatcher, seed)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, (3, 4)))
    assert same_bits(found[0], expected[0]) and same_bits(found[1], expected[1])
    for session in sessions:
        assert len(session.tables) == 2
        steady = [tables[-len(tables) // 2 :] for tables in session.tables.values()]
        assert all(len({*tables}) <= bounds[session.graph.io.kind] for tables in steady)
        assert session.replays > sum(map(len, steady)) / 2


def test_an_output_is_still_there_when_all_is_over() -> None:
    """The model's own outputs are the caller's to keep; caches are reused only when nothing reads them."""
    bindings = Bindings((TensorSpec("x", (4,), torch.float32),), (replace(SPECS[0], name="y"), SPECS[2]), (), 1, CPU)
    kept = []
    for step in range(5):
        placed = bindings.place({"x": torch.full((4,), float(step))})
        assert torch.equal(placed.inputs["x"], torch.full((4,), float(step)))
        placed.outputs["y"].fill_(step)
        kept.append(placed.results(bindings.empty_copies()))
        kept[-1].pop("c")
        del placed
    assert [int(result["y"][0, 0]) for result in kept] == [0, 1, 2, 3, 4] and bindings.buffers.count() == 1


# -- buffers ----------------------------------------------------------------------------------------------------------


def test_carving() -> None:
    """Aligned, contiguous, of the right shape and dtype, none in another."""
    tensors = list(carve(torch.zeros(carved_size(SPECS), dtype=torch.uint8), SPECS).values())
    assert [(t.shape, t.dtype) for t in tensors] == [(torch.Size(s.shape), s.dtype) for s in SPECS]
    offsets = [t.data_ptr() - tensors[0].data_ptr() for t in tensors]
    assert offsets == [0, 256, 512] and carved_size(SPECS) == 512 + 768 and all(t.is_contiguous() for t in tensors)


def test_a_set_is_free_when_nothing_looks_at_it() -> None:
    """Views of what was handed out count, whatever became of the tensor itself, also in inference mode."""
    buffers = OutputBuffers(SPECS, CPU)
    first = buffers.take()
    address = first["a"].data_ptr()
    assert buffers.take()["a"].data_ptr() != address  # and this second set is free at once
    views: list[Tensor] = [first["c"][1:].detach()]
    with torch.inference_mode():
        views.append(first["a"].view(15)[3:4])
    del first
    for _ in range(2):
        assert buffers.take()["a"].data_ptr() != address
        views.pop()
    assert buffers.take()["a"].data_ptr() == address and buffers.count() == 2


def test_threads_and_lanes_have_their_own_sets() -> None:
    buffers = OutputBuffers(SPECS, CPU)
    address = buffers.take()["a"].data_ptr()
    held = buffers.take(lane=7)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(buffers.take).result()
        assert pool.submit(buffers.count).result() == 1
    other["a"].fill_(3)  # outlives its thread
    assert len({address, held["a"].data_ptr(), other["a"].data_ptr()}) == 3
    assert (buffers.count(), buffers.count(lane=7)) == (1, 1) and bool((other["a"] == 3).all())


def test_nothing_to_hand_out() -> None:
    assert OutputBuffers((), CPU).take() == {}


def test_shared_memory_is_as_large_as_the_largest() -> None:
    memory = SharedMemory(CPU)
    sizes = []
    for wanted in (1000, 10, 5000, 5000):
        memory.reserve(wanted)
        sizes.append((memory.nbytes, memory.address % ALIGNMENT))
    assert sizes == [(1024, 0), (1024, 0), (5120, 0), (5120, 0)]


def test_recordings() -> None:
    """Plainly first, recorded at the second time, replayed from then on; the least recently used goes; those of once do not push out."""
    done: list[str] = []

    def record(name: str) -> Callable[[], None]:
        done.append(f"record {name}")
        return partial(done.append, f"replay {name}")

    def run(recordings: Recordings, *numbers: int) -> list[str]:
        done.clear()
        for n in numbers:
            recordings.run((n,), partial(done.append, f"plain {n}"), partial(record, str(n)))
        return done

    recordings = Recordings(2)
    assert run(recordings, 1, 1, 1) == ["plain 1", "record 1", "replay 1", "replay 1"]
    assert run(recordings, 2, 3, 4, 5, 1) == ["plain 2", "plain 3", "plain 4", "plain 5", "replay 1"]
    assert run(recordings, 4, 5, 1) == ["record 4", "replay 4", "record 5", "replay 5", "record 1", "replay 1"]
    recordings.clear()
    assert run(recordings, 5) == ["plain 5"]


def test_what_cannot_be_recorded_runs_plainly() -> None:
    done: list[int] = []
    recordings = Recordings(2)
    for _ in range(3):
        recordings.run((1,), partial(done.append, 1), lambda: None)
    assert done == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "cache is missing; x, cache are needed"),
        (lambda t: t.half(), r"cache is \[6, 8\] float16 on cpu; \[6, 8\] float32 on cpu is needed"),
        (lambda t: t[:5], r"cache is \[5, 8\] float32"),
        (lambda t: t.to("meta"), "float32 on meta"),
        (lambda t: t.T.contiguous().T, r"cache is not contiguous \(strides \(1, 6\)\)"),
    ],
)
def test_values_that_are_refused(change: Callable[[Tensor], Tensor | None], message: str) -> None:
    specs = (TensorSpec("x", (), torch.float32), TensorSpec("cache", (6, 8), torch.float32))
    bindings = Bindings(specs, (), ("cache",), 0, CPU)
    bindings.check({"x": torch.zeros(()), "cache": torch.zeros(6, 8), "more": torch.zeros(1)})
    changed = change(torch.zeros(6, 8))
    with pytest.raises(InputError, match=message):
        bindings.check({"x": torch.zeros(())} | ({"cache": changed} if changed is not None else {}))


def test_a_cache_at_an_odd_address_is_moved() -> None:
    spec = TensorSpec("cache", (6,), torch.float32)
    bindings = Bindings((spec,), (), ("cache",), 0, CPU)
    buffers = OutputBuffers((spec,), CPU)
    odd, even = torch.arange(7.0)[1:], buffers.take()["cache"]
    assert bindings.place({"cache": even}).addresses == (even.data_ptr(),)
    moved = bindings.place({"cache": odd}).inputs["cache"]
    assert torch.equal(moved, odd) and moved.data_ptr() % ALIGNMENT == 0 != odd.data_ptr() % ALIGNMENT


# -- engines that do not run here -------------------------------------------------------------------------------------


def test_engines_of_another_release_or_gpu() -> None:
    version = load_flavour("tensorrt_rtx").version
    target = EngineTarget("tensorrt_rtx", version, ("SM80", "SM89"))
    assert check_target(target, "SM89").name == "tensorrt_rtx"
    with pytest.raises(ExportError, match=r"built for SM80, SM89, and this GPU is SM90"):
        check_target(target, "SM90")
    with pytest.raises(
        ExportError, match=rf"built with tensorrt_rtx 1\.2\.0, and {version} is installed.*pip install tensorrt-rtx==1\.2\.0"
    ):
        check_target(replace(target, version="1.2.0"), "SM89")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match="pip install tensorrt"):
        check_target(EngineTarget("tensorrt", "10.3.0", ("SM80",)), "SM80")


def test_no_device() -> None:
    with pytest.raises(ExportError, match="TensorRT engines run on CUDA devices"):
        Workspace("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ExportError, match="finds no CUDA device"):
            Workspace()
