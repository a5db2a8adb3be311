"""Modules inside a block that no graph of it can hold: called as they are, by one operator each.

- ``tokencache_compile::per_token``: a module that computes token by token, in a way that depends on values. A mixture of experts
  sorts its tokens by expert, so how many rows each expert gets does. It is run on however many tokens it is given.
- ``tokencache_compile::on_grid``: a module that mixes neighbours on the grid of tokens (convolutions), so that it needs all of them.
  In a body, whose token count is free, the tokens stand in a row, as a grid of 1 × n; the operator forms the grid.

Weights are arguments of the operators, so blocks of one structure share a body. Such steps run in torch, without gradients; ONNX has no
such operators.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokencache_compile.macs import MacCounter, count_as


@dataclass(frozen=True)
class _Structure:
    """A module without its weights; ``macs`` for one token."""

    code: str
    empty: nn.Module
    weight_names: tuple[str, ...]
    macs: int

    def __call__(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        result: Tensor = functional_call(self.empty, dict(zip(self.weight_names, weights, strict=True)), (x,))
        return result


_KNOWN: list[_Structure] = []


def register(module: nn.Module, code: str, example: Tensor, tokens: int) -> int:
    """The number of ``module``'s structure, of which ``code`` tells all that decides what it computes.

    ``example``: what it may be called with, of ``tokens`` tokens in all.
    """
    number = next((number for number, known in enumerate(_KNOWN) if known.code == code), None)
    if number is not None:
        return number
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    on_meta = {id(tensor): nn.Parameter(tensor.to("meta"), False) for tensor in weights.values()}
    with MacCounter() as counter, torch.no_grad():
        module(example)
    _KNOWN.append(_Structure(code, copy.deepcopy(module, on_meta), tuple(weights), counter.macs // tokens))
    return len(_KNOWN) - 1


@torch.library.custom_op("tokencache_compile::per_token", mutates_args=())
def per_token(x: Tensor, weights: list[Tensor], number: int) -> Tensor:
    """Structure ``number`` with ``weights`` on ``x`` [..., N, C]."""
    return _KNOWN[number](x, weights)


@torch.library.custom_op("tokencache_compile::on_grid", mutates_args=())
def on_grid(x: Tensor, weights: list[Tensor], number: int, axis: int, grid: list[int]) -> Tensor:
    """Structure ``number`` with ``weights`` on ``x``, whose axes from ``axis`` on are (1, …, 1, N) and for the module ``grid``."""
    last = axis + len(grid) - 1
    result: Tensor = _KNOWN[number](x.flatten(axis, last).unflatten(axis, grid), weights)
    return result.flatten(axis, last).reshape(x.shape)


@per_token.register_fake
def _(x: Tensor, weights: list[Tensor], number: int) -> Tensor:
    return torch.empty_like(x)


@on_grid.register_fake
def _(x: Tensor, weights: list[Tensor], number: int, axis: int, grid: list[int]) -> Tensor:
    return torch.empty_like(x)


ON_GRID = torch.ops.tokencache_compile.on_grid.default
OPAQUE = (torch.ops.tokencache_compile.per_token.default, ON_GRID)


@count_as(torch.ops.tokencache_compile.per_token)
def _(x: Tensor, weights: list[Tensor], number: int) -> int:
    return x.numel() // x.shape[-1] * _KNOWN[number].macs


@count_as(torch.ops.tokencache_compile.on_grid)
def _(x: Tensor, weights: list[Tensor], number: int, axis: int, grid: list[int]) -> int:
    return x.shape[0] * math.prod(grid) * _KNOWN[number].macs


def to_rows(x: Any, axis: int, dims: int) -> Any:
    """Tokens [B, N, …] of a tensor whose axes from ``axis`` on are a grid of ``dims`` dimensions."""
    return x.flatten(axis, axis + dims - 1).movedim(axis, 1)


def from_rows(rows: Any, axis: int, dims: int) -> Any:
    """The inverse of :func:`to_rows`, the tokens in a row: axes (1, …, 1, N)."""
    return rows.movedim(1, axis).unflatten(axis, (*(1,) * (dims - 1), -1))
