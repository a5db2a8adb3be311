"""Frozen dataclasses as JSON and back, every value checked against its field's type."""

from __future__ import annotations

import reprlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """``value`` in what JSON knows: dataclasses as objects, tuples as lists, dtypes by name."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def from_json(cls: type[T], value: Any, where: str) -> T:
    """The dataclass ``cls`` with exactly the fields of the JSON object ``value``.

    Raises:
        ValueError: a field is missing, unknown or of another type, or the dataclass refuses its value; begins with ``where``.
    """
    result: T = _read(cls, value, where)
    return result


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return _read(kind, value, where)
    if origin is Literal:
        known = isinstance(value, str) and value in arguments
        return value if known else _refuse(f"one of {', '.join(map(repr, arguments))}", value, where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin in (dict, Mapping):
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in _object(value, where).items()}
    if kind is torch.dtype:
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        return dtype if isinstance(dtype, torch.dtype) else _refuse("a dtype", value, where)
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if kind is float and type(value) is int:
        return value
    return value if type(value) is kind else _refuse(kind, value, where)


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _refuse("a list", value, where)
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        _refuse(f"a list of {len(kinds)}", value, where)
    return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    if _object(value, where).keys() != names:
        found = ", ".join(sorted(value)) or "nothing"
        raise ValueError(f"{where} has {found} for a {kind.__name__}; exactly {', '.join(sorted(names))} are needed.")
    given = {name: _read(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    return value if isinstance(value, dict) else _refuse("an object", value, where)


def _refuse(kind: Any, value: Any, where: str) -> Any:
    wanted = kind if isinstance(kind, str) else kind.__name__
    raise ValueError(f"{where} is {reprlib.repr(value)}, where {wanted} is needed.")
