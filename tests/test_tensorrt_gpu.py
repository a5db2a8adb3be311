"""Engines on a GPU: built, run over whole generations, compared with the eager model, timed. ``pytest -m gpu`` where both are."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from plain_run import assert_close
from test_tensorrt_session import guided_run
from tiny import build, call_of, conditions, ddim, inputs, same_bits, sample, transformed
from torch import Tensor

import tokencache_compile
from tokencache_compile import runtime
from tokencache_compile.errors import ExportError, InputError
from tokencache_compile.export.graphs import write_graphs
from tokencache_compile.export.session import SessionEngine
from tokencache_compile.export.tensorrt_build import TensorRTSettings, build_engine, check_limits
from tokencache_compile.export.tensorrt_flavour import current_capability, load_flavour
from tokencache_compile.export.tensorrt_session import TensorRTSession, Workspace
from tokencache_compile.passes.engine_graph import SelectionPlace, engine_graphs

pytestmark = pytest.mark.gpu
RANDOM: dict[str, Any] = {"scorer": "random", "context": "reuse"}


@pytest.fixture(scope="module")
def settings() -> TensorRTSettings:
    """The TensorRT that is installed and builds for this GPU."""
    try:
        flavour = load_flavour()
    except ExportError as error:
        pytest.skip(str(error))
    if flavour.capabilities and current_capability() not in flavour.capabilities:
        pytest.skip(f"{flavour.name} builds for {', '.join(flavour.capabilities)}; this GPU is {current_capability()}")
    return TensorRTSettings(flavour.name)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32 in torch, and so none in engines."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_sessions(steps: Any, selection: SelectionPlace, settings: TensorRTSettings, folder: Path, **options: Any) -> list[SessionEngine]:
    """The engines of ``steps``, built in ``folder`` and loaded on one workspace."""
    caches, workspace, engines = [cache.name for cache in steps.caches], Workspace(), []
    graphs = engine_graphs(steps, ["sample"], selection)
    for graph in graphs:
        check_limits(graph.io, load_flavour(settings.flavour))

    def session(entry: Any) -> TensorRTSession:
        path = folder / f"{entry.name}.onnx"
        built = build_engine(path, entry.io.inputs, entry.io.outputs, settings)
        weights = path if built.refittable else None
        return TensorRTSession(built.data, entry.io, caches, built.target, workspace, weights_from=weights, **options)

    for entry in write_graphs(graphs, folder):
        engines.append(SessionEngine(entry.graph.io, session(entry.graph), session(entry.scores) if entry.scores is not None else None))
    return engines


def on_engines(
    model: Any,
    settings: TensorRTSettings,
    folder: Path,
    selection: SelectionPlace = "graph",
    plan: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A dispatcher of ``model`` on TensorRT engines, ready for the signature of the tiny models."""
    kind = "dit" if isinstance(model, DiTTransformer2DModel) else "pixart"
    dispatcher = transformed(model, **plan or RANDOM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "make_engines", lambda backend, steps: make_sessions(steps, selection, settings, folder, **options))
        dispatcher.prepare(on_gpu(inputs(kind, dtype=model.dtype)))
    return dispatcher


def on_gpu(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("cuda") for name, value in values.items()}


def run(model: Any, kind: str, dtype: torch.dtype = torch.float32, seed: int = 2) -> list[Tensor]:
    call = call_of(model, on_gpu(conditions(kind, dtype=dtype)))
    return ddim(lambda step, x, t: call(step, x, t.to("cuda")), sample(seed=seed, dtype=dtype).to("cuda"), steps=20)


def run_engines(dispatcher: Any, kind: str, dtype: torch.dtype = torch.float32, seed: int = 2) -> list[Tensor]:
    """As :func:`run`, by engines and nothing else."""
    outputs = run(dispatcher, kind, dtype, seed)
    assert len(dispatcher._compiled) == 1 and isinstance(dispatcher.captured().full, SessionEngine)
    return outputs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 3e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_whole_runs(kind: str, dtype: torch.dtype, tolerance: float, settings: TensorRTSettings, tmp_path: Path) -> None:
    """As eager steps of the same plan, at every step; the second run, by CUDA graphs, as the first, bit for bit."""
    model = build(kind).to("cuda", dtype)
    dispatcher = on_engines(model, settings, tmp_path)
    first = run_engines(dispatcher, kind, dtype)
    assert_close(first, run(transformed(model, **RANDOM), kind, dtype), tolerance=tolerance)
    assert same_bits(run(dispatcher, kind, dtype), first)
    summary = dispatcher.summary()
    assert (summary.full_steps, summary.cached_steps) == (5, 15)


def test_selection_on_the_host(settings: TensorRTSettings, tmp_path: Path) -> None:
    plan = {"scorer": "change", "context": "cached", "history": "computed"}
    model = build("dit").to("cuda")
    found = run_engines(on_engines(model, settings, tmp_path, "host", plan), "dit")
    assert_close(found, run(transformed(model, **plan), "dit"), tolerance=1e-3)


def test_with_and_without_graphs(settings: TensorRTSettings, tmp_path: Path) -> None:
    model = build("dit").to("cuda")
    plain, recorded = (on_engines(model, settings, tmp_path, graphs=count) for count in (0, 64))
    for seed in (2, 3, 2):
        assert same_bits(run_engines(plain, "dit", seed=seed), run_engines(recorded, "dit", seed=seed))


def test_threads_on_their_own_streams(settings: TensorRTSettings, tmp_path: Path) -> None:
    """Two branches in each of two threads: as one thread alone, bit for bit."""
    dispatcher = on_engines(build("dit").to("cuda"), settings, tmp_path)

    def alone(seed: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = guided_run(dispatcher, seed, steps=20, device="cuda")
            torch.cuda.current_stream().synchronize()
            return outputs

    expected = [alone(seed) for seed in (3, 4)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(alone, (3, 4)))
    assert same_bits(found[0], expected[0]) and same_bits(found[1], expected[1])


def test_weights_beside_the_engines(settings: TensorRTSettings, tmp_path: Path) -> None:
    """Engines without weights are small and, refitted from the ONNX files, right."""
    model = build("dit").to("cuda")
    found = run_engines(on_engines(model, replace(settings, refittable=True), tmp_path), "dit")
    assert_close(found, run(transformed(model, **RANDOM), "dit"), tolerance=1e-3)


def test_runtime_cache(settings: TensorRTSettings, tmp_path: Path) -> None:
    if not load_flavour(settings.flavour).has_runtime_cache:
        pytest.skip("this flavour has none")
    kernels, model = tmp_path / "kernels", build("dit").to("cuda")
    first = run_engines(on_engines(model, settings, tmp_path, runtime_cache=kernels), "dit")
    assert kernels.stat().st_size > 0
    assert same_bits(run_engines(on_engines(model, settings, tmp_path, runtime_cache=kernels), "dit"), first)


def test_what_is_refused(settings: TensorRTSettings, tmp_path: Path) -> None:
    """A damaged engine, another step's, and wrong values; the next good call works."""
    steps = transformed(build("dit").to("cuda"), example_inputs=on_gpu(inputs("dit")), **RANDOM).steps
    engine = make_sessions(steps, "graph", settings, tmp_path)[0]
    io, caches = engine.io, [cache.name for cache in steps.caches]
    built = build_engine(tmp_path / "full.onnx", io.inputs, io.outputs, settings)
    with pytest.raises(ExportError, match="the engine cannot be loaded"):
        TensorRTSession(bytes(built.data)[:1000], io, caches, built.target, Workspace())
    with pytest.raises(ExportError, match="the engine has other outputs than the step"):
        TensorRTSession(built.data, replace(io, outputs=io.outputs[1:]), caches, built.target, Workspace())
    values = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype, device="cuda") for spec in io.inputs}
    session = TensorRTSession(built.data, io, caches, built.target, Workspace())
    with pytest.raises(InputError, match=r"hidden_states is .* on cpu"):
        session.run(values | {"hidden_states": values["hidden_states"].cpu()})
    assert all(bool(result.isfinite().all()) for result in session.run(values).values() if result.is_floating_point())


def milliseconds(call: Callable[[], Any], times: int = 50) -> float:
    """Mean time of a call on the GPU, after 5 to warm up."""
    for _ in range(5):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    total: float = begin.elapsed_time(end)
    return total / times


def test_latency(settings: TensorRTSettings, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The reference DiT, float16, batch 2: an I- and a P-step as engines and in eager mode, in milliseconds."""
    reference = str(importlib.resources.files(tokencache_compile) / "reference" / "dit")
    model = DiTTransformer2DModel.from_pretrained(reference, torch_dtype=torch.float16).eval().to("cuda")
    example = {"hidden_states": torch.randn(2, 1, 32, 32), "timestep": torch.full((2,), 500), "class_labels": torch.tensor([1, 10])}
    example["hidden_states"] = example["hidden_states"].half()
    device = torch.device("cuda")
    captured = tokencache_compile.transform(model, ratio=0.9, backend="eager", example_inputs=on_gpu(example)).captured()
    steps, given = captured.steps, list(on_gpu(example).values())
    sessions = make_sessions(steps, "graph", settings, tmp_path)
    for name, eager, session in zip("IP", (captured.full, captured.cached[0]), sessions, strict=True):
        values = given, steps.step_inputs(1, device), steps.initial_caches(device)
        for how, engine in (("eager", eager), ("engine", session)):
            time = milliseconds(partial(engine, *values))
            record_property(f"{name}_{how}_ms", time)
            print(f"{name}-step, {how}: {time:.3f} ms on {torch.cuda.get_device_name()}")
            assert time > 0
