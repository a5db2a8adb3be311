"""MACs as the paper counted them: those of :mod:`tokencache_compile.macs`, and each LayerNorm besides.

    a LayerNorm        4 operations an element without weights, 5 with them
    a sampling run     2 (guidance) · Σ over its steps

The norms' rule is fvcore's (``norm_flop_counter`` in fvcore/nn/jit_handles.py); it adds 0.06 % to a forward of DiT-XL/2 at 256². The
project's own figures leave norms out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tokencache_compile.ir import StepProgram
from tokencache_compile.macs import MacCounter, aten
from tokencache_compile.passes.on_shapes import run_on_shapes
from tokencache_compile.passes.pipeline import StepPrograms

GUIDANCE = 2
_NORM, _AFFINE_NORM = 4, 5  # operations an element


class PaperMacCounter(MacCounter):
    """Counts into ``macs`` while it is entered. Works on fake and meta tensors: only shapes are read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket is aten.native_layer_norm:
            self.macs += int(args[0].numel()) * (_NORM if args[2] is None else _AFFINE_NORM)
        return result


def module_macs(model: nn.Module, call: Mapping[str, Any]) -> Counter[str]:
    """MACs of one call of ``model`` for each of its modules by name, what is inside it included; "" is the whole model."""
    macs: Counter[str] = Counter()
    counter = PaperMacCounter()

    def add(name: str, sign: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            macs[name] += sign * counter.macs

        return hook

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(add(name, -1)), module.register_forward_hook(add(name, 1))]
    try:
        with torch.no_grad(), counter:
            model(**call)
    finally:
        for handle in handles:
            handle.remove()
    return macs


def step_macs(steps: StepPrograms, step: StepProgram, call: Mapping[str, Any]) -> int:
    """MACs of ``step``, one of ``steps``, predictor included.

    Args:
        call: the call that ``steps`` was built from, its arguments in the order of the forward's.
    """
    inputs = [leaf for leaf in pytree.tree_leaves(dict(call)) if isinstance(leaf, Tensor)]
    counter = PaperMacCounter()
    run_on_shapes(step, inputs, steps.random_shape, counter)
    return counter.macs


def run_macs(full: int, cached: float, steps: int, full_steps: float) -> float:
    """MACs of one guided sample: ``full_steps`` steps of ``full`` MACs and the others of ``cached`` (their mean, where they differ)."""
    return GUIDANCE * (full_steps * full + (steps - full_steps) * cached)
