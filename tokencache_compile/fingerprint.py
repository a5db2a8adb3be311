"""Which base model something was made for: its class, its tensors' names and shapes, and digests of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokencache_compile.errors import ConfigError
from tokencache_compile.runtime import Dispatcher

_CASTS = {"own": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a Dispatcher or a peft ``PeftModel``; any other model itself.

    Raises:
        ConfigError: ``model`` is no ``nn.Module``.
    """
    if isinstance(model, Dispatcher):
        model = model.model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a {type(model).__name__} was given; the transformer itself is needed, such as pipe.transformer.")
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


def _base_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by the names they have without adapters: peft keeps the original as ``base_layer``.

    A quantised weight (a tensor subclass) is given as the plain tensors that it is made of.
    """
    original = module._modules.get("base_layer")
    if original is not None and hasattr(module, "adapter_layer_names"):
        yield from _base_weights(original, prefix)
        return
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in module._non_persistent_buffers_set:
            yield from _plain(prefix + name, tensor.detach())
    for name, child in module.named_children():
        yield from _base_weights(child, f"{prefix}{name}.")


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{inner}", getattr(tensor, inner))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What identifies a base model, as JSON values; adapters (peft) and a Dispatcher around it do not change it.

    Non-persistent buffers are left out: they are computed, not loaded, and not to the same last bit everywhere. One tensor at a
    time is on the CPU, so a model of many GB needs no second copy.

    Returns:
        ``class``: the class name. ``tensors``: name → [dtype, shape]. ``weights``: three SHA-256 digests over names and bytes in
        the order of the sorted names: of the tensors as they are (``own``), and with all floating-point tensors rounded to
        ``bfloat16`` and to ``float16``, by which a cast copy of the same weights is told from other weights.

    Raises:
        ConfigError: ``model`` is no module, or its weights are not in memory (meta device).
    """
    model = base_model(model)
    tensors = dict(sorted(_base_weights(model)))
    absent = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if absent is not None:
        raise ConfigError(
            f"{absent} of this {type(model).__name__} is on the meta device, so its weights cannot be read. "
            "Load the weights first, and switch on offloading afterwards."
        )
    digests = {name: hashlib.sha256() for name in _CASTS}
    for name, tensor in tensors.items():
        on_cpu = tensor.cpu()
        for cast, digest in digests.items():
            dtype = _CASTS[cast] if on_cpu.is_floating_point() else None
            digest.update(name.encode() + b"\0")
            digest.update(on_cpu.to(dtype or on_cpu.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {
        "class": type(model).__name__,
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()},
        "weights": {name: digest.hexdigest() for name, digest in digests.items()},
    }


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of a module's state, in the order of the sorted names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + b"\0" + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def explain_difference(saved: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Why the model with fingerprint ``found`` is not the one with fingerprint ``saved``; None where it is, in whatever dtype."""
    if saved["class"] != found["class"]:
        return f"its class is {found['class']} and not {saved['class']}"
    old, new = saved["tensors"], found["tensors"]
    if missing := sorted(old.keys() - new.keys()):
        return f"it has no {_listed(missing)}"
    if added := sorted(new.keys() - old.keys()):
        return f"it also has {_listed(added)}"
    if reshaped := [f"{name} {new[name][1]} and not {old[name][1]}" for name in sorted(old) if old[name][1] != new[name][1]]:
        return f"its shapes differ: {_listed(reshaped)}"
    if recast := [f"{name} is {new[name][0]} and not {old[name][0]}" for name in sorted(old) if old[name][0] != new[name][0]]:
        same = any(saved["weights"][cast] == found["weights"][cast] for cast in ("bfloat16", "float16"))
        return None if same else f"its dtype and its weights differ: {_listed(recast)}"
    if saved["weights"]["own"] != found["weights"]["own"]:
        return "its shapes are the same and its weights are others"
    return None
