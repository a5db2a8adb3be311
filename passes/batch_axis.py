"""Batch axis: streams [N, C] of models that pack one sample's tokens without one (Cosmos 3) are [1, N, C] to every pass.

The block itself stays as it is: around its call the axis is taken off what it is given, and put onto what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tokencache_compile.ir import BlockCall


def with_batch_axis(call: BlockCall) -> BlockCall:
    """``call`` with a batch axis on its streams [N, C], the tensors that it returns in a shape it was given; else as it is."""
    given = {(t.shape, t.dtype) for t in call.tensors if t.is_floating_point() and t.dim() == 2}
    streams = given & {(t.shape, t.dtype) for t in call.output_tensors}
    if not streams:
        return call

    def flat(values: tuple[Any, ...]) -> frozenset[int]:
        return frozenset(i for i, t in enumerate(values) if isinstance(t, Tensor) and (t.shape, t.dtype) in streams)

    inputs, outputs = flat(call.leaves), flat(call.outputs)
    return replace(
        call,
        leaves=tuple(add_axis(call.leaves, inputs)),
        outputs=tuple(add_axis(call.outputs, outputs)),
        flat_inputs=inputs,
        flat_outputs=outputs,
    )


def add_axis(values: Any, positions: frozenset[int]) -> list[Any]:
    """``values`` with a batch axis on those at ``positions``."""
    return [value.unsqueeze(0) if i in positions else value for i, value in enumerate(values)]


def drop_axis(values: Any, positions: frozenset[int]) -> list[Any]:
    """``values`` without the batch axis of those at ``positions``."""
    return [value.squeeze(0) if i in positions else value for i, value in enumerate(values)]


def without_batch_axis(call: BlockCall) -> Callable[..., Any]:
    """What replaces the forward of ``call``'s block, so that it takes and returns its streams with their batch axis."""

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        flat_args, flat_kwargs = pytree.tree_unflatten(drop_axis(leaves, call.flat_inputs), spec)
        outputs, out_spec = pytree.tree_flatten(original(*flat_args, **flat_kwargs))
        return pytree.tree_unflatten(add_axis(outputs, call.flat_outputs), out_spec)

    return forward
