"""Export one block with a free token count.

A block as it is may have none. Two remedies stand between its modules and ``torch.export``:

- A module within it that export cannot capture is called as it is (:mod:`opaque_modules`, ``per_token``).
- A block that is told how many tokens it has, by one number or by the sizes of their grid, is told the length of its stream instead;
  a grid becomes a row of 1 × n. Modules that are handed the grid mix its neighbours and get it back (``on_grid``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import BlockCall
from tokencache_compile.model_state import scales_set
from tokencache_compile.opaque_modules import on_grid, per_token, register
from tokencache_compile.passes.batch_axis import without_batch_axis
from tokencache_compile.passes.capture import first_line, recording, replaced_forward
from tokencache_compile.passes.casting_hooks import casting_traced

_ADAPTERS = ("_disable_adapters", "_active_adapter")  # peft's, of one layer
_SIMPLE = (bool, int, float, str, type(None), torch.dtype)


def _is_simple(value: Any) -> bool:
    """Whether a value, or all that a plain container holds, tells by its ``repr`` what it is (peft keeps scales in dictionaries)."""
    return all(isinstance(leaf, _SIMPLE) for leaf in pytree.tree_leaves(value))


def _simple_attributes(module: nn.Module) -> tuple[Any, ...]:
    values = {k: v for k, v in module.__dict__.items() if (not k.startswith("_") or k in _ADAPTERS) and k != "training"}
    return tuple(sorted((k, repr(v)) for k, v in values.items() if _is_simple(v) or inspect.isfunction(v)))


def structure(module: nn.Module) -> tuple[Any, ...]:
    """Equal for two modules that run the same code on weights of the same shapes."""
    modules = tuple((name, type(m), _simple_attributes(m)) for name, m in module.named_modules())
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return modules, tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)


def _dynamic_shapes(call: BlockCall) -> dict[str, Any]:
    """``Dim.AUTO`` for every axis longer than 1 (export fixes the others anyway), in the shape torch.export wants it."""
    auto = [{axis: Dim.AUTO for axis, size in enumerate(v.shape) if size > 1} if isinstance(v, Tensor) else None for v in call.leaves]
    args, kwargs = pytree.tree_unflatten(auto, call.in_spec)
    shapes: dict[str, Any] = {}
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(call.module.forward).parameters.values() if p.kind not in named]
    for position, value in enumerate(args):
        parameter = parameters[min(position, len(parameters) - 1)]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            shapes[parameter.name] = (*shapes.get(parameter.name, ()), value)
        else:
            shapes[parameter.name] = value
    return {**shapes, **kwargs}


def _export_block(call: BlockCall) -> torch.export.ExportedProgram:
    args, kwargs = pytree.tree_unflatten([v.detach().contiguous() if isinstance(v, Tensor) else v for v in call.leaves], call.in_spec)
    # Without duck shaping two axes share a symbol only where the block's arithmetic makes them equal: that is the analysis.
    no_duck_shaping = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    as_called = scales_set(call.module, call.scales)
    with torch.no_grad(), no_duck_shaping, as_called, casting_traced(call.module), replaced_forward(call.module, without_batch_axis(call)):
        return torch.export.export(call.module, args, kwargs, dynamic_shapes=_dynamic_shapes(call), strict=False)


def export_block(call: BlockCall) -> torch.export.ExportedProgram:
    """The block with a free token count, where it has one; modules that export cannot capture are called as they are.

    Raises:
        UnsupportedModelError: it cannot be exported.
    """
    try:
        return _export_block(call)
    except Exception as error:
        modules = [] if any(tensor.is_meta for tensor in call.tensors) else _not_exported(call)
        if modules:
            with ExitStack() as stack:
                for part in modules:
                    x = part.tensors[0]
                    number = register(part.module, repr(structure(part.module)), x, x.numel() // x.shape[-1])
                    stack.enter_context(replaced_forward(part.module, _per_token_forward(part.module, number)))
                return _export_block(call)
        raise UnsupportedModelError(
            call.fqn, f"torch.export cannot capture the block with a free token count: {first_line(error)}", "Its tokens are not separable."
        ) from error


def _parts(call: BlockCall) -> list[BlockCall]:
    """The calls of the block's own modules."""
    parts = {f"{call.fqn}.{name}": child for name, child in call.module.named_children()}
    calls: list[BlockCall] = []
    args, kwargs = pytree.tree_unflatten(list(call.leaves), call.in_spec)
    with torch.no_grad(), replaced_forward(call.module, without_batch_axis(call)), recording(parts, calls):
        call.module(*args, **kwargs)
    return calls


def _keeps_shape(call: BlockCall) -> bool:
    """Whether it takes one tensor and returns one of its shape."""
    return len(call.leaves) == len(call.outputs) == 1 and [t.shape for t in call.tensors] == [t.shape for t in call.output_tensors]


def _not_exported(call: BlockCall) -> list[BlockCall]:
    """Calls of the innermost modules that torch.export cannot capture, if all keep the shape of the one tensor they are given."""
    found: list[BlockCall] = []
    for part in _parts(call):
        try:
            _export_block(part)
        except Exception:
            found += _not_exported(part) or [part]
    return found if all(map(_keeps_shape, found)) else []


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _per_token_forward(module: nn.Module, number: int) -> Any:
    def forward(_: Any, x: Tensor) -> Any:
        return per_token(x, _weights(module), number)

    return forward


def _on_grid_forward(module: nn.Module, number: int, axis: int, grid: list[int]) -> Any:
    def forward(_: Any, x: Tensor) -> Any:
        return on_grid(x, _weights(module), number, axis, grid)

    return forward


def export_counting(call: BlockCall, stream: int, tokens: int) -> torch.export.ExportedProgram | None:
    """The block with the numbers among its arguments that say how many ``tokens`` it has made from its stream's length.

    ``stream``: the position of the stream among the block's tensors. None where there are no such numbers.
    """
    place_of = [place for place, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor)]
    others = call.tensors[stream].shape[1] - tokens
    numbers = _counting_numbers(call.leaves, tokens)
    if not numbers or (others and len(numbers) > 1):
        return None
    grid = [call.leaves[place] for place in numbers]
    parts = _parts(call) if len(grid) > 1 else []

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for place in numbers:
            leaves[place] = 1
        leaves[numbers[-1]] = leaves[place_of[stream]].shape[1] - others
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return original(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(replaced_forward(call.module, forward))
        for part in parts:
            axis = _axis_of(grid, part)
            if axis is not None:
                number = register(part.module, repr(structure(part.module)), part.tensors[0], part.tensors[0].shape[0] * tokens)
                stack.enter_context(replaced_forward(part.module, _on_grid_forward(part.module, number, axis, grid)))
        try:
            return _export_block(call)
        except Exception as error:
            raise UnsupportedModelError(
                call.fqn,
                f"it is told the grid of its tokens, {' × '.join(map(str, grid))}, and does not run on a row of them: {first_line(error)}",
                "Its tokens are not separable.",
            ) from error


def _counting_numbers(leaves: Sequence[Any], tokens: int) -> list[int]:
    """Places of the longest run of whole numbers whose product is ``tokens``."""
    runs = [
        list(range(first, last))
        for first in range(len(leaves))
        for last in range(first + 1, len(leaves) + 1)
        if all(type(leaf) is int for leaf in leaves[first:last]) and math.prod(leaves[first:last]) == tokens
    ]
    return max(runs, key=len, default=[])


def _axis_of(grid: list[int], part: BlockCall) -> int | None:
    """The first of the axes of ``grid`` in what a module is given; None where it is given no grid."""
    if not _keeps_shape(part):
        return None
    shape = list(part.tensors[0].shape)
    return next((axis for axis in range(1, len(shape)) if shape[axis : axis + len(grid)] == grid), None)
