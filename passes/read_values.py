"""Read values: what a model's forward reads of its inputs' values in Python, known while it is captured.

    lengths = mask.sum(1).tolist()      tokens[mask]      if (image == 0).all(): …      x[:, : lengths[0]]

A graph has no such reads. :class:`ReadValues` follows which inputs every tensor is made from, and its value as long as it is made from
inputs of known values (and from constants) alone; a read is then answered by the value, and the shapes that follow from it are
static. The graph holds for these values of those inputs only: the dispatcher captures anew where they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

_READS = {
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__int__,
    Tensor.item,
    Tensor.tolist,
}
_REPEATING = {torch.repeat_interleave, Tensor.repeat_interleave}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_TAKING_SIZES = {Tensor.expand, Tensor.repeat, Tensor.reshape, Tensor.view}


class ValueNeededError(Exception):
    """A forward reads a tensor made from inputs whose values are not known: ``positions`` among the call's tensors."""

    def __init__(self, positions: frozenset[int]) -> None:
        super().__init__(f"the values of the inputs {sorted(positions)} are read")
        self.positions = positions


@dataclass(frozen=True)
class _Origin:
    """What a tensor is made from, and its value where that is known."""

    positions: frozenset[int]
    value: Tensor | None


_UNKNOWN = _Origin(frozenset(), None)


class ReadValues(TorchFunctionMode):
    """Within this context reads of values are answered while a forward is traced.

    Args:
        traced: the tensors of the call as the trace has them.
        known: their values where they are known, else None.

    Raises:
        ValueNeededError: the forward reads others.
    """

    def __init__(self, traced: Sequence[Tensor], known: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._origins: Any = WeakTensorKeyDictionary()
        for position, (tensor, value) in enumerate(zip(traced, known, strict=True)):
            self._origins[tensor] = _Origin(frozenset([position]), None if value is None else _copy(value))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            value = self._read(args[0])
            return func(*args, **kwargs) if value is None else _on_values(func, (value, *args[1:]), kwargs)
        if func is Tensor.__iter__:
            return iter(self.__torch_function__(torch.unbind, types, args))
        if func in _INDEXING:
            args = (args[0], self._static_index(args[1]), *args[2:])
        if func in _TAKING_SIZES:
            args = (args[0], *pytree.tree_map(self._number, args[1:]))
        if func in _REPEATING and isinstance(args[1], Tensor) and "dim" in kwargs and (counts := self._read(args[1])) is not None:
            rows = _on_values(torch.repeat_interleave, (counts,), {})  # which row stands where
            func, args, kwargs = torch.index_select, (args[0], kwargs["dim"], rows), {}
        return self._followed(func, args, kwargs, func(*args, **kwargs))

    def _origin(self, tensor: Tensor) -> _Origin:
        """Of a tensor that stands outside the trace (a table that a module keeps) the value is its own."""
        found: _Origin | None = self._origins.get(tensor)
        if found is not None:
            return found
        return _UNKNOWN if isinstance(tensor, FakeTensor | nn.Parameter) else _Origin(frozenset(), _copy(tensor))

    def _read(self, tensor: Tensor) -> Tensor | None:
        """The value of ``tensor``; None where the trace itself must answer, as for a weight."""
        origin = self._origin(tensor)
        if origin.value is None and origin.positions:
            raise ValueNeededError(origin.positions)
        return origin.value

    def _followed(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Note the origin of what ``func`` returned, and of what it wrote to; returns the value where its shape follows from values."""
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        writes = func is Tensor.__setitem__
        if not outputs and not writes:
            return result
        origins = [self._origin(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        positions = frozenset().union(*(origin.positions for origin in origins))
        values: list[Tensor | None] = [None] * len(outputs)
        if all(origin.value is not None for origin in origins):
            known_args, known_kwargs = pytree.tree_map_only(Tensor, lambda tensor: self._origin(tensor).value, (args, kwargs))
            found = _on_values(func, known_args, known_kwargs)
            known = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
            values = [*known]
            if any(not isinstance(size, int) for output in outputs for size in output.shape):  # masks and counts that are expanded
                outputs, values, result = known, [_copy(value) for value in known], found
            if writes:
                outputs, values = [args[0]], [known_args[0]]
        elif writes:
            outputs, values = [args[0]], [None]
        for output, value in zip(outputs, values, strict=True):
            self._origins[output] = _Origin(positions, value)
        return result

    def _static_index(self, index: Any) -> Any:
        """An index without reads: numbers for tensors in slices, positions for masks."""
        if not isinstance(index, tuple | list):
            index = (index,)
        parts: list[Any] = []
        for part in index:
            if isinstance(part, slice):
                parts.append(slice(*(self._number(bound) for bound in (part.start, part.stop, part.step))))
            elif isinstance(part, Tensor) and part.dtype == torch.bool and (mask := self._read(part)) is not None:
                parts += _on_values(torch.nonzero, (mask,), {"as_tuple": True})
            else:
                parts.append(self._number(part))
        return tuple(parts)

    def _number(self, value: Any) -> Any:
        """A whole number for a tensor of one, if its value can be known."""
        if not isinstance(value, Tensor) or value.dim() or value.dtype == torch.bool:
            return value
        read = self._read(value)
        return value if read is None else int(_on_values(Tensor.item, (read,), {}))


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` on values, outside the trace."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return func(*args, **kwargs)


def _copy(value: Tensor) -> Tensor:
    """A value that writes of the trace do not reach."""
    copied: Tensor = _on_values(torch.clone, (value,), {})
    return copied
