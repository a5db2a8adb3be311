"""ONNX files: valid, small, named for people, and all weights in one safetensors file; and what the exporter refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from pipes import pipeline
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file
from tiny import Model, build, call_of, conditions, ddim, inputs, sample, transformed
from torch import Tensor, nn
from toy import ReturnsNumber, ToyBlock, ToyModel, toy_inputs

import tokencache_compile
from tokencache_compile import BundleError, CachePredictor, ConfigError, ExportError, export_onnx, load
from tokencache_compile.errors import TokenCacheError
from tokencache_compile.export.onnx import OPSET

WEIGHTS = "weights.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "host": torch.float32}
LAYERS, WIDTH = 2, 256
NUMBERS = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.int64: "INT64"}
Bundle = tuple[Path, Model]


def predictor(model: Model) -> CachePredictor:
    made = CachePredictor(model.transformer_blocks[0], WIDTH, LAYERS)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.05)
    return made.eval()


def dit(name: str) -> Model:
    """12 MB of weights (6 in half precision), a hundred times what a graph without them takes."""
    dtype = DTYPES[name]
    model = build("dit", layers=LAYERS, heads=WIDTH // 16, std=0.05).to(dtype)
    settings: dict[str, Any] = {"context": "cached", "scorer": "change"}  # in float16 the predictor's scores have too many ties
    if name != "float16":
        settings = {"context": "reuse", "predictor": predictor(model), "selection": "pair"}
    return transformed(model, last_k=0, ratio=0.75, example_inputs=inputs("dit", dtype=dtype), **settings)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """By name, each exported once: float32, float16, bfloat16, and float32 with the selection on the ``host``."""
    folder, made = tmp_path_factory.mktemp("bundles"), dict[str, Bundle]()

    def get(name: str) -> Bundle:
        if name not in made:
            dispatcher = dit(name)
            export_onnx(dispatcher, folder / name, selection="host" if name == "host" else "graph")
            made[name] = folder / name, dispatcher
        return made[name]

    return get


def models(folder: Path) -> dict[str, Any]:
    return {path.stem: onnx.load(path, load_external_data=False) for path in sorted(folder.glob("*.onnx"))}


def external(tensor: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def model_tensors(dispatcher: Model) -> dict[str, Tensor]:
    """The model's weights and the predictor's by their names in the graphs."""
    found: dict[str, Tensor] = dict(dispatcher.model.state_dict(keep_vars=True)) | dict(dispatcher.model.named_buffers())
    if dispatcher.predictor is not None:
        found |= {f"predictor.{name}": tensor for name, tensor in dispatcher.predictor.state_dict().items()}
    return found


@pytest.mark.parametrize("name", DTYPES)
def test_the_files_are_valid(bundles: Callable[[str], Bundle], name: str) -> None:
    """onnx's own checker, shape inference included; the opset as stated; nothing but standard operators."""
    folder, _ = bundles(name)
    scores = {"cached_0_scores.onnx"} if name == "host" else set()
    assert {path.name for path in folder.iterdir()} == {"full.onnx", "cached_0.onnx", WEIGHTS, "manifest.json", *scores}
    assert OPSET == 20 and json.loads((folder / "manifest.json").read_text())["opset"] == OPSET
    for stem, model in models(folder).items():
        onnx.checker.check_model(folder / f"{stem}.onnx", full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert not model.functions and {node.domain for node in model.graph.node} == {""}
    assert all(path.stat().st_mode & 0o444 == (folder / "full.onnx").stat().st_mode & 0o444 for path in folder.iterdir())


@pytest.mark.parametrize("name", DTYPES)
def test_all_weights_lie_in_one_file(bundles: Callable[[str], Bundle], name: str) -> None:
    """Each once, under the model's own name, byte for byte; every graph reads it from there and has no large constant besides."""
    folder, dispatcher = bundles(name)
    own, stored = model_tensors(dispatcher), load_file(folder / WEIGHTS)
    data = (folder / WEIGHTS).read_bytes()
    read: dict[str, set[str]] = {}
    places: dict[str, set[tuple[str, str]]] = {}
    for stem, model in models(folder).items():
        for tensor in model.graph.initializer:
            where = external(tensor)
            size = torch.Size(tensor.dims).numel()
            if not where:
                small = size <= WIDTH or len(tensor.raw_data) < 1024  # a LayerNorm without weights takes ones
                assert small and tensor.name not in own, f"{stem}: {tensor.name} has {size} values"
                continue
            assert where["location"] == WEIGHTS
            read.setdefault(stem, set()).add(tensor.name)
            places.setdefault(tensor.name, set()).add((where["offset"], where["length"]))
            assert tensor.data_type == onnx.TensorProto.DataType.Value(NUMBERS[own[tensor.name].dtype])
            assert tuple(tensor.dims) == tuple(own[tensor.name].shape)
            start = int(where["offset"])
            assert data[start : start + int(where["length"])] == raw(own[tensor.name]), tensor.name
        for node in model.graph.node:
            for attribute in node.attribute:
                assert len(attribute.SerializeToString()) < 1024, f"{stem}: {node.name} carries a constant"
    assert set().union(*read.values()) == set(stored), "what no graph reads is not stored"
    assert all(len(found) == 1 for found in places.values())
    for key, tensor in stored.items():
        assert tensor.dtype == own[key].dtype and torch.equal(tensor, own[key].detach()), key
    assert len(read["full"] & read["cached_0"]) > 10, "the I- and the P-step share their weights"
    assert {"transformer_blocks.1.ff.net.2.weight", "pos_embed.proj.weight"} <= read["full"] & read["cached_0"]


@pytest.mark.parametrize("name", DTYPES)
def test_a_graph_without_weights_is_small(bundles: Callable[[str], Bundle], name: str) -> None:
    folder, _ = bundles(name)
    weights = (folder / WEIGHTS).stat().st_size
    for path in folder.glob("*.onnx"):
        assert path.stat().st_size < 0.01 * weights * (1 if DTYPES[name] == torch.float32 else 2), path.name


@pytest.mark.parametrize("name", DTYPES)
def test_nothing_of_this_machine_is_in_the_files(bundles: Callable[[str], Bundle], name: str) -> None:
    folder, _ = bundles(name)
    home, here = str(Path.home()), str(Path.cwd())
    for path in (*folder.glob("*.onnx"), folder / "manifest.json"):
        data = path.read_bytes()
        for trace in (home, here, str(folder), sys.prefix, "site-packages", 'File "', ".py", "Traceback"):
            assert trace.encode() not in data, f"{path.name}: {trace}"


def interface(model: Any) -> tuple[dict[str, tuple[int, tuple[int, ...]]], dict[str, tuple[int, tuple[int, ...]]]]:
    def table(values: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
        kinds = {value.name: value.type.tensor_type for value in values}
        return {name: (kind.elem_type, tuple(d.dim_value for d in kind.shape.dim)) for name, kind in kinds.items()}

    return table(model.graph.input), table(model.graph.output)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_inputs_and_outputs(bundles: Callable[[str], Bundle], name: str) -> None:
    """Names that mean something, static shapes, and the model's own dtype; stamps and scores are float32."""
    folder, _ = bundles(name)
    found = models(folder)
    full, cached = interface(found["full"]), interface(found["cached_0"])
    own = onnx.TensorProto.DataType.Value(NUMBERS[DTYPES[name]])
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    stream = (4, 16, WIDTH)
    common = {"hidden_states": (own, (4, 4, 8, 8)), "timestep": (int64, (4,)), "class_labels": (int64, (4,)), "step": (float32, ())}
    assert common.items() <= full[0].items() and common.items() <= cached[0].items()
    assert full[1]["sample"] == cached[1]["sample"] == (own, (4, 8, 8, 8))
    for block in range(LAYERS):
        assert full[1][f"next_update_{block:02d}_0"] == (own, stream)
        assert all(cached[0][f"update_{block:02d}_{age}"] == (own, stream) for age in range(3))
    assert full[1]["next_stamps"] == cached[0]["stamps"] == (float32, (1, 1, 3))
    if name == "float16":
        assert full[0]["update_00_0"] == (own, stream), "the score of a change needs the update before"
        assert full[1]["next_score_01"] == cached[0]["score_01"] == (float32, (4, 16))
        assert full[1]["next_key_00"] == cached[0]["key_00"] == cached[1]["next_key_00"] == (own, (4, 16, WIDTH // 16, 16))
    else:
        assert not [key for key in full[0] if key.startswith(("update", "attention"))]
        assert full[1]["next_attention_01_0"] == cached[0]["attention_01_2"] == (own, stream)
        assert set(cached[1]) == {"sample"}


def test_predictor_and_top_k_are_inside_or_on_the_host(bundles: Callable[[str], Bundle]) -> None:
    inside, host = models(bundles("float32")[0]), models(bundles("host")[0])
    count = {stem: Counter(node.op_type for node in model.graph.node)["TopK"] for stem, model in (inside | {f"host_{k}": m for k, m in host.items()}).items()}
    assert count == {"full": 0, "cached_0": LAYERS, "host_full": 0, "host_cached_0": 0, "host_cached_0_scores": 0}
    head = {"predictor.head.weight", "predictor.head.bias", "predictor.block.ff.net.2.weight"}
    names = {stem: {tensor.name for tensor in model.graph.initializer} for stem, model in host.items()}
    assert head <= names["cached_0_scores"] and not head & (names["cached_0"] | names["full"])
    assert head <= {tensor.name for tensor in inside["cached_0"].graph.initializer}
    scores_in, scores_out = interface(host["cached_0_scores"])
    assert set(scores_in) == {"hidden_states", "timestep", "class_labels"}
    assert list(scores_out) == ["scores_00", "scores_01"] and scores_out["scores_00"][1] == (4, 16)
    assert interface(host["cached_0"])[0]["index_01"] == (onnx.TensorProto.INT64, (4, 4))


# Relative to the norm of eager's output: rounding in another order.
TOLERANCE = {"float32": 5e-5, "float16": 5e-3, "host": 5e-5}


@pytest.mark.parametrize("name", TOLERANCE)
def test_onnxruntime_computes_what_torch_does(bundles: Callable[[str], Bundle], name: str) -> None:
    """Every step of a run, outputs and caches, from the same inputs and caches: in float16 a run of its own would flip selections."""
    folder, dispatcher = bundles(name)
    steps = dispatcher.steps
    ours, theirs = dispatcher.captured(), load(folder)._compiled
    cpu = torch.device("cpu")
    caches = steps.initial_caches(cpu)
    tensors = list(inputs("dit").values())
    for step, timestep in enumerate(range(900, 200, -100)):
        given = [sample(seed=step, dtype=DTYPES[name]), torch.full_like(tensors[1], timestep), tensors[2]]
        engines = (ours.full, theirs.full) if step % 3 == 0 else (ours.cached[0], theirs.cached[0])
        (expected, new), (got, new_there) = (engine(given, steps.step_inputs(step, cpu), caches) for engine in engines)
        for what, a, b in zip(("sample", *(spec.name for spec in steps.caches)), (*got, *new_there), (*expected, *new), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and bool(b.isfinite().all())
            error = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-3))
            assert error < TOLERANCE[name], f"step {step}, {what}: {error:.1e}"
        caches = new


@pytest.mark.parametrize("name", ["float32", "host"])
def test_a_whole_run(bundles: Callable[[str], Bundle], name: str) -> None:
    """12 steps, 9 of them P-steps, whose selections and caches are ONNX Runtime's own. 1e-5 of eager's norm."""
    folder, dispatcher = bundles(name)
    given, noise = conditions("dit"), sample()
    dispatcher.reset()
    expected = ddim(call_of(dispatcher, given), noise, 12)
    plain = ddim(call_of(dispatcher.model, given), noise, 12)[-1]
    for a, b in zip(ddim(call_of(load(folder), given), noise, 12), expected, strict=True):
        assert bool(a.isfinite().all()) and float((a - b).norm() / b.norm()) < 1e-5
    assert float((plain - expected[-1]).norm() / plain.norm()) > 1e-3, "caching changed nothing: the model itself would pass"


class Tied(ToyModel):
    """One weight under two names, one that lies transposed in memory, and a buffer that is no parameter."""

    def __init__(self) -> None:
        super().__init__(layers=2)
        self.outer.weight = self.inner.weight
        self.between = nn.Parameter(torch.randn(8, 16).t())
        self.register_buffer("table", torch.randn(16, 8))

    table: Tensor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) @ self.between[:8] + self.table @ self.inner.weight


def run_toy(model: Model, given: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**given | {"t": torch.full((2,), t)}).clone() for t in (900, 700, 500, 300, 100)]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, given = Tied(), toy_inputs()
    assert not model.between.is_contiguous()
    dispatcher = tokencache_compile.transform(model, ratio=0.75, last_k=0, backend="eager", example_inputs=given)
    export_onnx(dispatcher, tmp_path / "bundle")
    stored = load_file(tmp_path / "bundle" / WEIGHTS)
    assert len({"inner.weight", "outer.weight"} & stored.keys()) == 1 and {"between", "table"} <= stored.keys()
    assert torch.equal(stored["between"], model.between.detach())
    for a, b in zip(run_toy(load(tmp_path / "bundle"), given), run_toy(dispatcher, given), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# --- refused --------------------------------------------------------------------------------------------------------


def toy(model: nn.Module, **settings: Any) -> Any:
    return tokencache_compile.transform(model, **{"ratio": 0.75, "last_k": 0, "backend": "eager"} | settings)


def refused(dispatcher: Any, folder: Path, kind: type[TokenCacheError], match: str, **options: Any) -> None:
    """The error is named, and the disk is as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(kind, match=match) as raised:
        export_onnx(dispatcher, folder / "bundle", **options)
    assert type(raised.value) is kind and sorted(folder.rglob("*")) == before


def test_what_is_not_transformed(tmp_path: Path) -> None:
    for other in ("a name", None, ToyModel(), pipeline("dit")):
        refused(other, tmp_path, ConfigError, r"was given; pass what tokencache_compile\.transform returned")


def test_nothing_captured(tmp_path: Path) -> None:
    refused(toy(ToyModel()), tmp_path, ConfigError, "nothing is captured yet: call the model once, or pass example_inputs")


def test_weights_replaced_since_the_capture(tmp_path: Path) -> None:
    model = ToyModel()
    dispatcher = toy(model, example_inputs=toy_inputs())
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)
    refused(dispatcher, tmp_path, ConfigError, "weights were replaced since")


def test_autocast(tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        dispatcher = toy(ToyModel(), example_inputs=toy_inputs())
    refused(dispatcher, tmp_path, ExportError, r"captured under autocast.*Cast the model itself")


def test_an_unknown_place_to_select(tmp_path: Path) -> None:
    refused(toy(ToyModel(), example_inputs=toy_inputs()), tmp_path, ConfigError, r"selection='gpu' was asked for", selection="gpu")


class ReturnsDict(ToyModel):
    """Names its result in a way no manifest can write down."""

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return {"result": super().forward(x, t)}


class ReturnsNested(ToyModel):
    """A tuple within a tuple."""

    def forward(self, x: Tensor, t: Tensor) -> Any:
        y: Tensor = super().forward(x, t)
        return (y, (y + 1,))


@pytest.mark.parametrize(("model", "what"), [(ReturnsDict, "dict of 1"), (ReturnsNested, "tuple of 2")])
def test_outputs_that_cannot_be_rebuilt(model: type[ToyModel], what: str, tmp_path: Path) -> None:
    dispatcher = toy(model(), example_inputs=toy_inputs())
    refused(dispatcher, tmp_path, ExportError, f"returns a {what} tensors; a bundle can rebuild a tensor, a flat tuple or an output class")


def test_a_model_that_returns_a_number_never_gets_here() -> None:
    with pytest.raises(TokenCacheError):
        toy(ReturnsNumber(), example_inputs=toy_inputs())


@torch.library.custom_op("tokencache_tests::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    """An operator that ONNX has never heard of."""
    return x.sin()


@odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class OddBlock(ToyBlock):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        moved: Tensor = odd(super().forward(x, condition))
        return moved


def test_an_operator_onnx_does_not_have(tmp_path: Path) -> None:
    dispatcher = toy(ToyModel(OddBlock, layers=1), example_inputs=toy_inputs())
    refused(dispatcher, tmp_path, ExportError, r"torch\.onnx cannot export the I-step.*(tokencache_tests|odd)")


@pytest.mark.parametrize("missing", ["onnxscript", "onnx"])
def test_onnx_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    dispatcher = toy(ToyModel(), example_inputs=toy_inputs())
    for name in [name for name in sys.modules if name.partition(".")[0] in (missing, "onnxscript")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    refused(dispatcher, tmp_path, ExportError, r"pip install 'tokencache-compile\[onnx\]'")


def test_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen before anything is computed or written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))  # type: ignore[attr-defined]
    dispatcher = toy(ToyModel(), example_inputs=toy_inputs())
    refused(dispatcher, tmp_path, ExportError, r"has 1 MiB free, and \d+ MiB are needed\. Free some, or export to another disk")


@pytest.mark.parametrize("what", ["a file", "a folder of something else", "a file in the way of its parent"])
def test_the_target_is_something_else(tmp_path: Path, what: str) -> None:
    dispatcher = toy(ToyModel(), example_inputs=toy_inputs())
    target = tmp_path / "bundle"
    if what == "a file":
        target.write_text("kept")
    elif what == "a folder of something else":
        target.mkdir()
        (target / "thesis.tex").write_text("kept")
    else:
        target.write_text("kept")
        with pytest.raises(ExportError, match="cannot be written"):
            export_onnx(dispatcher, target / "below")
    with pytest.raises(BundleError, match=r"is there and is no bundle, so it is not replaced"):
        export_onnx(dispatcher, target)
    left = target if target.is_file() else target / "thesis.tex"
    assert left.read_text() == "kept" and [p for p in tmp_path.rglob("*") if p.is_file()] == [left]
