"""What a call of the model must look like, in a form that JSON can hold: its forward's arguments, and every value's shape or constant."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tokencache_compile.errors import InputError
from tokencache_compile.ir import TensorSpec

_KINDS = {str(kind.name): kind for kind in inspect._ParameterKind}


@dataclass(frozen=True)
class Argument:
    """An argument of the forward. ``default`` is None, a number, string or bool; None stands for any other, which calls must give."""

    name: str
    kind: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Leaf:
    """One value of a call: a tensor by its ``spec``, or anything else, the same on every call, as its ``constant`` repr.

    Both where the graphs hold for one value of a tensor, as the model's forward reads it: there ``constant`` is the values' digest.
    """

    path: str
    spec: TensorSpec | None
    constant: str | None


@dataclass(frozen=True)
class CallFormat:
    """The calls that one set of step graphs serves."""

    arguments: tuple[Argument, ...]
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(
        cls, signature: inspect.Signature, call: Mapping[str, Any], input_names: tuple[str, ...], read: Collection[int] = ()
    ) -> CallFormat:
        """The format of ``call`` (bound arguments, without ``return_dict``).

        Args:
            input_names: of its tensors in the graphs.
            read: positions of the tensors whose values the graphs hold for.
        """
        arguments = []
        for parameter in signature.parameters.values():
            required = parameter.default is parameter.empty
            simple = isinstance(parameter.default, bool | int | float | str | None)
            arguments.append(Argument(parameter.name, parameter.kind.name, required, parameter.default if simple else None))
        names = iter(enumerate(input_names))
        leaves = []
        for path, value in _leaves(call):
            if isinstance(value, Tensor):
                position, name = next(names)
                values = values_digest(value) if position in read else None
                leaves.append(Leaf(path, TensorSpec(name, tuple(value.shape), value.dtype), values))
            else:
                leaves.append(Leaf(path, None, repr(value)))
        return cls(tuple(arguments), tuple(leaves))

    @property
    def reads_values(self) -> bool:
        """Whether the graphs hold for the values of some tensors, which every call may change."""
        return any(leaf.spec is not None and leaf.constant is not None for leaf in self.leaves)

    @property
    def signature(self) -> inspect.Signature:
        """The forward's signature."""
        parameters = []
        for a in self.arguments:
            default = inspect.Parameter.empty if a.required else a.default
            parameters.append(inspect.Parameter(a.name, _KINDS[a.kind], default=default))
        return inspect.Signature(parameters)

    def check(self, call: Mapping[str, Any]) -> None:
        """Raise an InputError that says how ``call`` differs from what the graphs were made for."""
        read = {leaf.path for leaf in self.leaves if leaf.spec is not None and leaf.constant is not None}
        found = {path: _describe(value, path in read) for path, value in _leaves(call)}
        wanted = {leaf.path: _describe_leaf(leaf) for leaf in self.leaves}
        different = [
            f"{path} is {found.get(path, 'not given')} and not {wanted.get(path, 'given')}"
            for path in dict.fromkeys((*wanted, *found))
            if found.get(path) != wanted.get(path)
        ]
        if not different and list(found) != list(wanted):
            different = [f"its values come in the order {', '.join(found)} and not {', '.join(wanted)}"]
        if different:
            raise InputError(
                f"this call is not the one that was exported: {'; '.join(different[:3])}. Batch, resolution and text length are fixed in "
                "exported graphs: call with those, or export once more for these."
            )


def _leaves(call: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every value of a call with its path, such as ``added_cond_kwargs.resolution``, in the order of the graphs' inputs."""
    found, _ = pytree.tree_flatten_with_path(dict(call))
    return [(".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), value) for path, value in found]


def values_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values."""
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()


def _describe(value: Any, with_values: bool) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{tuple(value.shape)} {value.dtype}" + (_of_values(values_digest(value)) if with_values else "")


def _describe_leaf(leaf: Leaf) -> str:
    if leaf.spec is None:
        return leaf.constant or ""
    return f"{leaf.spec.shape} {leaf.spec.dtype}" + (_of_values(leaf.constant) if leaf.constant is not None else "")


def _of_values(digest: str) -> str:
    return f" with values of SHA-256 {digest[:12]}"
