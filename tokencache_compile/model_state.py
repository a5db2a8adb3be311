"""What a model computes depends on more than its weights: which adapters (peft) are on, and what other libraries hook to its modules.

Read from the modules' own attributes, so neither peft, accelerate nor diffusers is imported. One walk takes 0.2 ms for DiT-XL/2
and 0.6 ms for FLUX with LoRA, and so is made before every call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tokencache_compile.errors import UnsupportedModelError

_ACCELERATE, _DIFFUSERS = "_hf_hook", "_diffusers_hook"
_CASTING = ("layerwise_casting", "peft_autocast_disable")  # captured as part of the arithmetic: see passes/casting_hooks.py
_OFFLOADING = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
_CACHING = ("cache", "fbc_", "pyramid_attention")


def model_state(model: nn.Module) -> Hashable:
    """Equal for two moments at which ``model``, with the same parameters, is the same function.

    Raises:
        UnsupportedModelError: a hook moves weights, caches or skips, which step graphs cannot; or an adapter's scale is a tensor.
    """
    state: list[Hashable] = []
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is None:
            continue
        own = module.__dict__
        if _ACCELERATE in own or _DIFFUSERS in own:
            state.append(_hooks_of(model, module))
        if "_disable_adapters" in own or "_active_adapter" in own:
            state.append(_adapters_of(model, module))
        todo += reversed(own["_modules"].values())  # in the order of their definition
    return tuple(state)


# -- adapters ---------------------------------------------------------------------------------------------------------


def _adapters_of(model: nn.Module, layer: Any) -> Hashable:
    """Of one of peft's layers: which adapters act and how strongly, and which are part of the base weight already."""
    merged = tuple(getattr(layer, "merged_adapters", ()))
    if layer._disable_adapters:
        return merged
    active = layer._active_adapter
    names = (active,) if isinstance(active, str) else tuple(active)
    scales = getattr(layer, "scaling", {})
    if any(isinstance(scale, Tensor) for scale in scales.values()):
        raise UnsupportedModelError(
            _path(model, layer),
            "the scale of its adapter is a tensor, as peft's hotswap makes it, and a change of it would not be noticed",
            "Load adapters without enable_lora_hotswap: graphs are captured anew for each.",
        )
    return merged, names, tuple(scales.get(name) for name in names)


def adapter_scales(module: nn.Module) -> dict[str, dict[str, float]]:
    """The scales of every adapter in ``module``, by layer and adapter."""
    layers = ((name, child.__dict__.get("scaling")) for name, child in module.named_modules())
    return {name: dict(scales) for name, scales in layers if isinstance(scales, dict)}


@contextmanager
def scales_set(module: nn.Module, scales: Mapping[str, Mapping[str, float]]) -> Iterator[None]:
    """Within this context adapters have these ``scales``; afterwards those they had, to the last bit.

    diffusers multiplies them for the time of a forward (``joint_attention_kwargs={"scale": 0.7}``) and divides them again.
    """
    before = adapter_scales(module)
    try:
        _set_scales(module, scales)
        yield
    finally:
        _set_scales(module, before)


def _set_scales(module: nn.Module, scales: Mapping[str, Mapping[str, float]]) -> None:
    for name, values in scales.items():
        layer: Any = module.get_submodule(name)
        layer.scaling.update(values)


# -- hooks ------------------------------------------------------------------------------------------------------------


def _hooks_of(model: nn.Module, module: nn.Module) -> Hashable:
    """What the hooks of one module add to the state; those that step graphs cannot follow are refused."""
    accelerates = module.__dict__.get(_ACCELERATE)
    for hook in getattr(accelerates, "hooks", (accelerates,)):  # a SequentialHook has several
        if hook is not None and not _only_aligns(hook):
            raise UnsupportedModelError(
                _path(model, module),
                f"accelerate's {type(hook).__name__} moves weights around its forward, which the step graphs do not call",
                "Take it off (pipe.remove_all_hooks()), transform, and only then call pipe.enable_model_cpu_offload(), which moves "
                "the model as a whole.",
            )
    registry = module.__dict__.get(_DIFFUSERS)
    hooks: Mapping[str, Any] = registry.hooks if registry is not None else {}
    for name, hook in hooks.items():
        if name in _CASTING:
            continue
        what = f"diffusers' {type(hook).__name__} ({name!r})"
        if any(name.startswith(known) for known in _OFFLOADING):
            reason = f"{what} moves weights between its modules' forwards, which the step graphs do not call"
            remedy = "Load the model without group offloading, transform, and then call pipe.enable_model_cpu_offload()."
        elif any(known in name for known in _CACHING):
            reason = f"{what} caches too, and the step graphs do not call it"
            remedy = "Call the model's disable_cache(), or use that cache without tokencache_compile."
        else:
            reason = f"{what} changes its forward, and the step graphs do not call it"
            remedy = "Take it off, or load the model without it."
        raise UnsupportedModelError(_path(model, module), reason, remedy)
    casting = hooks.get(_CASTING[0])
    return None if casting is None else casting.compute_dtype


def _only_aligns(hook: Any) -> bool:
    """Whether an accelerate hook only takes inputs to the device that the weights stay on (``device_map`` of one device)."""
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def _path(model: nn.Module, module: nn.Module) -> str:
    name = next(name for name, child in model.named_modules() if child is module)
    return name or type(model).__name__
