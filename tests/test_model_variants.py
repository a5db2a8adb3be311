"""Transformers that are not as they were trained: adapters, quantised and cast weights, offloading, other caches.

What transforms is checked as every class is (``check_family``): the I-step bit for bit, a P-step of all tokens, and one at ratio 0.9
against the independent reference. What does not is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pipes import images, pipeline
from typing import Any

import pytest
import torch
from check_family import TOLERANCE, check, error
from diffusers import DiTTransformer2DModel, TorchAoConfig
from diffusers.hooks import FirstBlockCacheConfig, LayerSkipConfig, apply_layer_skip
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from families import FAMILIES, Family, Given
from tiny import build

from tokencache_compile import UnsupportedModelError, transform
from tokencache_compile.fingerprint import explain_difference, fingerprint
from tokencache_compile.model_state import model_state

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

Model = Any
Change = Callable[[Model], Any]
SMALL = 1e-3  # how far a step on a changed timestep may be from the model's own
SD3, DIT = "SD3Transformer2DModel", "DiTTransformer2DModel"
CPU = torch.device("cpu")


class AdaptedDiT(DiTTransformer2DModel, PeftAdapterMixin):  # type: ignore[misc]
    """The model that captures fastest, with the adapter methods that diffusers gives to larger ones."""


@dataclass(frozen=True)
class Variant(Family):
    """A family's model after ``change``, which may return another model."""

    change: Change | None = None

    def build(self) -> tuple[Model, Given]:
        model: Model
        model, given = super().build()
        if self.name == DIT:
            model.__class__ = AdaptedDiT
        if self.change is not None:
            model = self.change(model) or model
        return model.eval(), {name: v.to(model.dtype) if _is_float(v) else v for name, v in given.items()}


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def variant(key: str, change: Change | None = None) -> Variant:
    return Variant(**vars(FAMILIES[key]), change=change)


def add_lora(model: Model, name: str = "first", **settings: Any) -> None:
    """An adapter on attention, on the MLP and outside the blocks."""
    attention = "attn1" if isinstance(model, AdaptedDiT) else "attn"
    targets = [f"{attention}.to_q", f"{attention}.to_v", "ff.net.2", "proj_out"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=3, target_modules=targets, **settings), adapter_name=name)
    draw = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_" in path and f".{name}." in path:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.1)
    model.eval()


def two_adapters(model: Model) -> None:
    add_lora(model)
    add_lora(model, "second", use_dora=True)
    model.set_adapters(["first", "second"], [0.7, 0.4])
    model.transformer_blocks[0].attn.to_q.set_scale("first", 0.2)  # blocks of other structures, one of them without adapters
    for layer in model.transformer_blocks[1].modules():
        if hasattr(layer, "enable_adapters"):
            layer.enable_adapters(False)


def fused(model: Model) -> None:
    add_lora(model)
    model.fuse_lora(0.5)


def cast_by_layer(model: Model) -> None:
    add_lora(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def changed(key: str, change: Change, contexts: tuple[str, ...]) -> dict[str, Any]:
    result = check(variant(key, change), contexts)
    assert all(not context.refusal and not context.failure for context in result.contexts.values()), result.line()
    return result.contexts


@pytest.mark.parametrize(
    ("key", "change", "contexts"),
    [(SD3, two_adapters, ("cached", "reuse")), (DIT, fused, ("cached",)), (DIT, cast_by_layer, ("reuse",))],
    ids=["two_adapters", "fused", "cast_by_layer"],
)
def test_adapters_and_cast_weights(key: str, change: Change, contexts: tuple[str, ...]) -> None:
    for context in changed(key, change, contexts).values():
        assert context.ok, context


def test_bfloat16_with_norms_in_float32(tmp_path: Path) -> None:
    """As diffusers loads Wan. The reference rounds as the step does; with all tokens kept, their order alone differs."""

    def load(model: Model) -> Model:
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16, torch.float32}
        return loaded

    for context in changed("WanTransformer3DModel", load, ("kept",)).values():
        assert context.i_exact and context.reference == 0 and context.all_kept < 2**-7 and context.changed > 2**-6, context


# -- quantised --------------------------------------------------------------------------------------------------------


def quantised(config: str) -> Change:
    quantization = pytest.importorskip("torchao.quantization")
    return lambda model: quantization.quantize_(model, getattr(quantization, config)())


@pytest.mark.parametrize(
    ("config", "contexts"), [("Int8WeightOnlyConfig", ("full", "reuse")), ("Float8WeightOnlyConfig", ("cached",))], ids=["int8", "float8"]
)
def test_quantised_weights(config: str, contexts: tuple[str, ...]) -> None:
    for context in changed(DIT, quantised(config), contexts).values():
        assert context.ok, context


def test_quantised_activations() -> None:
    """A difference in the last bits becomes one of a whole level of int8: with tokens in another order nothing is equal to 1e-5."""
    found = changed(DIT, quantised("Int8DynamicActivationInt8WeightConfig"), ("cached",))["cached"]
    assert found.i_exact and found.all_kept < 2e-2 and found.reference < 2e-2 < found.changed, found


def test_quantised_by_diffusers_and_compiled(tmp_path: Path) -> None:
    """``from_pretrained`` with a TorchAoConfig; torch.compile takes the I-step in one frame, for no region is given a quantised weight."""
    quantization = pytest.importorskip("torchao.quantization")
    build("dit", layers=1).save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.float32).eval()
    given = FAMILIES[DIT].build()[1]
    steps = transform(model, 0.5, last_k=0, context="kept", backend="eager", example_inputs=given).steps
    compiled = torch.compile(steps.full.module, fullgraph=True, dynamic=False, backend="aot_eager")
    arguments = [*given.values(), *steps.step_inputs(0, CPU), *steps.initial_caches(CPU)]
    with torch.no_grad():
        assert error(compiled(*arguments)[0], model(**given)[0]) < TOLERANCE


def test_a_quantised_model_is_another_base_model() -> None:
    model = build("dit", layers=1)
    before = fingerprint(model)
    quantised("Int8WeightOnlyConfig")(model)
    difference = explain_difference(before, fingerprint(model))
    assert difference is not None and difference.startswith("it has no") and "weight" in difference


# -- changes after transform ------------------------------------------------------------------------------------------


class Sampled:
    """A transformed model in the middle of a run."""

    def __init__(self, prepare: Change | None = None, key: str = DIT) -> None:
        self.model, self.given = variant(key, prepare).build()
        self.net = transform(self.model, 0.5, context="cached", forecast=0, backend="eager")
        self.kinds: list[str] = []
        self.net.step_callback = lambda report: self.kinds.append(report.kind)
        self.calls = 0

    def step(self, **more: Any) -> float:
        """One more step of the run; how far its output is from the model's own. The timestep alone changes, and hardly."""
        self.calls += 1
        now = self.given | {"timestep": self.given["timestep"] - 1e-3 * self.calls} | more
        with torch.no_grad():
            return error(self.net(**now)[0], self.model(**now)[0])


def test_adapters_that_change_after_transform() -> None:
    """In the middle of a run too: the next step is an I-step of the model as it is now, and a P-step goes on from it."""
    run = Sampled()
    changes: list[Change] = [
        lambda model: None,
        add_lora,
        lambda model: set_weights_and_activate_adapters(model, ["first"], [0.5]),
        lambda model: model.disable_lora(),
        lambda model: model.enable_lora(),
        lambda model: model.fuse_lora(),
        lambda model: model.unfuse_lora(),
        lambda model: model.unload_lora(),
    ]
    outputs = []
    for change in changes:
        change(run.model)
        assert run.step() == 0
        assert 0 < run.step() < SMALL
        with torch.no_grad():
            outputs.append(run.model(**run.given)[0])
    assert run.kinds == ["I", "P"] * len(changes)
    moved = [error(a, b) for a, b in pairwise(outputs)]
    assert all(difference > 10 * SMALL for difference in moved[:4]), "the changes do not matter, so the test shows nothing"


def test_the_scale_of_a_call() -> None:
    """``joint_attention_kwargs={"scale": ...}``: the adapters are scaled for the time of a forward alone."""
    run = Sampled(add_lora, SD3)
    before = model_state(run.model)
    assert run.step(joint_attention_kwargs={"scale": 0.7}) == 0
    run.model.set_adapters("first", 1.0)  # the model's own forward, run to compare with, may leave another last bit
    assert model_state(run.model) == before
    assert run.step() == 0


def test_a_scale_in_a_tensor_is_refused() -> None:
    model, _ = FAMILIES[SD3].build()
    add_lora(model)
    model.transformer_blocks[1].attn.to_q.scaling["first"] = torch.tensor(0.75)
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.1\.attn\.to_q: the scale of its adapter is a tensor"):
        transform(model, 0.5)


def test_a_model_that_leaves_and_comes_back() -> None:
    """As ``enable_model_cpu_offload`` moves it: parameters stay the same objects, buffers do not. Other buffers are noticed."""
    run = Sampled()
    assert run.step() == 0
    steps = run.net.steps
    run.model._apply(torch.clone)
    run.net.reset()
    assert run.step() == 0 and run.net.steps is steps
    run.model.pos_embed.pos_embed.mul_(2)
    run.net.reset()
    assert run.step() == 0 and run.net.steps is not steps


def test_casting_switched_on_after_transform() -> None:
    run = Sampled()
    assert run.step() == 0
    run.model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert run.step() == 0 and 0 < run.step() < SMALL


# -- hooks ------------------------------------------------------------------------------------------------------------


def offload_groups(kind: str) -> Change:
    return lambda model: model.enable_group_offload(CPU, CPU, offload_type=kind, num_blocks_per_group=1)


def cache_first_block(model: Model) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def skip_layers(model: Model) -> None:
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))


HOOKS: dict[str, tuple[str, Change, str]] = {
    "sequential": (SD3, lambda model: accelerate.cpu_offload(model, CPU), r"^pos_embed: accelerate's AlignDevicesHook moves weights"),
    "group": (SD3, offload_groups("block_level"), r"^SD3Transformer2DModel: diffusers' GroupOffloadingHook \('group_offloading'\) moves"),
    "leaves": (SD3, offload_groups("leaf_level"), r"^pos_embed: diffusers' GroupOffloadingHook"),
    "cache": ("FluxTransformer2DModel", cache_first_block, r"^transformer_blocks\.0: diffusers' FBCHeadBlockHook .* caches too"),
    "skip": (SD3, skip_layers, r"^transformer_blocks\.1: diffusers' TransformerBlockSkipHook \('layer_skip_hook'\) changes its forward"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_refused(name: str) -> None:
    """Before transform, and after it at the next call."""
    key, hook, message = HOOKS[name]
    model, given = FAMILIES[key].build()
    net = transform(model, 0.5, backend="eager")
    hook(model)
    for call in (lambda: transform(model, 0.5), lambda: net(**given)):
        with pytest.raises(UnsupportedModelError, match=message):
            call()


def test_after_another_cache_is_taken_off() -> None:
    model: Model = FAMILIES["FluxTransformer2DModel"].build()[0]
    cache_first_block(model)
    model.disable_cache()
    transform(model, 0.5)


def test_offloading_the_whole_model() -> None:
    """On the model it is refused, since the step graphs do not call the model; on the dispatcher, after transform, it works."""
    pipe = pipeline("pixart")
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"^PixArtTransformer2DModel: accelerate's CpuOffload moves.*then call pipe"):
        transform(pipe, 0.5)
    pipe.remove_all_hooks()
    pipe = transform(pipe, 0.5, backend="eager")
    expected = images(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(images(pipe), expected) and torch.equal(images(pipe), expected)
    assert pipe.transformer.summary().cached_steps > 0


def test_hooks_that_only_align_devices() -> None:
    """As ``device_map`` leaves them on a model of one device."""
    run = Sampled(lambda model: accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True))
    assert run.step() == 0 and 0 < run.step() < SMALL
