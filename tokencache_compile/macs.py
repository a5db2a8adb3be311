"""Multiply-accumulates of whatever runs under :class:`MacCounter`: matmuls, convolutions and attention, by formula.

One MAC is one multiplication and one addition. A fused attention counts as its two matrix products, whichever kernel runs it
(torch's own counter takes the CPU's for nothing). Norms, activations and data movement are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_ATTENTION = {
    getattr(aten, name)
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(aten, name)
}

_OWN: dict[Any, Callable[..., int]] = {}


def count_as(op: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorates what tells, from an operator's arguments, the MACs that it does out of sight."""

    def add(count: Callable[..., int]) -> Callable[..., int]:
        _OWN[op] = count
        return count

    return add


class MacCounter(TorchDispatchMode):
    """Counts into ``macs`` while it is entered. Works on fake tensors: only shapes are read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.macs += _macs(func.overloadpacket, args, result)
        return result


def _macs(op: Any, args: Any, result: Any) -> int:
    if op in _OWN:
        return _OWN[op](*args)
    if op in (aten.mm, aten.bmm, aten.matmul):
        return int(result.numel()) * int(args[0].shape[-1])
    if op in (aten.addmm, aten.baddbmm):
        return int(result.numel()) * int(args[1].shape[-1])
    if op is aten.linear or op._qualified_op_name == "tokencache_compile::linear":  # export/cpu_kernels.py
        return int(result.numel()) * int(args[0].shape[-1])
    if op is aten.convolution:
        weight: Tensor = args[1]
        return int(result.numel()) * weight[0].numel()
    if op in _ATTENTION:
        query, key, value = args[:3]
        batch_heads_queries = query.numel() // query.shape[-1]
        return int(batch_heads_queries) * int(key.shape[-2]) * int(query.shape[-1] + value.shape[-1])
    return 0
