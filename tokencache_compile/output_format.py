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

    def __post_init__(self) -> None:
        if self.kind not in ("tensor", "tuple"):
            self._output_class()

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
        return self._output_class()(**dict(zip(self.names, outputs, strict=True)))

    def _output_class(self) -> Any:
        """The class that ``kind`` names: an output class of diffusers, and nothing else that a file might have named."""
        module, _, name = self.kind.rpartition(".")
        if not module.startswith("diffusers."):
            raise ValueError(f'{self.kind!r} is no "tensor", no "tuple" and no class of diffusers')
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"this diffusers has no {self.kind}") from error
        if not (isinstance(found, type) and issubclass(found, BaseOutput)):
            raise ValueError(f"{self.kind} is no output class of diffusers")
        return found
