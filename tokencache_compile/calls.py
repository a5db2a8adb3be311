"""Calls of a model: what was passed, by the names of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from tokencache_compile.errors import InputError

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


def bind_call(name: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one call of the model ``name``, in the order of ``signature`` (its forward), defaults filled in.

    Raises:
        InputError: they do not fit the model's forward.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"this call does not fit {name}.forward{signature}: {error}. "
            f"It was given {len(args)} positional arguments and {sorted(kwargs) or 'no keywords'}."
        ) from error
    bound.apply_defaults()
    call = dict(bound.arguments)
    for argument, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call |= call.pop(argument)  # every argument is handed on by its own name
    return call
