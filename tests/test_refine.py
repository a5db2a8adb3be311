"""Phase 2 of training from end to end: runs of ``refine``, and its adapter in inference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from accelerate.state import AcceleratorState
from adapters import CONFIG, DIT_LINEARS, NULL, ROWS, Hard, names_of, shape_of
from plain_run import assert_close, make_predictor, safe_run
from safetensors.torch import load_file
from tiny import (
    TOKENS,
    Model,
    build,
    call_of,
    conditions,
    ddim,
    inputs,
    parameters_unchanged,
    same_bits,
    sample,
    sampler,
    transformed,
)
from torch import Tensor, nn

import tokencache_compile
from tokencache_compile import CacheArtefact, CacheConfig, Schedule
from tokencache_compile.errors import ConfigError, InputError
from tokencache_compile.export.manifest import WEIGHTS
from tokencache_compile.fingerprint import fingerprint
from tokencache_compile.learn.loop import Batches
from tokencache_compile.learn.lora import added_lora, refine
from tokencache_compile.learn.train import TrainingConfig

peft = pytest.importorskip("peft")
BaseTunerLayer = pytest.importorskip("peft.tuners.tuners_utils").BaseTunerLayer

TRAINING = TrainingConfig(steps=4, batch=ROWS, lr=1e-3, label_dropout=0.0, sampling_steps=6, checkpoint_every=2)
LONG = replace(TRAINING, steps=60, lr=1e-2)
GUIDED = replace(TRAINING, guidance=2.5)
PAIRS: dict[str, Any] = {"config": replace(CONFIG, selection="pair"), "training": GUIDED, "null": {"class_labels": torch.tensor(NULL)}}


class Data:
    """A few samples of noise with class labels."""

    def __init__(self, items: int = 4, fails_at: int | None = None) -> None:
        self.samples: Any = sample(items, seed=9)
        self.fails_at, self.read = fails_at, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.read += 1
        if self.read == self.fails_at:
            raise OSError("the disk is gone")
        return self.samples[index], {"class_labels": torch.tensor(index)}


def load_adapter(model: Model, folder: Path, name: str) -> Model:
    """Put an adapter into ``model`` by peft's own functions, beside what it carries."""
    active = list(getattr(model, "peft_config", {}))
    peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(folder)), model, name)
    result: Any = peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), name)
    assert not result.unexpected_keys
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([*active, name])
    return model.eval()


# -- the run ----------------------------------------------------------------------------------------------------------


def run(model: Model, out: Path, config: CacheConfig = CONFIG, training: TrainingConfig = TRAINING, **changes: Any) -> Path:
    given: dict[str, Any] = {"predictor": make_predictor(build("dit")), "data": Data(), "rank": 4} | changes
    predictor, data = given.pop("predictor"), given.pop("data")
    return refine(model, predictor, data, sampler(6), config, training, out, **given)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["cache_loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a longer run."""
    return run(build("dit"), tmp_path_factory.mktemp("run"), training=LONG)


def test_training_lowers_the_loss_on_what_it_never_saw(trained: Path) -> None:
    """Other samples, noise and labels, at every P-step; against the model without the adapter on the same windows."""
    hard = Hard(CONFIG, build("dit"), make_predictor(build("dit")))
    weights = load_file(trained / "adapter_model.safetensors")
    ratios = []
    with added_lora(hard.model, hard.targets, rank=4):
        window, loss_of, _ = hard.window()

        def loss(index: int, scale: float) -> float:
            peft.set_peft_model_state_dict(hard.model, {name: value * scale for name, value in weights.items()})
            return float(loss_of(hard.step(window, index)).detach())

        for seed in range(30, 35):
            hard.clean, hard.noise = sample(ROWS, seed), sample(ROWS, seed + 50)
            hard.labels = torch.tensor([seed, 2 * seed])
            ratios += [loss(index, 1.0) / loss(index, 0.0) for index in (1, 2, 4, 5)]
        assert float(torch.tensor(ratios).median()) < 0.8

        # The log's first row, before anything is learned, is the loss of what (seed, 0) draws.
        hard.clean, hard.noise, given, index, _ = Batches(Data(), None, LONG, [1, 2, 4, 5], 0, 1).draw(0)
        hard.labels = given["class_labels"]
        row, *later = map(json.loads, (trained.parent / "log.jsonl").read_text().splitlines())
        expected = pytest.approx(loss(index, 0.0), rel=1e-5)
        assert row == {"step": 1, "p_step": index, "cache_loss": expected, "without_lora": expected}
        assert [other["step"] for other in later] == list(range(2, LONG.steps + 1))


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, predictor = build("dit"), make_predictor(build("dit"))
    before, scores = shape_of(model), shape_of(predictor)
    with parameters_unchanged(model), parameters_unchanged(predictor):
        folder = run(model, tmp_path / "a", predictor=predictor)
        assert shape_of(model) == before and shape_of(predictor) == scores
        with pytest.raises(OSError, match="the disk is gone"):
            run(model, tmp_path / "b", data=Data(fails_at=3 * ROWS + 2))
        assert shape_of(model) == before
    assert len(losses(tmp_path / "b")) == 2  # item 0 is read first, and a batch to capture the model
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert set(config["target_modules"]) == names_of(DIT_LINEARS, 3)


@pytest.mark.parametrize("given", [{"training": TRAINING}, PAIRS], ids=["unguided", "guided"])
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, given: dict[str, Any]) -> None:
    model, given = build("dit"), given | {"training": replace(given["training"], ema_decay=0.9)}
    whole = run(model, tmp_path / "whole", **given)
    with pytest.raises(OSError, match="the disk is gone"):
        run(model, tmp_path / "parts", data=Data(fails_at=4 * ROWS + 2), **given)
    assert len(losses(tmp_path / "parts")) == 3  # the third step's row is past the checkpoint
    parts = run(model, tmp_path / "parts", **given)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "parts" / "log.jsonl").read_text()


def test_the_average_is_what_is_returned(tmp_path: Path) -> None:
    """After one step: of the first weights 2/11, of the last 9/11."""
    folder = run(build("dit"), tmp_path, training=replace(TRAINING, steps=1, ema_decay=0.9))
    model = build("dit")
    with added_lora(model, sorted(names_of(DIT_LINEARS, 3)), rank=4, seed=TRAINING.seed):
        first = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        got = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    saved = load_file(tmp_path / "checkpoint.safetensors")
    last = [saved[f"lora.{i}"] for i in range(len(first))]
    for before, after, mean in zip(first, last, got, strict=True):
        assert torch.allclose(mean, (2 * before + 9 * after) / 11, atol=1e-7)
    assert any(not torch.equal(before, after) for before, after in zip(first, last, strict=True))


@pytest.fixture
def other_precision() -> Iterator[None]:
    """accelerate fixes the precision of a process at its first use."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_trains_too(tmp_path: Path, other_precision: None) -> None:
    folder = run(build("dit"), tmp_path, training=replace(TRAINING, mixed_precision="bf16"))
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in weights.values())
    assert all(float(value.abs().max()) > 0 for name, value in weights.items() if ".lora_B." in name)


def test_guidance_trains_on_pairs_with_one_selection(tmp_path: Path) -> None:
    """The first row, before anything is learned, is the guided window's own loss; the halves' own selections give another."""
    model = build("dit")
    with parameters_unchanged(model):
        folder = run(model, tmp_path / "pair", **PAIRS)
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(float(value.abs().max()) > 0 for name, value in weights.items() if ".lora_B." in name)

    hard = Hard(PAIRS["config"], build("dit"), make_predictor(build("dit")), GUIDED.guidance)
    hard.clean, hard.noise, given, index, _ = Batches(Data(), None, GUIDED, [1, 2, 4, 5], 0, 1).draw(0)
    hard.labels = given["class_labels"]
    with added_lora(hard.model, hard.targets, rank=4):
        window, loss_of, drawn = hard.window()
        torch._foreach_zero_([weight.detach() for weight in drawn])
        expected = float(loss_of(hard.step(window, index)).detach())
    assert losses(tmp_path / "pair")[0] == pytest.approx(expected, rel=1e-5)

    run(model, tmp_path / "sample", **PAIRS | {"config": CONFIG, "training": replace(GUIDED, steps=1)})
    assert losses(tmp_path / "sample")[0] != pytest.approx(expected, rel=1e-2)


def test_a_guided_run_lowers_the_guided_error(tmp_path: Path) -> None:
    """Over the run, each step's loss beside that of the same step without the adapter."""
    run(build("dit"), tmp_path, **PAIRS | {"training": replace(GUIDED, steps=60, lr=1e-2)})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    ratios = torch.tensor([row["cache_loss"] / row["without_lora"] for row in rows])
    assert float(ratios[0]) == pytest.approx(1.0, rel=1e-4) and float(ratios[-20:].median()) < 0.8


def test_without_guidance_a_pair_selection_is_trained_as_one_per_sample(trained: Path, tmp_path: Path) -> None:
    run(build("dit"), tmp_path, replace(CONFIG, selection="pair"), replace(LONG, steps=1))
    assert losses(tmp_path) == losses(trained.parent)[:1]


def test_without_a_cost_weight_every_step_counts_alike(trained: Path, tmp_path: Path) -> None:
    """Adam's first step is blind to the loss's scale; the second weighs the first two gradients, so the third loss tells."""
    run(build("dit"), tmp_path, training=replace(LONG, steps=3, cost_weight=None))
    found, absolute = losses(tmp_path), losses(trained.parent)
    assert found[:2] == pytest.approx(absolute[:2], rel=1e-4)
    assert found[2] != pytest.approx(absolute[2], rel=1e-4)


def test_labels_are_dropped_to_the_null_condition(trained: Path, tmp_path: Path) -> None:
    """All dropped: the same run as on data that has nothing but the null label."""
    null, training = {"class_labels": torch.tensor(1000)}, replace(LONG, steps=1)

    class Unconditional(Data):
        def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            return super().__getitem__(index)[0], null

    run(build("dit"), tmp_path / "a", training=replace(training, label_dropout=1.0), null=null)
    run(build("dit"), tmp_path / "b", training=training, data=Unconditional())
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(trained.parent)[:1]


def test_the_checkpoint_of_another_run_is_refused(trained: Path) -> None:
    other, rows = make_predictor(build("dit")), losses(trained.parent)
    nn.init.ones_(other.head.bias)
    with pytest.raises(ConfigError, match="is the checkpoint of another run"):
        run(build("dit"), trained.parent, training=LONG, predictor=other)
    assert losses(trained.parent) == rows


@pytest.mark.parametrize(
    "config, training, given, message",
    [
        (replace(CONFIG, last_k=0), TRAINING, {}, "last_k=0 was asked for"),
        (replace(CONFIG, ratio=0.0), TRAINING, {}, "ratio=0 was asked for"),
        (CONFIG, TRAINING, {"rank": 0}, "rank=0 was asked for"),
        (CONFIG, TRAINING, {"predictor": None}, 'scorer="predictor" was asked for without a predictor'),
        (CONFIG, replace(TRAINING, label_dropout=0.1), {}, "without null conditions"),
        (CONFIG, GUIDED, {}, "guidance=2.5 was asked for without null conditions"),
        (replace(CONFIG, schedule=Schedule(1)), TRAINING, {}, "has no P-step among 6 steps"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(
    tmp_path: Path, config: CacheConfig, training: TrainingConfig, given: dict[str, Any], message: str
) -> None:
    model = build("dit")
    before = shape_of(model)
    with pytest.raises(ConfigError, match=message):
        run(model, tmp_path, config, training, **given)
    assert shape_of(model) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.train(), "DiTTransformer2DModel is in training mode"),
        (lambda model: model.bfloat16(), r"has weights of \['torch.bfloat16'\].* Load it in float32"),
        (lambda model: model.to("meta"), "DiTTransformer2DModel is on meta, and the run on"),
    ],
    ids=["training mode", "half precision", "another device"],
)
def test_a_model_that_cannot_be_trained_is_refused(tmp_path: Path, change: Callable[[Model], Model], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(change(build("dit")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_items_of_unequal_shapes_are_refused(tmp_path: Path) -> None:
    data = Data()
    data.samples = [*data.samples[:1], *data.samples[1:, :, :4]]
    with pytest.raises(InputError, match=r"has {'sample': \(4, 4, 8\).* item 0 has {'sample': \(4, 8, 8\)"):
        run(build("dit"), tmp_path, data=data)


# -- the adapter in inference -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artefact(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with the adapter."""
    model, folder = build("dit"), tmp_path_factory.mktemp("artefact") / "made"
    CacheArtefact(config=CONFIG, base=fingerprint(model), predictor=make_predictor(model), lora_path=trained).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("style", [False, True], ids=["alone", "beside another adapter"])
def test_the_adapter_acts_in_p_steps_alone(trained: Path, artefact: Path, tmp_path: Path, style: bool) -> None:
    """Against the plain loop: I-steps on the original model, P-steps on one with the adapter merged by peft itself.

    The model is left as it was, also where it carries an adapter of its own on the same layers, which acts in every step.
    """

    def original() -> Model:
        model = build("dit")
        return load_adapter(model, tmp_path, "style") if style else model

    if style:
        torch.manual_seed(3)
        targets = sorted(names_of(("attn1.to_q", "ff.net.2"), 3))
        drawn: Any = peft.get_peft_model(build("dit"), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        drawn.save_pretrained(tmp_path)
    model, refined = original(), merged(original(), trained)
    before, profiles = shape_of(model), [(5, 5, 5)]
    seed, expected = safe_run(model, "dit", CONFIG, profiles, make_predictor(build("dit")), 6, refined)
    _, unrefined = safe_run(model, "dit", CONFIG, profiles, make_predictor(build("dit")), 6)
    with parameters_unchanged(model):
        dispatcher = tokencache_compile.transform(model, artefact, backend="eager")
        call, plain = call_of(dispatcher, conditions("dit")), call_of(model, conditions("dit"))
        got = ddim(call, sample(seed=seed), 6)
        assert dispatcher.plan.profiles == tuple(profiles)
        assert_close(got, expected)
        assert float((got[1] - unrefined[1]).abs().max()) > 1e-3, "the adapter changes nothing"
        assert torch.equal(got[0], plain(0, sample(seed=seed), torch.full((4,), int(sampler(6).timesteps[0]))))
        dispatcher.disable()
        assert same_bits(ddim(call, sample(seed=seed), 6), ddim(plain, sample(seed=seed), 6))
    assert shape_of(model) == before


def merged(model: Model, folder: Path) -> Model:
    """``model`` with the adapter in ``folder``, and what it carried, added to its weights by peft's own arithmetic."""
    load_adapter(model, folder, "refined")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return model


def test_p_steps_share_the_weights_and_count_the_adapter(artefact: Path) -> None:
    """By the identity of the tensors, and 2 (in + out) rank MACs a token and linear more."""
    model = build("dit")
    steps = tokencache_compile.transform(model, artefact, backend="eager", example_inputs=inputs("dit")).steps
    plain = transformed(model, config=CONFIG, predictor=make_predictor(model), example_inputs=inputs("dit")).steps
    own = dict(model.named_parameters())
    for step in (steps.full, *steps.cached):
        weights = {name: value for name, value in step.module.named_parameters() if not name.startswith("predictor.")}
        added = {name for name in weights if ".lora_" in name}
        assert all(weights[name] is own[name] for name in weights.keys() - added)
        buffers = {name for name, _ in step.module.named_buffers() if ".lora_" in name}
        assert len(added | buffers) == (0 if step.kind == "I" else 2 * len(DIT_LINEARS))
    widths = [model.get_submodule(name).weight.shape for name in names_of(DIT_LINEARS, 3)]
    assert steps.macs_full == plain.macs_full
    assert steps.macs_cached[0] - plain.macs_cached[0] == 4 * TOKENS * sum(4 * (o + i) for o, i in widths)


def test_a_bundle_has_the_adapter_in_its_p_steps(artefact: Path, tmp_path: Path) -> None:
    """ONNX Runtime gives eager's run; the I-graph's file names no weight of the adapter, and no weight is there twice."""
    model = build("dit")
    dispatcher = tokencache_compile.transform(model, artefact, backend="eager", example_inputs=inputs("dit"))
    tokencache_compile.export_onnx(dispatcher, tmp_path / "bundle")
    loaded = tokencache_compile.load(tmp_path / "bundle")
    assert_close(run_of(loaded), run_of(dispatcher), 1e-4)
    names = {
        step: {tensor.name for tensor in onnx.load(tmp_path / "bundle" / f"{step}.onnx", load_external_data=False).graph.initializer}
        for step in ("full", "cached_0")
    }
    held = set(load_file(tmp_path / "bundle" / WEIGHTS))
    assert not any(".lora_" in name for name in names["full"])
    assert sum(".lora_" in name for name in names["cached_0"]) == sum(".lora_" in name for name in held) == 2 * len(DIT_LINEARS)
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert all(name in own or name.startswith("predictor.") or ".lora_" in name for name in held)


def run_of(model: Model) -> list[Tensor]:
    return ddim(call_of(model, conditions("dit")), sample(), 6)


def test_it_is_refused_where_its_blocks_are_cached(artefact: Path) -> None:
    dispatcher = tokencache_compile.transform(build("dit"), artefact, last_k=0, backend="eager")
    with pytest.raises(ConfigError, match=r"refines transformer_blocks\.3\.\S+, and the plan's last K blocks.* begin at none \(K = 0\)"):
        dispatcher(**inputs("dit"))
    uncached = tokencache_compile.transform(build("dit"), artefact, last_k=0, ratio=0.0, backend="eager")
    assert torch.equal(uncached(**inputs("dit")).sample, build("dit")(**inputs("dit")).sample)
