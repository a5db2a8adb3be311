"""How a model's return value is made of its output tensors, in a form that JSON can hold."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor
from torch.utils import _pytree as pytree

from tokencache_compile.errors import ExportError


@dataclass(frozen=True)
class OutputFormat:
    """A tensor, a tuple of tensors, or an output class of diffusers.

    Attributes:
        kind: "tensor", "tuple", or the class as "module.Class".
        names: of the tensors: the fields of the class, else "output" or "output_0" …
    """

    kind: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, spec: Any) -> OutputFormat:
        """The format of a pytree ``spec`` of a model's return value.

        Raises:
            ExportError: it is of another kind, which cannot be rebuilt from a file.
        """
        count = spec.num_leaves
        value: Any = pytree.tree_unflatten(list(range(count)), spec)
        if isinstance(value, BaseOutput) and type(value).__module__.startswith("diffusers.") and list(value.values()) == [*range(count)]:
            return cls(f"{type(value).__module__}.{type(value).__qualname__}", tuple(value.keys()))
        if value == 0:
            return cls("tensor", ("output",))
        if isinstance(value, tuple) and value == tuple(range(count)):
            return cls("tuple", tuple(f"output_{i}" for i in range(count)))
        raise ExportError(
            f"the model returns a {type(value).__name__} of {count} tensors; a bundle can rebuild a tensor, a flat tuple or an output "
            "class of diffusers. Wrap the model in a module that returns one of these."
        )

    def rebuild(self, outputs: Sequence[Tensor]) -> Any:
        """The model's return value."""
        if self.kind == "tensor":
            return outputs[0]
        if self.kind == "tuple":
            return tuple(outputs)
        module, _, name = self.kind.rpartition(".")
        return getattr(importlib.import_module(module), name)(**dict(zip(self.names, outputs, strict=True)))
