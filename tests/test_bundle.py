"""Bundles: whole or not there, the same images without the model, and a named refusal of everything else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pipes import images, pipeline
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tiny import ROWS, Model, build, call_of, conditions, ddim, inputs, same_bits, sample, sampler, transformed
from torch import Tensor
from toy import ToyModel, toy_inputs

import tokencache_compile
from tokencache_compile import (
    BundleDispatcher,
    BundleError,
    ConfigError,
    ExportError,
    InputError,
    Schedule,
    StepReport,
    export_onnx,
    load,
)
from tokencache_compile.export import graphs, write
from tokencache_compile.export.manifest import read_manifest
from tokencache_compile.whole_directory import written_whole

STEPS = 10
FILES = {"manifest.json", "weights.safetensors", "full.onnx", "cached_0.onnx"}


SETTINGS: dict[str, Any] = {"scorer": "random", "last_k": 0, "ratio": 0.7, "schedule": Schedule(4)}  # no selection hangs on rounding


def model() -> Model:
    return build("dit", layers=2, std=0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """The bundle of a tiny DiT for two images with guidance, and the dispatcher it is from; the model's own files are deleted."""
    folder = tmp_path_factory.mktemp("made")
    model().save_pretrained(folder / "model")
    loaded = DiTTransformer2DModel.from_pretrained(folder / "model").eval()
    dispatcher = transformed(loaded, **SETTINGS, example_inputs=inputs("dit"))
    export_onnx(dispatcher, folder / "exported")
    shutil.rmtree(folder / "model")
    return (folder / "exported").rename(folder / "bundle"), dispatcher


@pytest.fixture(scope="module")
def bundle(made: tuple[Path, Model]) -> BundleDispatcher:
    return load(made[0])


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    for name in ("made", "bundle"):
        if name in request.fixturenames:
            value = request.getfixturevalue(name)
            dispatcher = value[1] if name == "made" else value
            dispatcher.enable()
            dispatcher.reset()
            dispatcher.step_callback = None


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Two runs, within 1e-4 of the largest value."""
    pairs = zip(got, expected, strict=True)
    return all(bool(a.isfinite().all()) and float((a - b).abs().max()) < 1e-4 * float(b.abs().max()) for a, b in pairs)


def run(dispatcher: Any, noise_seed: int = 2, scheduler: Any = None, start: int = 0) -> list[Tensor]:
    return ddim(call_of(dispatcher, conditions("dit")), sample(seed=noise_seed), STEPS, scheduler, start)


def reports_of(dispatcher: Any) -> list[StepReport]:
    reports: list[StepReport] = []
    dispatcher.step_callback = reports.append
    return reports


# --- without the model ----------------------------------------------------------------------------------------------

FRESH = """
import sys
import torch

torch.set_num_threads(1)


def refused(*args, **kwargs):
    raise AssertionError("nothing is to be captured here")


torch.export.export = refused
import tokencache_compile
from pipes import images, pipeline

pipe = pipeline("dit", torch.nn.Identity())
pipe.transformer = tokencache_compile.load(sys.argv[1], scheduler=pipe.scheduler)
torch.save(images(pipe, 10), sys.argv[2])
assert "onnxscript" not in sys.modules
"""


def test_a_fresh_process_without_the_model(made: tuple[Path, Model], tmp_path: Path) -> None:
    """Without the weights the bundle was made from, while ``torch.export.export`` raises: the images are the same within 1e-5."""
    folder, dispatcher = made
    expected = images(pipeline("dit", dispatcher), STEPS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "images.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "images.pt")
    assert float((got - expected).abs().max()) < 1e-5
    plain: Tensor = images(pipeline("dit", model()), STEPS)
    assert float((plain - expected).abs().max()) > 1e-4, "caching changed nothing: the model itself would pass"
    own = transformed(pipeline("dit", model()), **SETTINGS, backend="onnxruntime")
    assert torch.equal(images(own, STEPS), got), "transform with the backend runs the same graphs in the same runtime"
    assert own.transformer.summary() == dispatcher.summary()


# --- the dispatcher -------------------------------------------------------------------------------------------------


def test_what_it_answers_for(made: tuple[Path, Model], bundle: BundleDispatcher) -> None:
    folder, dispatcher = made
    assert {path.name for path in folder.iterdir()} == FILES
    assert bundle.plan == dispatcher.plan and str(bundle.plan) == str(dispatcher.plan)
    config = {key: value for key, value in dict(dispatcher.model.config).items() if not key.startswith("_")}
    assert dict(bundle.config) == config and bundle.config.sample_size == 8
    assert bundle.dtype == torch.float32 and bundle.device == torch.device("cpu") and not bundle.training
    assert bundle.manifest.model.class_name == "DiTTransformer2DModel"
    assert bundle.manifest.fingerprints.base == tokencache_compile.fingerprint.fingerprint(dispatcher.model)  # type: ignore[attr-defined]
    assert bundle.manifest.fingerprints.predictor is None and re.fullmatch("[0-9a-f]{64}", bundle.manifest.fingerprints.passes)
    with torch.no_grad():
        for options in ({}, {"return_dict": False}):
            got, expected = bundle(**inputs("dit"), **options), dispatcher(**inputs("dit"), **options)
            assert type(got) is type(expected) and torch.allclose(got[0], expected[0], rtol=1e-4, atol=1e-3)


def test_a_run(made: tuple[Path, Model], bundle: BundleDispatcher) -> None:
    expected = run(made[1])
    reports = reports_of(bundle)
    assert same(run(bundle), expected)
    assert [r.kind for r in reports] == ["P" if step % 4 else "I" for step in range(STEPS)] and [r.step for r in reports] == [*range(STEPS)]
    assert bundle.summary() == made[1].summary() and str(bundle.summary()) == str(made[1].summary())
    first = run(bundle)
    assert same_bits(first, run(bundle)) and not same(run(bundle, 7), first)


def test_a_scheduler_marks_the_requests(made: tuple[Path, Model]) -> None:
    """Also of runs that start in the middle of a schedule, one after the other, which timesteps alone do not tell apart."""
    ours, theirs = sampler(STEPS), sampler(STEPS)
    eager = transformed(made[1].model, **SETTINGS, scheduler=theirs)
    loaded = load(made[0], scheduler=ours)
    for start in (0, 3, 6):
        ours.set_timesteps(STEPS)
        theirs.set_timesteps(STEPS)
        reports = reports_of(loaded)
        assert same(run(loaded, scheduler=ours, start=start), run(eager, scheduler=theirs, start=start))
        assert [r.step for r in reports] == [*range(start, STEPS)] and reports[0].kind == "I"


def branched(dispatcher: Any, named: bool) -> list[Tensor]:
    """A guided run, its branches called one after the other."""
    calls = {name: call_of(dispatcher, conditions("dit", seed=seed)) for name, seed in (("cond", 1), ("uncond", 9))}

    def guided(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        outputs = []
        for name, call in calls.items():
            if named:
                with dispatcher.cache_context(name):
                    outputs.append(call(step, x, timesteps))
            else:
                outputs.append(call(step, x, timesteps))
        return outputs[1] + 1.5 * (outputs[0] - outputs[1])

    return ddim(guided, sample(), STEPS)


@pytest.mark.parametrize("named", [True, False])
def test_two_branches(made: tuple[Path, Model], bundle: BundleDispatcher, named: bool) -> None:
    expected = branched(made[1], named)
    reports = reports_of(bundle)
    assert same(branched(bundle, named), expected)
    assert {r.branch for r in reports} == ({"cond", "uncond"} if named else {"branch 0", "branch 1"})
    assert [(r.kind, r.step) for r in reports] == [("P" if step % 4 else "I", step) for step in range(STEPS) for _ in range(2)]


def test_reset_and_disable(made: tuple[Path, Model], bundle: BundleDispatcher) -> None:
    """After ``reset`` an I-step; disabled, every step is one: the model's own run, within 1e-4."""
    reports = reports_of(bundle)
    with torch.no_grad():
        for timestep in (900, 800):
            bundle(**inputs("dit", timestep=timestep))
        bundle.reset()
        bundle(**inputs("dit", timestep=700))
    assert [r.kind for r in reports] == ["I", "P", "I"]
    cached = run(bundle)
    bundle.disable()
    assert not bundle.is_cache_enabled
    plain = ddim(call_of(made[1].model, conditions("dit")), sample(), STEPS)
    assert same(run(bundle), plain) and not same(cached, plain)
    with pytest.raises(InputError):
        bundle(**inputs("dit", rows=1))
    bundle.enable()
    assert same_bits(run(bundle), cached)


class Options(ToyModel):
    """Constants of every kind, and a default that JSON does not know."""

    def forward(self, x: Tensor, t: Tensor, scale: float = 2.0, window: Any = (1, 2), extra: Any = None, **more: Tensor) -> Tensor:  # type: ignore[override]
        result: Tensor = super().forward(x, t) * scale
        for factor in (extra or {}).values():
            result = result * factor
        return result + more["shift"] * window[0]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, BundleDispatcher, dict[str, Any]]:
    """Two keep profiles, no cache for one block of one of them, and every step of a listed schedule."""
    given = {**toy_inputs(), "window": (3, 2), "extra": {"a": torch.full((1,), 2.0), "b": torch.full((1,), 3.0)}, "shift": torch.ones(8)}
    settings: dict[str, Any] = {"keep": ((4, 2), (0, 6)), "groups": (0, 0, 1), "schedule": Schedule(full=(0, 3)), "last_k": 1}
    dispatcher = tokencache_compile.transform(Options(), backend="eager", scorer="norm", example_inputs=given, **settings)
    return dispatcher, load(export_onnx(dispatcher, tmp_path_factory.mktemp("options") / "bundle")), given


def toy_run(model: Any, given: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**given | {"t": torch.full((2,), t)}).clone() for t in (900, 700, 500, 300, 100)]


def test_constants_profiles_and_schedules(options: tuple[Model, BundleDispatcher, dict[str, Any]]) -> None:
    dispatcher, loaded, given = options
    reports = reports_of(loaded)
    assert same(toy_run(loaded, given), toy_run(dispatcher, given))
    assert [(r.kind, r.kept) for r in reports] == [("I", ()), ("P", (4, 2)), ("P", (0, 6)), ("I", ()), ("P", (0, 6))]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale": 3.0}, r"scale is 3\.0 and not 2\.0"),
        ({"window": (1, 2)}, r"window\.0 is 1 and not 3"),
        ({"window": None}, r"window\.0 is not given and not 3"),
        ({"extra": {"a": torch.ones(1)}}, r"extra\.b is not given and not \(1,\) torch\.float32"),
        ({"extra": {"b": torch.ones(1), "a": torch.ones(1)}}, r"come in the order .*extra\.b, extra\.a.* and not .*extra\.a, extra\.b"),
        ({"shift": None}, r"shift is None and not \(8,\) torch\.float32"),
        ({"more": torch.ones(8)}, r"more is \(8,\) torch\.float32 and not given"),
    ],
)
def test_constants_that_are_others(options: tuple[Model, BundleDispatcher, dict[str, Any]], change: dict[str, Any], match: str) -> None:
    _, loaded, given = options
    before = toy_run(loaded, given)
    with pytest.raises(InputError, match=match), torch.no_grad():
        loaded(**given | change)
    assert same_bits(toy_run(loaded, given), before)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (inputs("dit", rows=2), r"hidden_states is \(2, 4, 8, 8\) torch\.float32 and not \(4, 4, 8, 8\).*timestep is \(2,\)"),
        ({"hidden_states": sample(size=16)}, r"hidden_states is \(4, 4, 16, 16\) torch\.float32 and not \(4, 4, 8, 8\) torch\.float32"),
        ({"hidden_states": sample(dtype=torch.float16)}, r"torch\.float16 and not \(4, 4, 8, 8\) torch\.float32"),
        ({"timestep": torch.full((ROWS,), 500.0)}, r"timestep is \(4,\) torch\.float32 and not \(4,\) torch\.int64"),
        ({"class_labels": None}, r"class_labels is None and not \(4,\) torch\.int64.*export once more"),
        ({"class_labels": 7}, r"class_labels is 7 and not \(4,\) torch\.int64"),
        ({"cross_attention_kwargs": {"a": 1}}, r"cross_attention_kwargs\.a is 1 and not given"),
        ({"unknown": 1}, "does not fit DiTTransformer2DModel.forward.*unknown"),
        ({"hidden_states": torch.full((4, 4, 8, 8), float("nan"))}, "NaN was found in hidden_states"),
        ({"timestep": 500}, "timestep=500 .* a torch tensor is needed"),
    ],
)
def test_calls_that_were_not_exported(bundle: BundleDispatcher, change: dict[str, Any], match: str) -> None:
    """Named: what was found, and what was exported. The run after it is as ever."""
    before = run(bundle)
    with pytest.raises(InputError, match=match), torch.no_grad():
        bundle(**inputs("dit") | change)
    assert same_bits(run(bundle), before)


def test_a_call_without_its_arguments(bundle: BundleDispatcher) -> None:
    with pytest.raises(InputError, match=r"does not fit DiTTransformer2DModel\.forward.*hidden_states"):
        bundle(timestep=torch.zeros(4))


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(made: tuple[Path, Model], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made[0], tmp_path / "bundle"))


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BundleError, match=match) as raised:
        load(folder)
    assert "manifest.json" in str(raised.value) or str(folder) in str(raised.value)


def test_no_bundle(tmp_path: Path) -> None:
    refused(tmp_path, r"manifest\.json is missing, so .* is no bundle\. Pass the directory that export_onnx or export_tensorrt wrote")
    refused(tmp_path / "nowhere", "is no bundle")


@pytest.mark.parametrize("text", ["{", "", "\ud800", "[" * 200_000, '{"a":' * 200_000, "\x00"], ids=range(6))
def test_no_json(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, r"manifest\.json is no JSON: .*Export or download the bundle again")


@pytest.mark.parametrize("content", [[], 1, None, "a", {}, {"format_version": 2}, {"format_version": "1"}])
def test_another_format(folder: Path, content: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(content))
    refused(folder, r"has format version .* reads version 1\. Install the package that wrote it, or export again")


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
def test_files_that_are_not_as_written(folder: Path, name: str) -> None:
    """Cut short, one bit of one byte flipped, missing."""
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    refused(folder, f"{name} was cut short or changed: it has {len(data) - 1} bytes, and manifest.json says {len(data)}")
    middle = len(data) // 2
    (folder / name).write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    refused(folder, f"{name} was changed: its SHA-256 is [0-9a-f]{{64}}, and manifest.json says {hashlib.sha256(data).hexdigest()}")
    (folder / name).unlink()
    refused(folder, f"{name} is missing")


def test_a_file_that_is_not_listed(folder: Path) -> None:
    (folder / "README.md").write_text("notes are welcome")
    load(folder)
    (folder / "other.engine").write_bytes(b"")
    refused(folder, r"other\.engine is there, and manifest\.json does not list it")


@pytest.mark.parametrize("name", ["../made.onnx", "/etc/hostname", "sub/x", "..", ".", ""])
def test_a_file_outside(folder: Path, name: str) -> None:
    """Never read, though it is there and its size and hash are right."""
    outside = folder / name
    if name == "../made.onnx":
        outside.write_bytes(b"there")
    data = outside.read_bytes() if outside.is_file() else b""
    listed = {"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)}
    edit(folder, lambda m: m["files"].update({name: listed}))
    refused(folder, r"is missing|lists '.*', which is no file's name")


def _step(number: int, **changes: Any) -> Callable[[Any], Any]:
    return lambda m: m["steps"][number]["graph"]["io"].update(changes)


CONTRADICTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cache shape": (lambda m: m["caches"][0].update(shape=[4, 16, 31]), "contradicts itself: .*update_00_0"),
    "cache dtype": (lambda m: m["caches"][0].update(dtype="float16"), "contradicts itself: .*update_00_0"),
    "cache name": (lambda m: m["caches"][0].update(name="other"), "contradicts itself: .*takes"),
    "a cache less": (lambda m: m["caches"].pop(), "contradicts itself"),
    "next_caches order": (lambda m: m["steps"][0]["graph"]["io"]["next_caches"].reverse(), "contradicts itself: full gives .* cache"),
    "next_caches less": (lambda m: m["steps"][1]["graph"]["io"]["next_caches"].pop(), "contradicts itself: cached_0 gives"),
    "next_caches unknown": (_step(0, next_caches=["x"] * 11), "contradicts itself"),
    "a step less": (lambda m: m["steps"].pop(), "contradicts itself: 1 steps"),
    "a step more": (lambda m: m["steps"].append(m["steps"][1]), "contradicts itself: 3 steps"),
    "MACs less": (lambda m: m["macs"].pop(), "contradicts itself: .*MACs of 1"),
    "keep": (_step(1, keep=[3, 3]), "contradicts itself"),
    "arguments": (lambda m: m["steps"][0]["graph"]["io"]["arguments"].reverse(), "contradicts itself: full takes"),
    "an input's shape": (lambda m: m["steps"][0]["graph"]["io"]["inputs"][0].update(shape=[4, 4, 8]), "contradicts itself: full reads"),
    "an unknown input": (lambda m: m["steps"][0]["graph"]["io"]["inputs"][0].update(name="z"), "contradicts itself: full reads"),
    "a call's shape": (lambda m: m["call"]["leaves"][0]["spec"].update(shape=[1, 4, 8, 8]), "contradicts itself: full reads"),
    "outputs": (_step(0, num_outputs=2), "contradicts itself: full gives 2 of the model's 1"),
    "selects": (_step(1, selects=[[0, 2]]), r"contradicts itself: cached_0 leaves blocks \[0\] to the host"),
    "a graph's name": (lambda m: m["steps"][1]["graph"].update(name="../cached_0"), "contradicts itself: .*is not listed"),
    "engines": (lambda m: m["engines"].append(ENGINE), "engine"),
    "a dtype": (lambda m: m["model"].update(dtype="float17"), r"manifest\.json\.model\.dtype is 'float17', where a dtype is needed"),
    "a dtype deep inside": (lambda m: m["steps"][0]["graph"]["io"]["inputs"][0].update(dtype="nn"), r"steps\[0\].*dtype is 'nn'"),
    "a field more": (lambda m: m.update(more=1), "exactly"),
    "a field less": (lambda m: m.pop("opset"), "exactly"),
    "a setting": (lambda m: m["plan"]["config"].update(ratio=1.5), r"ratio=1\.5 was asked for"),
    "nesting": (lambda m: m["plan"]["config"].update(ratio=json.loads("[" * 900 + "]" * 900)), "manifest"),
    "another class": (lambda m: m["output"].update(kind="subprocess.Popen"), "no class of diffusers"),
    "a class that is no output": (lambda m: m["output"].update(kind="diffusers.utils.logging.enable_progress_bar"), "no output class"),
    "a class that is not there": (lambda m: m["output"].update(kind="diffusers.utils.Nothing"), r"has no diffusers\.utils\.Nothing"),
}
ENGINE = {"flavour": "tensorrt_rtx", "version": "1.0", "compute_capabilities": ["SM89"]}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_manifests_that_contradict_themselves(folder: Path, what: str) -> None:
    change, match = CONTRADICTIONS[what]
    edit(folder, change)
    refused(folder, match)


def test_runtimes_and_providers(made: tuple[Path, Model]) -> None:
    folder, _ = made
    with pytest.raises(ConfigError, match=r"runtime='openvino' was asked for; it is one of 'onnxruntime', 'tensorrt', 'tensorrt_rtx'"):
        load(folder, runtime="openvino")
    for flavour in ("tensorrt", "tensorrt_rtx"):
        match = rf'runtime="{flavour}" was asked for and .* has these engines: none\. Export with export_tensorrt'
        with pytest.raises(BundleError, match=match):
            load(folder, runtime=flavour)
    with pytest.raises(ConfigError, match=r"provider='rocm' was asked for; it is one of"):
        load(folder, provider="rocm")
    if not torch.cuda.is_available():
        with pytest.raises(ExportError, match=r"provider='cuda' was asked for, and this ONNX Runtime .* has .*onnxruntime-gpu"):
            load(folder, provider="cuda")


# --- written whole --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def toy() -> Any:
    return tokencache_compile.transform(ToyModel(layers=1), ratio=0.75, last_k=0, backend="eager", example_inputs=toy_inputs())


@pytest.fixture(scope="module")
def old_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of other weights, which a new one would replace."""
    other = tokencache_compile.transform(ToyModel(layers=1, std=0.1), ratio=0.75, last_k=0, backend="eager", example_inputs=toy_inputs())
    return export_onnx(other, tmp_path_factory.mktemp("old") / "bundle")


@pytest.fixture
def old(old_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(old_bundle, tmp_path / "bundle"))


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Run ``work`` in a process of its own, forked here; how it ended (minus the signal, if it was killed) and what it raised."""
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        try:
            work()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(write_end, message.encode()[:4000])
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), message


def test_a_newer_bundle_replaces_an_older_one(toy: Any, old: Path) -> None:
    before, values = contents(old), toy_run(load(old), toy_inputs())
    assert export_onnx(toy, old) == old
    assert contents(old) != before and not same(toy_run(load(old), toy_inputs()), values)
    assert same(toy_run(load(old), toy_inputs()), toy_run(toy, toy_inputs()))
    assert [path.name for path in old.parent.iterdir()] == ["bundle"], "nothing is left beside it"


def test_a_broken_bundle_is_not_replaced(toy: Any, old: Path) -> None:
    with (old / "weights.safetensors").open("r+b") as file:
        file.truncate(100)
    before = contents(old)
    match = r"is not replaced, because it is no whole bundle: .*weights\.safetensors was cut short.*Remove it first"
    with pytest.raises(BundleError, match=match):
        export_onnx(toy, old)
    assert contents(old) == before


@pytest.mark.parametrize("what", ["weights.safetensors", "full.onnx"])
def test_a_full_disk(toy: Any, old: Path, what: str) -> None:
    """Really full: the system refuses to write the last bytes of the weights, or of a graph after them."""
    limit = (old / what).stat().st_size - 500
    assert (limit > (old / "weights.safetensors").stat().st_size) == (what == "full.onnx")
    before = contents(old)

    def export() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        export_onnx(toy, old)

    code, message = in_child(export)
    assert code == 0
    assert re.match(r"ExportError: .*cannot be written: .*Nothing was left there; free some space or name another", message), message
    assert contents(old) == before and [path.name for path in old.parent.iterdir()] == ["bundle"]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("when", ["weights", "manifest"])
def test_a_killed_export(toy: Any, old: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL once the weights are written, and once all but the manifest is: the old bundle is as it was, and a new export works."""
    before = contents(old)

    def export() -> None:
        module, name = (graphs, "save_onnx") if when == "weights" else (write, "write_manifest")
        monkeypatch.setattr(module, name, lambda *_: kill())
        export_onnx(toy, old)

    assert in_child(export) == (-signal.SIGKILL, "")
    (left,) = [path for path in old.parent.iterdir() if path != old]
    assert left.name.startswith(".bundle-") and (left / "new" / "weights.safetensors").exists(), "it was killed in the middle"
    assert not (left / "new" / "manifest.json").exists()
    assert contents(old) == before
    read_manifest(old)
    with pytest.raises(BundleError, match="is no bundle"):
        load(left / "new")


def test_a_directory_is_whole_or_absent(tmp_path: Path) -> None:
    """Killed between the two renames, interrupted, or refused the second rename: never half of the new, never half of the old."""
    target = tmp_path / "target"

    def write_new() -> None:
        with written_whole(target) as folder:
            (folder / "file").write_text("new")

    def killed_between() -> None:
        rename, calls = Path.rename, []

        def dying(self: Path, other: Path) -> Path:
            calls.append(self)
            if len(calls) == 2:
                kill()
            return rename(self, other)

        Path.rename = dying  # type: ignore[method-assign, assignment]
        write_new()

    def fails_between() -> None:
        rename, calls = Path.rename, []

        def failing(self: Path, other: Path) -> Path:
            calls.append(self)
            if len(calls) == 2:
                raise OSError("no")
            return rename(self, other)

        Path.rename = failing  # type: ignore[method-assign, assignment]
        write_new()

    def interrupted() -> None:
        with written_whole(target) as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    target.mkdir()
    (target / "file").write_text("old")
    for work, raised in ((interrupted, "KeyboardInterrupt: "), (fails_between, "OSError: no")):
        assert in_child(work) == (0, raised)
        assert (target / "file").read_text() == "old" and list(tmp_path.iterdir()) == [target]
    assert in_child(killed_between) == (-signal.SIGKILL, "")
    assert not target.exists(), "absent, and the old content is in the hidden folder"
    (left,) = tmp_path.iterdir()
    assert (left / "old" / "file").read_text() == "old"
    write_new()
    assert (target / "file").read_text() == "new"
