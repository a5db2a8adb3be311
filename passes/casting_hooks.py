"""Casting hooks: diffusers' layerwise casting as arithmetic, so that an export sees it.

The hook of a layer changes the dtype of its parameters before the forward and back after it, which no export can follow. Meanwhile
the layer's forward casts copies of them: the graphs read the stored weights (fp8) and cast them where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def _cast_in_forward(module: nn.Module, hook: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for part in module.modules():
                owners: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
                for tensors in owners:
                    stored = dict(tensors)
                    stack.callback(tensors.update, stored)
                    for name, tensor in stored.items():
                        if tensor is not None and tensor.is_floating_point():
                            tensors[name] = tensor.to(hook.compute_dtype)
            return hook.fn_ref.forward(*args, **kwargs)

    return forward


@contextmanager
def casting_traced(model: nn.Module) -> Iterator[None]:
    """Within this context, layers with diffusers' casting hook cast their weights by operations."""
    with ExitStack() as stack:
        for module in model.modules():
            registry: Any = module.__dict__.get("_diffusers_hook")
            hook = registry.hooks.get("layerwise_casting") if registry is not None else None
            if hook is not None:
                stack.callback(module.__dict__.__setitem__, "forward", module.__dict__["forward"])
                module.__dict__["forward"] = _cast_in_forward(module, hook)
        yield
