"""Artefacts: what is saved comes back bit for bit, and everything else is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from pipes import images, pipeline
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from plain_run import make_predictor
from safetensors.torch import load_file, save_file
from tiny import LAYERS, Model, build, inputs, parameters_unchanged, run, same_bits
from torch import Tensor, nn

import tokencache_compile
from tokencache_compile import CacheArtefact, CacheConfig, CachePredictor, ConfigError, Schedule, artefact
from tokencache_compile.artefact import load_lora
from tokencache_compile.demo import DEFAULT_MODEL, DEFAULT_PLAN, DEFAULT_REFINED, SCHEDULER_CONFIG, load_reference
from tokencache_compile.fingerprint import explain_difference, fingerprint
from tokencache_compile.sampling import Conditions, sample

STEPS = 6
CONFIG = CacheConfig(
    ratio=0.7,
    last_k=1,
    context="cached",
    scorer="predictor",
    schedule=Schedule(every=3, full=(0, 2)),
    keep=((5, 4, 3), (2, 0, 6)),
    groups=(0, 0, 0, 1),
)
PLAIN = CacheConfig(ratio=0.5, last_k=1, context="reuse", scorer="random", schedule=Schedule(every=2))
LAST_BLOCK = r"transformer_blocks\.3\.(attn1\.to_q|ff\.net\.2)"
FILES = {
    "README.md",
    "tokencache.json",
    "predictor.safetensors",
    "calibration.safetensors",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
}


def adapter(folder: Path, model: Model, target: str = LAST_BLOCK, **changes: Any) -> Path:
    """A peft adapter as its own ``save_pretrained`` writes it; ``model`` is used up."""
    torch.manual_seed(7)
    wrapped: Any = peft.get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=target, init_lora_weights=False, **changes))
    wrapped.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def p_steps(model: Model, kind: str) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """A run of a transformed model, and the counts of its P-steps."""
    kept: list[tuple[int, ...]] = []
    model.step_callback = lambda report: kept.append(report.kept) if report.kind == "P" else None
    return run(model, kind, STEPS), kept


@pytest.fixture(scope="module")
def model() -> Model:
    return build("dit")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """A complete artefact of the tiny DiT: predictor, adapter and calibration."""
    parts = tmp_path_factory.mktemp("parts")
    save_file({"mean": torch.arange(6.0)}, parts / "kept.safetensors")
    made = CacheArtefact(
        config=CONFIG,
        base=fingerprint(model),
        predictor=make_predictor(model),
        lora_path=adapter(parts / "lora", build("dit")),
        calibration_path=parts / "kept.safetensors",
        steps=STEPS,
        provenance={"λ": 1e-4, "losses": [0.5, 0.25], "versions": {"torch": "2"}},
    )
    made.save_pretrained(parts / "made")
    return parts / "made"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "artefact"))


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of the manifest; None of them is checked by a hash."""
    path = folder / "tokencache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def manifest(folder: Path) -> Any:
    return json.loads((folder / "tokencache.json").read_text())


def relist(folder: Path) -> None:
    """Put the hashes of the data files as they are now into the manifest."""
    data = [name for name in FILES - {"README.md", "tokencache.json"} if (folder / name).exists()]
    edit(folder, files={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in data})


def refused(folder: Any, model: Model, match: str) -> None:
    with parameters_unchanged(model), pytest.raises(ConfigError, match=match):
        CacheArtefact.from_pretrained(folder, model)
    assert not hasattr(model, "peft_config")


# --- the fingerprint ------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float32).reshape(3, 2).t().to(dtype))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("computed", torch.rand(2), persistent=False)


def test_digests_are_over_sorted_names_and_bytes() -> None:
    small = Small()
    assert not small.weight.is_contiguous()
    found = fingerprint(small)
    assert found["class"] == "Small"
    assert found["tensors"] == {"count": ["int64", []], "weight": ["float32", [2, 3]]}
    for name, dtype in (("own", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        values = small.weight.detach().to(dtype).flatten().view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        plain = b"count\0" + (3).to_bytes(8, "little") + b"weight\0"
        plain += b"".join(int(value).to_bytes(dtype.itemsize, "little", signed=True) for value in values)
        assert found["weights"][name] == hashlib.sha256(plain).hexdigest()
    assert json.loads(json.dumps(found)) == found


def test_the_same_model_is_the_same(model: Model) -> None:
    found = fingerprint(model)
    assert explain_difference(found, fingerprint(build("dit"))) is None
    assert explain_difference(found, fingerprint(tokencache_compile.transform(model, backend="eager"))) is None


def test_adapters_do_not_change_the_base(model: Model, saved: Path) -> None:
    found = fingerprint(model)
    with_adapter: Any = peft.PeftModel.from_pretrained(build("dit"), str(saved / "lora")).get_base_model()
    assert any("lora_A" in name for name, _ in with_adapter.named_parameters())
    assert fingerprint(with_adapter) == found
    assert fingerprint(peft.get_peft_model(build("dit"), LoraConfig(target_modules=LAST_BLOCK))) == found
    with torch.no_grad():
        with_adapter.transformer_blocks[3].attn1.to_q.base_layer.weight[0, 0] += 1
    assert explain_difference(found, fingerprint(with_adapter)) == "its shapes are the same and its weights are others"


def one_weight(model: Model) -> None:
    with torch.no_grad():
        model.proj_out_2.bias[3] = torch.nextafter(model.proj_out_2.bias[3], torch.tensor(torch.inf))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build("pixart"), r"^its class is PixArtTransformer2DModel and not DiTTransformer2DModel$"),
        (lambda: build("dit", layers=LAYERS - 1), r"^it has no transformer_blocks\.3\.\S+, \S+, \S+ and \d+ more$"),
        (lambda: build("dit", layers=LAYERS + 1), r"^it also has transformer_blocks\.4\."),
        (lambda: build("dit", out_channels=4), r"^its shapes differ: proj_out_2.bias \[16\] and not \[32\], proj_out_2.weight \[16, 32\]"),
        (lambda: build("dit", std=0.3).to(torch.bfloat16), r"^its dtype and its weights differ: \S+ is bfloat16 and not float32, "),
        (lambda: build("dit", std=0.3), r"^its shapes are the same and its weights are others$"),
    ],
)
def test_differences_are_explained(model: Model, make: Callable[[], Model], reason: str) -> None:
    explained = explain_difference(fingerprint(model), fingerprint(make()))
    assert explained is not None and re.search(reason, explained), explained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_copy_is_the_same_model(model: Model, dtype: torch.dtype) -> None:
    cast = build("dit").to(dtype)
    assert explain_difference(fingerprint(model), fingerprint(cast)) is None
    assert explain_difference(fingerprint(cast), fingerprint(build("dit"))) is None
    with torch.no_grad():
        cast.proj_out_2.bias[3] += 0.01
    assert explain_difference(fingerprint(model), fingerprint(cast)) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_artefact_runs_on_a_cast_copy(saved: Path, model: Model, dtype: torch.dtype) -> None:
    """Training needs float32, deployment seldom: predictor and adapter are cast, and a P-step is near that of float32."""
    artefact = CacheArtefact.from_pretrained(saved, build("dit").to(dtype))
    assert artefact.predictor is not None and {p.dtype for p in artefact.predictor.parameters()} == {dtype}
    outputs = []
    for net in (model, build("dit").to(dtype)):
        dispatcher = tokencache_compile.transform(net, str(saved), backend="eager", schedule=Schedule(4))
        own, call = next(net.parameters()).dtype, inputs("dit")
        call = {name: value.to(own) if value.is_floating_point() else value for name, value in call.items()}
        with torch.no_grad():
            dispatcher(**call)
            call["timestep"] = call["timestep"] - 20
            outputs.append(dispatcher(**call).sample)
        assert dispatcher.summary().cached_steps == 1
    exact, cast = outputs
    assert cast.dtype == dtype and float((cast.float() - exact).norm() / exact.norm()) < 0.05


def test_the_last_bit_of_one_weight_counts(model: Model) -> None:
    other = build("dit")
    one_weight(other)
    assert explain_difference(fingerprint(model), fingerprint(other)) == "its shapes are the same and its weights are others"


def test_two_weights_that_change_places_are_others(model: Model) -> None:
    other = build("dit")
    blocks = other.transformer_blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]
    assert explain_difference(fingerprint(model), fingerprint(other)) is not None


def test_weights_that_are_not_in_memory(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"\.(weight|bias|pos_embed) of this DiTTransformer2DModel is on the meta device.*offloading"):
        fingerprint(build("dit").to("meta"))


def test_no_module() -> None:
    with pytest.raises(ConfigError, match=r"a DiTPipeline was given.*pipe\.transformer"):
        fingerprint(pipeline("dit"))


# --- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_a_run_from_the_directory_is_bit_for_bit_that_of_the_objects(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    predictor = make_predictor(model)
    CacheArtefact(config=CONFIG, base=fingerprint(model), predictor=predictor, steps=STEPS).save_pretrained(tmp_path / "a")
    expected, kept = p_steps(tokencache_compile.transform(model, config=CONFIG, predictor=predictor, backend="eager"), kind)
    got, kept_again = p_steps(tokencache_compile.transform(build(kind), tmp_path / "a", backend="eager"), kind)
    assert kept == kept_again == [(5, 4, 3), (2, 0, 6), (2, 0, 6)]  # I-steps: 0, 2, 5
    assert same_bits(got, expected)
    untrained = CachePredictor(model.transformer_blocks[0], predictor.head.in_features, LAYERS)
    other, _ = p_steps(tokencache_compile.transform(model, config=CONFIG, predictor=untrained, backend="eager"), kind)
    assert not same_bits(other, expected)  # so the scores do matter


def test_everything_comes_back(saved: Path, model: Model) -> None:
    read = CacheArtefact.from_pretrained(saved, model)
    assert set(contents(saved)) == FILES
    assert read.config == CONFIG
    assert read.steps == STEPS
    assert read.provenance == {"λ": 1e-4, "losses": [0.5, 0.25], "versions": {"torch": "2"}}
    assert read.base == fingerprint(model)
    assert read.predictor is not None and not read.predictor.training
    expected = make_predictor(model).state_dict()
    assert {name: t.tolist() for name, t in read.predictor.state_dict().items()} == {n: t.tolist() for n, t in expected.items()}
    assert read.lora_path is not None and load_file(read.lora_path / "adapter_model.safetensors")
    assert read.calibration_path is not None and torch.equal(load_file(read.calibration_path)["mean"], torch.arange(6.0))


def test_the_manifest_is_plain(saved: Path) -> None:
    found = manifest(saved)
    assert found["format_version"] == 1
    assert found["config"]["schedule"] == {"every": 3, "full": [0, 2]}
    assert found["files"].keys() == FILES - {"README.md", "tokencache.json"}
    for name, digest in found["files"].items():
        assert digest == hashlib.sha256((saved / name).read_bytes()).hexdigest()
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "tokencache-compile"


@pytest.mark.parametrize("config", [PLAIN, CacheConfig(scorer="change"), replace(PLAIN, ratio=1, schedule=Schedule(2, (0, 3, 4)))])
def test_settings_alone(config: CacheConfig, model: Model, tmp_path: Path) -> None:
    CacheArtefact(config=config, base=fingerprint(model)).save_pretrained(tmp_path / "a")
    assert set(contents(tmp_path / "a")) == {"README.md", "tokencache.json"}
    read = CacheArtefact.from_pretrained(str(tmp_path / "a"), model)
    assert read == CacheArtefact(config=config, base=fingerprint(model))


def test_an_edited_card_is_no_damage(folder: Path, model: Model) -> None:
    (folder / "README.md").write_text("my own words")
    assert CacheArtefact.from_pretrained(folder, model).config == CONFIG


# --- saving ---------------------------------------------------------------------------------------------------------


def test_saving_over_itself(folder: Path, model: Model) -> None:
    before = contents(folder)
    CacheArtefact.from_pretrained(folder, model).save_pretrained(folder)
    assert contents(folder) == before


def test_an_older_artefact_is_replaced_as_a_whole(folder: Path, model: Model) -> None:
    CacheArtefact(config=PLAIN, base=fingerprint(model)).save_pretrained(folder)
    assert set(contents(folder)) == {"README.md", "tokencache.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["artefact"]


def test_an_empty_directory_and_new_parents(model: Model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new" / "deep"):
        CacheArtefact(config=PLAIN, base=fingerprint(model)).save_pretrained(target)
        assert CacheArtefact.from_pretrained(target, model).config == PLAIN


def broken_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(state: Mapping[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(artefact, "save_file", half)


def broken_move(monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)


@pytest.mark.parametrize("breaks", [broken_write, broken_move])
def test_a_save_that_fails_leaves_the_old_one(
    breaks: Callable[[pytest.MonkeyPatch], None], folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    made = replace(CacheArtefact.from_pretrained(folder, model), steps=99)
    breaks(monkeypatch)
    with pytest.raises(OSError, match="disk full"):
        made.save_pretrained(folder)
    with pytest.raises(OSError, match="disk full"):
        made.save_pretrained(folder.parent / "fresh")
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["artefact"]
    monkeypatch.undo()
    made.save_pretrained(folder)
    assert manifest(folder)["steps"] == 99


def test_other_folders_are_not_overwritten(model: Model, folder: Path, tmp_path: Path) -> None:
    made = CacheArtefact(config=PLAIN, base=fingerprint(model))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine holds files and no tokencache\.json"):
        made.save_pretrained(tmp_path / "mine")
    (folder / "lora" / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"holds lora/notes\.txt, which is not part of an artefact"):
        made.save_pretrained(folder)
    assert contents(folder) == before
    with pytest.raises(ConfigError, match=r"README\.md is a file; pass a directory"):
        made.save_pretrained(tmp_path / "mine" / "README.md")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


def test_parts_that_are_missing_or_pickled(model: Model, tmp_path: Path) -> None:
    made = CacheArtefact(config=PLAIN, base=fingerprint(model))
    with pytest.raises(ConfigError, match=r"none/adapter_config\.json is needed and is no file. A peft adapter"):
        replace(made, lora_path=tmp_path / "none").save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"none\.safetensors is needed and is no file"):
        replace(made, calibration_path=tmp_path / "none.safetensors").save_pretrained(tmp_path / "a")
    torch.save({"mean": torch.zeros(3)}, tmp_path / "pickled.safetensors")
    with pytest.raises(ConfigError, match=r"pickled\.safetensors is no safetensors file .*Pass a safetensors file"):
        replace(made, calibration_path=tmp_path / "pickled.safetensors").save_pretrained(tmp_path / "a")
    torch.save({"mean": torch.zeros(3)}, tmp_path / "pickled.pt")
    with pytest.raises(ConfigError, match=r"pickled\.pt is no safetensors file"):
        replace(made, calibration_path=tmp_path / "pickled.pt").save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("provenance", [{"loss": float("nan")}, {"tensor": torch.zeros(1)}, {"names": {"a"}}])
def test_provenance_that_is_no_json(provenance: dict[str, Any], model: Model, folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"provenance=.* cannot be written as JSON"):
        CacheArtefact(config=PLAIN, base=fingerprint(model), provenance=provenance).save_pretrained(folder)
    assert contents(folder) == before


def test_parts_that_do_not_agree(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"scorer='predictor' and no predictor were given"):
        CacheArtefact(config=CONFIG, base=fingerprint(model))
    with pytest.raises(ConfigError, match=r"scorer='random' and a predictor were given"):
        CacheArtefact(config=PLAIN, base=fingerprint(model), predictor=make_predictor(model))


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "6"])
def test_steps(steps: Any, model: Model) -> None:
    with pytest.raises(ConfigError, match="steps="):
        CacheArtefact(config=PLAIN, base={}, steps=steps)


# --- what is refused on loading -------------------------------------------------------------------------------------


def test_no_directory(model: Model, folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", model, r"none is not a directory. Pass the directory of an artefact, or a hub id")
    refused(folder / "README.md", model, r"README\.md is not a directory")
    refused(str(folder / "README.md"), model, r"README\.md is not a directory")
    refused(tmp_path, model, r"tokencache\.json is missing, so \S+ is no artefact")


@pytest.mark.parametrize("text", ["", "{", '{"format_version": NaN}', "[" * 100_000, b"\xff\xfe\x00", "none"])
def test_a_manifest_that_is_no_json(text: str | bytes, folder: Path, model: Model) -> None:
    (folder / "tokencache.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, model, r"tokencache\.json is no JSON: .*again")


def test_a_truncated_manifest(folder: Path, model: Model) -> None:
    path = folder / "tokencache.json"
    path.write_bytes(path.read_bytes()[:-5])
    refused(folder, model, r"tokencache\.json is no JSON")


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_another_format(version: Any, folder: Path, model: Model) -> None:
    edit(folder, format_version=version)
    refused(folder, model, rf"has format version {version!r}, and this package \(\S+\) reads version 1. Install")


def test_json_of_something_else(folder: Path, model: Model) -> None:
    (folder / "tokencache.json").write_text("[1]")
    refused(folder, model, r"has format version None")


@pytest.mark.parametrize(
    ("field", "value"), [("config", []), ("steps", "6"), ("provenance", None), ("base", 1), ("files", ["predictor.safetensors"])]
)
def test_fields_of_another_type(field: str, value: Any, folder: Path, model: Model) -> None:
    edit(folder, **{field: value})
    refused(folder, model, rf"tokencache\.json has no valid {field}\. Save")


def test_missing_fields(folder: Path, model: Model) -> None:
    (folder / "tokencache.json").write_text('{"format_version": 1, "config": {}, "files": {}}')
    refused(folder, model, r"has no valid base, provenance, steps")


@pytest.mark.parametrize("steps", [0, True])
def test_saved_steps(steps: Any, folder: Path, model: Model) -> None:
    edit(folder, steps=steps)
    refused(folder, model, r"artefact: steps=")


@pytest.mark.parametrize("name", sorted(FILES - {"README.md", "tokencache.json"}))
def test_files_missing_cut_short_changed_or_unlisted(name: str, folder: Path, model: Model) -> None:
    path, whole = folder / name, (folder / name).read_bytes()
    listed = manifest(folder)["files"]
    for spoilt in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(spoilt)
        now = hashlib.sha256(spoilt).hexdigest()
        refused(folder, model, rf"{name} was changed or cut short: its SHA-256 is {now}, and tokencache\.json says {listed[name]}\. Save")
    path.unlink()
    refused(folder, model, rf"{name} is missing\. Save")
    path.write_bytes(whole)
    assert CacheArtefact.from_pretrained(folder, model).steps == STEPS
    top = Path(name).parts[0]  # an adapter's two files are listed together or not at all
    edit(folder, files={other: digest for other, digest in listed.items() if Path(other).parts[0] != top})
    refused(folder, model, rf"{top}.* is there, and tokencache\.json does not list it")


def test_listed_names(folder: Path, model: Model) -> None:
    listed = manifest(folder)["files"]
    edit(folder, files=listed | {"../outside": "0"})
    refused(folder, model, r"lists '\.\./outside', which is no file of an artefact")
    edit(folder, files={name: digest for name, digest in listed.items() if name != "lora/adapter_config.json"})
    refused(folder, model, r"lists one of lora/adapter_config\.json and lora/adapter_model\.safetensors; an adapter is both")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ratio": 1.5}, r": ratio=1\.5 was asked for; the cache ratio is"),
        ({"ratio": "0.9"}, r"\.ratio is '0\.9', where float is needed"),
        ({"context": ["kept"]}, r"\.context is \['kept'\], where one of 'kept', 'cached', 'full', 'reuse' is needed"),
        ({"keep": [[1, 2.5]]}, r"\.keep\[0\]\[1\] is 2\.5, where int is needed"),
        ({"groups": 3}, r"\.groups is 3, where a list is needed"),
        ({"schedule": {"every": 0, "full": None}}, r"\.schedule: every=0"),
        ({"schedule": {"every": 2, "full": [1, 2]}}, r"\.schedule: full=\(1, 2\)"),
        ({"schedule": {"every": 2}}, r"\.schedule has every for a Schedule; exactly every, full are needed"),
        ({"schedule": 4}, r"\.schedule is 4, where an object is needed"),
        ({"speed": 2}, r" has cache_dtype, .*speed, .*for a CacheConfig; exactly"),
    ],
)
def test_settings_that_are_invalid(change: dict[str, Any], reason: str, folder: Path, model: Model) -> None:
    edit(folder, config=manifest(folder)["config"] | change)
    refused(folder, model, rf"tokencache\.json: config{reason}")


def test_a_setting_that_is_missing(folder: Path, model: Model) -> None:
    config = manifest(folder)["config"]
    del config["ratio"]
    edit(folder, config=config)
    refused(folder, model, r"for a CacheConfig; exactly cache_dtype, .*ratio.* are needed")


def test_settings_and_files_that_do_not_agree(folder: Path, model: Model) -> None:
    edit(folder, config=manifest(folder)["config"] | {"scorer": "norm"})
    refused(folder, model, r"artefact: scorer='norm' and a predictor were given")


def test_another_base_model(saved: Path) -> None:
    refused(saved, build("dit", std=0.3), r"made for another base model: .*its shapes are the same and its weights are others\. Load")
    refused(saved, build("dit", std=0.3).to(torch.bfloat16), r"made for another base model: .*its dtype and its weights differ: ")
    refused(saved, build("pixart"), r"made for another base model: .*its class is PixArtTransformer2DModel")


@pytest.mark.parametrize("base", [{}, {"class": "A", "tensors": [], "weights": {}}, {"class": 1, "tensors": {}, "weights": {}}])
def test_a_base_that_is_no_fingerprint(base: Any, folder: Path, model: Model) -> None:
    edit(folder, base=base)
    refused(folder, model, r"has no valid base: the base model's class, tensors and weights are needed")


def test_a_fingerprint_that_cannot_be_read(folder: Path, model: Model) -> None:
    base = manifest(folder)["base"]
    edit(folder, base=base | {"tensors": dict.fromkeys(base["tensors"], 1)})
    refused(folder, model, r"has no readable fingerprint")
    edit(folder, base=base | {"weights": {}})
    refused(folder, model, r"has no readable fingerprint")


def without_head(state: dict[str, Tensor]) -> None:
    del state["head.weight"]


def vector_head(state: dict[str, Tensor]) -> None:
    state["head.weight"] = torch.zeros(4)


def deeper_head(state: dict[str, Tensor]) -> None:
    state["head.weight"], state["head.bias"] = torch.zeros(LAYERS + 1, 32), torch.zeros(LAYERS + 1)


def other_block(state: dict[str, Tensor]) -> None:
    state["block.attn1.to_q.weight"] = torch.zeros(32, 16)


def other_dtype(state: dict[str, Tensor]) -> None:
    state["head.weight"] = state["head.weight"].int()


def one_more(state: dict[str, Tensor]) -> None:
    state["block.extra"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without_head, r"its head\.weight \[blocks, channels\] is None"),
        (vector_head, r"its head\.weight \[blocks, channels\] is \[4\], and the model has 4 blocks"),
        (deeper_head, r"its head scores 5 blocks, and the model has 4"),
        (other_block, r"block\.attn1\.to_q\.weight is float \[32, 16\] and not float \[32, 32\]"),
        (other_dtype, r"head\.weight is int32 \[4, 32\] and not float \[4, 32\]"),
        (one_more, r"block\.extra is float \[1\] and not None"),
    ],
)
def test_a_predictor_that_does_not_fit(spoil: Callable[[dict[str, Tensor]], None], reason: str, folder: Path, model: Model) -> None:
    path = folder / "predictor.safetensors"
    state = load_file(path)
    spoil(state)
    save_file(state, path)
    relist(folder)
    refused(folder, model, rf"the predictor does not fit this model: {reason}.*Train a predictor for this model")


def test_a_first_block_with_an_adapter(saved: Path, tmp_path: Path) -> None:
    style = adapter(tmp_path / "style", build("dit"), r"transformer_blocks\.0\.attn1\.to_q")
    model: Any = peft.PeftModel.from_pretrained(build("dit"), str(style)).get_base_model()
    with parameters_unchanged(model), pytest.raises(ConfigError, match=r"does not fit .*base_layer.* remove the adapters from its first"):
        CacheArtefact.from_pretrained(saved, model)


def test_a_predictor_that_is_pickled(folder: Path, model: Model) -> None:
    torch.save(make_predictor(model).state_dict(), folder / "predictor.safetensors")
    relist(folder)
    refused(folder, model, r"predictor\.safetensors is no safetensors file")


# --- the hub --------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded(saved: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr(artefact, "snapshot_download", download)
    read = CacheArtefact.from_pretrained("someone/plan", model, revision="v1", cache_dir=tmp_path, token="secret", local_files_only=True)
    assert read.config == CONFIG
    (repo_id, options) = asked[0]
    assert repo_id == "someone/plan"
    given = {"revision": "v1", "cache_dir": str(tmp_path), "token": "secret", "local_files_only": True}
    assert {name: options[name] for name in given} == given
    assert set(options["allow_patterns"]) == FILES - {"README.md"}
    dispatcher = tokencache_compile.transform(build("dit"), "someone/plan", backend="eager")
    assert dispatcher.cache_config == CONFIG
    assert [repo_id for repo_id, _ in asked] == ["someone/plan"] * 2


def test_a_hub_that_has_nothing(model: Model, tmp_path: Path) -> None:
    for name in ("someone/plan", "./not-there", "a/b/c"):
        with pytest.raises(ConfigError, match=rf"'{name}' is no directory, and the hub did not give it: \S.*Check the name"):
            CacheArtefact.from_pretrained(name, model, cache_dir=tmp_path, local_files_only=True)


def test_push_and_load_again(saved: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any, dict[str, Any]]] = []

    def create(self: HfApi, repo_id: str, **options: Any) -> Any:
        calls.append(("create_repo", self.token, {"repo_id": repo_id} | options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload(self: HfApi, *, folder_path: Path, **options: Any) -> str:
        calls.append(("upload_folder", self.token, options))
        shutil.copytree(folder_path, tmp_path / "uploaded")
        return "the commit"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    made = CacheArtefact.from_pretrained(saved, model)
    commit: Any = made.push_to_hub("plan", token="secret", private=True, revision="v1", commit_message="First")
    assert commit == "the commit"
    removed = FILES - {"README.md", "tokencache.json"}
    assert calls[0] == ("create_repo", "secret", {"repo_id": "plan", "private": True, "exist_ok": True})
    assert set(calls[1][2].pop("delete_patterns")) == removed
    assert calls[1] == ("upload_folder", "secret", {"repo_id": "me/plan", "revision": "v1", "commit_message": "First"})
    assert contents(tmp_path / "uploaded") == contents(saved)


# --- the adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 3}}], ids=["plain", "rslora", "ranks"])
def test_the_adapter_is_read_and_the_model_left_alone(changes: dict[str, Any], tmp_path: Path) -> None:
    """Against what peft's own layers give."""
    path, model = adapter(tmp_path / "lora", build("dit"), **changes), build("dit")
    with parameters_unchanged(model):
        updates = {update.module: update for update in load_lora(model, path)}
    assert not hasattr(model, "peft_config") and set(updates) == {"transformer_blocks.3.attn1.to_q", "transformer_blocks.3.ff.net.2"}
    theirs: Any = peft.PeftModel.from_pretrained(build("dit"), str(path)).get_base_model()
    for name, update in updates.items():
        layer = theirs.get_submodule(name)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(model.get_submodule(name)(x) + x @ update.down.t() @ update.up.t(), layer(x))


def test_a_model_that_carries_the_adapter_is_refused(saved: Path) -> None:
    model: Any = peft.PeftModel.from_pretrained(build("dit"), str(saved / "lora"), adapter_name="mine").get_base_model()
    with parameters_unchanged(model), pytest.raises(ConfigError, match=r"carries the adapter in .* already, in every step"):
        tokencache_compile.transform(model, saved, backend="eager")


def test_transforming_again_adds_nothing(saved: Path) -> None:
    model = build("dit")
    first = run(tokencache_compile.transform(model, saved, backend="eager"), "dit", STEPS)
    assert same_bits(run(tokencache_compile.transform(model, saved, backend="eager"), "dit", STEPS), first)


def test_the_adapter_is_not_loaded_into_another_model(saved: Path) -> None:
    for plan in (saved, CacheArtefact.from_pretrained(saved, build("dit"))):
        other = build("dit", std=0.3)
        with parameters_unchanged(other), pytest.raises(ConfigError, match="made for another base model"):
            tokencache_compile.transform(other, plan, backend="eager")
        assert not hasattr(other, "peft_config")


def wrong_shape(state: dict[str, Tensor]) -> None:
    name = next(iter(state))
    state[name] = torch.zeros(7, 7)


def nowhere(state: dict[str, Tensor]) -> None:
    state["base_model.model.transformer_blocks.7.attn1.to_q.lora_A.weight"] = torch.zeros(2, 32)
    state["base_model.model.transformer_blocks.7.attn1.to_q.lora_B.weight"] = torch.zeros(32, 2)


def too_little(state: dict[str, Tensor]) -> None:
    del state[next(iter(state))]


def no_linear(state: dict[str, Tensor]) -> None:
    state["base_model.model.transformer_blocks.3.norm1.lora_A.weight"] = torch.zeros(2, 32)
    state["base_model.model.transformer_blocks.3.norm1.lora_B.weight"] = torch.zeros(32, 2)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (wrong_shape, r"is 32 → 32, and the adapter's A and B are \(7, 7\) and \(32, 2\)"),
        (nowhere, r"the model has no transformer_blocks\.7\.attn1\.to_q"),
        (too_little, r"it has no weights lora_A for transformer_blocks\.3\.attn1\.to_q"),
        (no_linear, r"transformer_blocks\.3\.norm1 is no torch\.nn\.Linear"),
    ],
)
def test_an_adapter_that_does_not_fit(spoil: Callable[[dict[str, Tensor]], None], reason: str, folder: Path) -> None:
    path, model = folder / "lora" / "adapter_model.safetensors", build("dit")
    state = load_file(path)
    spoil(state)
    save_file(state, path)
    with parameters_unchanged(model), pytest.raises(ConfigError, match=f"does not fit this DiTTransformer2DModel: .*{reason}"):
        load_lora(model, folder / "lora")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, r"has use_dora=True\. P-steps take plain LoRA"),
        ({"bias": "all"}, "has bias='all'"),
        ({"alpha_pattern": {"to_q": 3}}, r"has alpha_pattern=\{'to_q': 3\}"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, "is none of peft's LORA"),
    ],
)
def test_an_adapter_that_is_no_plain_lora(changes: dict[str, Any], reason: str, folder: Path) -> None:
    path = folder / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=reason):
        load_lora(build("dit"), folder / "lora")


def test_a_weight_beside_lora_is_refused(folder: Path, model: Model) -> None:
    path = folder / "lora" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.transformer_blocks.3.attn1.to_q.bias": torch.zeros(32)}, path)
    with pytest.raises(ConfigError, match=r"holds base_model\.model\.transformer_blocks\.3\.attn1\.to_q\.bias, which is no weight of LoRA"):
        load_lora(model, folder / "lora")


def test_no_adapter(folder: Path, tmp_path: Path, model: Model) -> None:
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json, so it is no adapter"):
        load_lora(model, tmp_path)
    (folder / "lora" / "adapter_model.safetensors").write_bytes(b"pickled")
    with pytest.raises(ConfigError, match=r"the adapter in \S+ is no safetensors file"):
        load_lora(model, folder / "lora")
    (folder / "lora" / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config\.json is no JSON"):
        load_lora(model, folder / "lora")


# --- transform's second argument ------------------------------------------------------------------------------------


def config_of(model: Model, *args: Any, **options: Any) -> CacheConfig:
    config: CacheConfig = tokencache_compile.transform(model, *args, backend="eager", **options).cache_config
    return config


def test_ratio_by_position_and_by_keyword(model: Model) -> None:
    assert config_of(model) == config_of(model, None) == config_of(model, ratio=None) == CacheConfig()
    assert config_of(model, 0.6) == config_of(model, ratio=0.6) == config_of(model, plan=0.6) == CacheConfig(ratio=0.6)
    assert config_of(model, PLAIN) == config_of(model, config=PLAIN) == PLAIN
    assert config_of(model, PLAIN, ratio=0.3, last_k=0) == replace(PLAIN, ratio=0.3, last_k=0)


def test_a_run_by_position_is_that_by_keyword(model: Model) -> None:
    settings: dict[str, Any] = {"last_k": 1, "backend": "eager"}
    first = run(tokencache_compile.transform(model, 0.6, **settings), "dit", STEPS)
    assert same_bits(first, run(tokencache_compile.transform(model, ratio=0.6, **settings), "dit", STEPS))


def test_plans_of_components_for_a_model(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"plans of transformer were given with a DiTTransformer2DModel; components are a pipeline's"):
        tokencache_compile.transform(model, {"transformer": 0.9}, backend="eager")


@pytest.mark.parametrize("given", [1.5, True, [0.9], object()])
def test_a_plan_that_is_nothing(given: Any, model: Model) -> None:
    with pytest.raises(ConfigError, match="ratio="):
        tokencache_compile.transform(model, given, backend="eager")


def test_given_twice(model: Model, saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"two ratios were given, 0\.5 and 0\.6"):
        config_of(model, 0.5, ratio=0.6)
    with pytest.raises(ConfigError, match="two configs were given"):
        config_of(model, PLAIN, config=PLAIN)
    for beside in ({"config": PLAIN}, {"predictor": make_predictor(model)}):
        with pytest.raises(ConfigError, match="an artefact brings its own config and predictor"):
            config_of(model, saved, **beside)


def test_an_artefact_and_single_settings(saved: Path) -> None:
    for plan in (saved, str(saved), CacheArtefact.from_pretrained(saved, build("dit"))):
        assert config_of(build("dit"), plan) == CONFIG
        assert config_of(build("dit"), plan, forecast=1) == replace(CONFIG, forecast=1)
        assert config_of(build("dit"), plan, ratio=0.2, keep=None, groups=()) == replace(CONFIG, ratio=0.2, keep=None, groups=())
        other = tokencache_compile.transform(build("dit"), plan, scorer="norm", backend="eager")
        assert other.predictor is None and other.cache_config == replace(CONFIG, scorer="norm")


def test_a_ratio_does_not_change_calibrated_counts(saved: Path) -> None:
    model = build("dit")
    with pytest.raises(ConfigError, match=r"ratio=0\.2 was asked for, and the artefact lists calibrated token counts.*keep=None"):
        config_of(model, saved, ratio=0.2)
    assert not hasattr(model, "peft_config")


def test_a_pipeline_with_an_artefact(saved: Path, tmp_path: Path) -> None:
    without_adapter = replace(CacheArtefact.from_pretrained(saved, build("dit")), lora_path=None)
    without_adapter.save_pretrained(tmp_path / "a")
    predictor = make_predictor(build("dit"))
    expected = images(tokencache_compile.transform(pipeline("dit"), CONFIG, predictor=predictor, backend="eager"), STEPS)
    pipe = tokencache_compile.transform(pipeline("dit"), tmp_path / "a", backend="eager")
    assert torch.equal(images(pipe, STEPS), expected)
    again = tokencache_compile.transform(pipe, without_adapter, backend="eager")  # transformed anew, from the original inside
    assert torch.equal(images(again, STEPS), expected)


def test_the_config_in_the_manifest_is_the_dataclass(saved: Path) -> None:
    assert manifest(saved)["config"] == json.loads(json.dumps(asdict(CONFIG)))


# --- what ships -----------------------------------------------------------------------------------------------------


def test_the_shipped_lora_is_the_shipped_plan_but_for_k_and_the_adapter() -> None:
    net = load_reference(DEFAULT_MODEL)
    plan, refined = (CacheArtefact.from_pretrained(folder, net) for folder in (DEFAULT_PLAN, DEFAULT_REFINED))
    assert refined.config == replace(plan.config, last_k=3)
    assert (DEFAULT_REFINED / "predictor.safetensors").samefile(DEFAULT_PLAN / "predictor.safetensors")
    assert plan.lora_path is None and refined.lora_path is not None
    assert {int(update.module.split(".")[1]) for update in load_lora(net, refined.lora_path)} == {9, 10, 11}


class FirstSteps(DDIMScheduler):
    """The first 8 steps of the grid: a cached step errs most there."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps[:8]


def test_the_shipped_lora_brings_p_steps_closer() -> None:
    """At least 2 % in the mean square of Δ pred_x0 over two intervals of the shipped plan, guided, on noises that are not the demo's."""
    net = load_reference(DEFAULT_MODEL)
    refined = CacheArtefact.from_pretrained(DEFAULT_REFINED, net)
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1000))

    def predictions(model: Any, scheduler: Any) -> Tensor:
        seen: list[Tensor] = []
        sample(model, scheduler, noise, 50, Conditions.of_labels(torch.arange(4), 10, 2.5), lambda _, x: seen.append(x))
        return torch.stack(seen)

    uncached = predictions(net, FirstSteps(**SCHEDULER_CONFIG))

    def error(plan: CacheArtefact) -> float:
        scheduler = FirstSteps(**SCHEDULER_CONFIG)
        dispatcher = tokencache_compile.transform(net, plan, backend="eager", scheduler=scheduler)
        found = predictions(dispatcher, scheduler)
        assert (dispatcher.summary().full_steps, dispatcher.summary().cached_steps) == (2, 6)
        return float((found - uncached).square().mean())

    with_lora, without = error(refined), error(replace(refined, lora_path=None))
    assert with_lora < 0.98 * without
