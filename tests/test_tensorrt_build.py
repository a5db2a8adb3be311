"""Real engines, built with tensorrt_rtx on any machine, and what is refused on the way to one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from tiny import build, inputs, transformed

from tokencache_compile.errors import ExportError
from tokencache_compile.export.graphs import write_graphs
from tokencache_compile.export.tensorrt_build import BuiltEngine, TensorRTSettings, build_engine, check_limits
from tokencache_compile.export.tensorrt_flavour import EngineTarget, Flavour, load_flavour
from tokencache_compile.ir import StepIO, TensorSpec
from tokencache_compile.passes.engine_graph import engine_graphs

RTX = TensorRTSettings("tensorrt_rtx", ("SM80", "SM89"))
X, Y = TensorSpec("x", (8, 4), torch.float32), TensorSpec("y", (8, 4), torch.float32)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return load_flavour("tensorrt_rtx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepIO]]:
    """I- and P-step of a small DiT: their folder, and what they read and compute."""
    folder = tmp_path_factory.mktemp("dit")
    dispatcher = transformed(build("dit", layers=2), example_inputs=inputs("dit"))
    return folder, [entry.graph.io for entry in write_graphs(engine_graphs(dispatcher.steps, ["sample"]), folder)]


def model(path: Path, node: Any, specs: Mapping[str, tuple[Any, list[Any]]], **constants: list[int]) -> Path:
    """An ONNX file with one node; ``specs`` are its inputs and outputs as (type, shape)."""
    values = {name: helper.make_tensor_value_info(name, *spec) for name, spec in specs.items()}
    held = [helper.make_tensor(name, TensorProto.INT64, [len(values)], values) for name, values in constants.items()]
    ins, outs = ([values[name] for name in names if name in values] for names in (node.input, node.output))
    graph = helper.make_graph([node], "graph", ins, outs, held)
    made: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(made.SerializeToString())
    return path


def relu(path: Path, batch: int | str = 8) -> Path:
    return model(path, helper.make_node("Relu", ["x"], ["y"]), {n: (TensorProto.FLOAT, [batch, 4]) for n in ("x", "y")})


def build_of(path: Path, settings: TensorRTSettings = RTX) -> BuiltEngine:
    return build_engine(path, (X,), (Y,), settings)


# -- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name", "kind"), [(0, "full", "I"), (1, "cached_0", "P")])
def test_engines_of_both_steps(exported: tuple[Path, list[StepIO]], flavour: Flavour, number: int, name: str, kind: str) -> None:
    """For two GPUs in one engine; the network has the step's own inputs and outputs."""
    folder, steps = exported
    io = steps[number]
    told: list[tuple[str, int, int]] = []
    check_limits(io, flavour)
    engine = build_engine(folder / f"{name}.onnx", io.inputs, io.outputs, RTX, lambda *step: told.append(step))
    assert io.kind == kind and engine.target == EngineTarget("tensorrt_rtx", flavour.version, ("SM80", "SM89"))
    assert {*engine.inputs} == {*io.inputs} and {*engine.outputs} == {*io.outputs}
    assert engine.nbytes == len(bytes(engine.data)) > 100_000 and engine.seconds > 0 and not engine.refittable
    assert len(told) > 10 and all(0 <= done <= total for _, done, total in told)


def test_engine_grows_with_the_gpus_it_is_for(tmp_path: Path) -> None:
    path = relu(tmp_path / "relu.onnx")
    settings = replace(RTX, workspace=1 << 26)
    one, two = (build_of(path, replace(settings, compute_capabilities=names)).nbytes for names in (("SM89",), ("SM80", "SM89")))
    assert 0 < one < two


def test_weights_come_from_the_file_beside(exported: tuple[Path, list[StepIO]], tmp_path: Path) -> None:
    folder, (io, _) = exported
    shutil.copy(folder / "full.onnx", tmp_path)
    with pytest.raises(ExportError, match=r"does not take .*full\.onnx.*Failed to import initializer"):
        build_engine(tmp_path / "full.onnx", io.inputs, io.outputs, RTX)


# -- ONNX files that are refused --------------------------------------------------------------------------------------


def test_no_onnx(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no file"):
        build_of(tmp_path / "none.onnx")
    path = relu(tmp_path / "relu.onnx")
    whole = path.read_bytes()
    for damaged in (b"garbage" * 20, whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ExportError, match=r"does not take .*Failed to parse the ONNX model"):
            build_of(path)
    path.write_bytes(b"damaged " * 9)  # protobuf takes this for a model with nothing in it
    with pytest.raises(ExportError, match="other inputs than the step"):
        build_of(path)


def test_unsupported_nodes_are_named(tmp_path: Path) -> None:
    determinant = model(
        tmp_path / "det.onnx",
        helper.make_node("Det", ["x"], ["y"], name="the_determinant"),
        {"x": (TensorProto.FLOAT, [8, 4, 4]), "y": (TensorProto.FLOAT, [8])},
    )
    with pytest.raises(ExportError, match=r"the_determinant \[Det\]"):
        build_of(determinant)
    specs = {name: (TensorProto.FLOAT, [8, 4]) for name in ("x", "rows", "y")} | {"index": (TensorProto.INT64, [8, 4])}
    adding = helper.make_node("ScatterElements", ["x", "index", "rows"], ["y"], name="the_scatter", axis=0, reduction="add")
    with pytest.raises(ExportError, match=r"the_scatter \[ScatterElements\]: Unsupported reduction"):
        build_of(model(tmp_path / "scatter.onnx", adding, specs))


@pytest.mark.parametrize("kept", [3840, 3841])
def test_topk_limit_is_tensorrts_own(tmp_path: Path, kept: int) -> None:
    """What :func:`check_limits` refuses beforehand is what TensorRT refuses, to the token."""
    specs = {"x": (TensorProto.FLOAT, [1, 5000]), "y": (TensorProto.FLOAT, [1, kept]), "i": (TensorProto.INT64, [1, kept])}
    path = model(tmp_path / "topk.onnx", helper.make_node("TopK", ["x", "k"], ["y", "i"], name="the_topk"), specs, k=[kept])
    x, y, i = (TensorSpec(name, tuple(shape), torch.int64 if name == "i" else torch.float32) for name, (_, shape) in specs.items())
    if kept == 3840:
        assert build_engine(path, (x,), (y, i), RTX).nbytes > 0
    else:
        with pytest.raises(ExportError, match="the_topk: K exceeds the maximum value allowed"):
            build_engine(path, (x,), (y, i), RTX)


@pytest.mark.parametrize(
    ("io_inputs", "io_outputs", "message"),
    [
        ((replace(X, name="z"),), (Y,), r"inputs.*x \(found: float32 \[8, 4\], expected: none\); z \(found: none"),
        ((replace(X, dtype=torch.float16),), (Y,), r"x \(found: float32 \[8, 4\], expected: float16"),
        ((X,), (replace(Y, shape=(8, 5)),), r"outputs.*y \(found: float32 \[8, 4\], expected: float32 \[8, 5\]"),
        ((X,), (), "outputs"),
    ],
)
def test_other_inputs_and_outputs_than_the_steps(tmp_path: Path, io_inputs: Any, io_outputs: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        build_engine(relu(tmp_path / "relu.onnx"), io_inputs, io_outputs, RTX)


def test_dynamic_batch(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"x \(found: float32 \[-1, 4\], expected: float32 \[8, 4\]"):
        build_of(relu(tmp_path / "relu.onnx", batch="batch"))


# -- limits -----------------------------------------------------------------------------------------------------------


def test_limits(flavour: Flavour) -> None:
    io = StepIO("P", (16, 3841, 3840, 4096), (), (X,), (Y,), 1, ("cache",))
    with pytest.raises(ExportError, match=r'block 1 keeps 3841, block 3 keeps 4096 tokens.*at most 3840.*selection="host"'):
        check_limits(io, flavour)
    check_limits(replace(io, keep=(3840, 0)), flavour)
    check_limits(replace(io, selects=((1, 3841),)), flavour)
    check_limits(replace(io, kind="I"), flavour)
    check_limits(replace(io, next_caches=()), flavour)  # the graph of the scores
    with pytest.raises(ExportError, match=r"x \(torch.float64\)"):
        check_limits(replace(io, keep=(1,), inputs=(replace(X, dtype=torch.float64),)), flavour)


# -- settings, packages, interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_capabilities": ("SM80", "SM42")}, r"SM42.*builds for SM75, SM80"),
        ({"compute_capabilities": ()}, "builds for SM75"),
        ({"compute_capabilities": ("SM80", "SM80")}, "at most once"),
        ({"timing_cache": "timings"}, "has no timing cache"),
        ({"workspace": -1}, "workspace=-1"),
        ({"flavour": "tensorflow"}, "'tensorrt', 'tensorrt_rtx'"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        build_of(relu(tmp_path / "relu.onnx"), replace(RTX, **changes))


@no_gpu
def test_the_gpu_of_a_machine_that_has_none(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no CUDA device.*Name compute_capabilities, of SM75"):
        build_of(relu(tmp_path / "relu.onnx"), replace(RTX, compute_capabilities=None))


@no_gpu
def test_leaving_the_weights_out_needs_a_gpu(exported: tuple[Path, list[StepIO]]) -> None:
    folder, (io, _) = exported
    with pytest.raises(ExportError, match=r"does not build .*full\.onnx for SM80, SM89.*without refittable"):
        build_engine(folder / "full.onnx", io.inputs, io.outputs, replace(RTX, refittable=True))


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert load_flavour().name == "tensorrt_rtx"
    with pytest.raises(ExportError, match=r"tensorrt is not installed.*pip install tensorrt$"):
        build_of(relu(tmp_path / "relu.onnx"), TensorRTSettings("tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ExportError, match=r"pip install tensorrt-rtx$"):
        load_flavour("tensorrt_rtx")
    with pytest.raises(ExportError, match="neither tensorrt nor tensorrt_rtx"):
        load_flavour()


@pytest.mark.parametrize("version", ["1.1.9", "2.0.0.5"])
def test_unknown_releases(monkeypatch: pytest.MonkeyPatch, flavour: Flavour, version: str) -> None:
    monkeypatch.setattr(flavour.module, "__version__", version)
    with pytest.raises(ExportError, match=rf"{version} was found; 1\.2 or newer"):
        load_flavour("tensorrt_rtx")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the terminal is gone")])
def test_a_build_that_is_interrupted(tmp_path: Path, error: BaseException) -> None:
    """What ``progress`` raises ends the build and comes out of it, TensorRT in between or not."""

    def progress(phase: str, done: int, total: int) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        build_engine(relu(tmp_path / "relu.onnx"), (X,), (Y,), RTX, progress)
    assert caught.value is error
