"""Modules that compute token by token and that no graph can hold: called as they are, by one operator.

A mixture of experts sorts its tokens by expert, so how many rows each expert gets depends on values. In a body such a module is
``tokencache_compile::per_token(x, weights, number)``: the module itself, run on however many tokens it is given.

Shapes: x and the result [..., N, C].
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokencache_compile.macs import MacCounter, count_as


@dataclass(frozen=True)
class PerTokenModule:
    """One structure of module, without weights: they are arguments of the operator, so blocks of one structure share it."""

    code: str
    empty: nn.Module
    weight_names: tuple[str, ...]
    macs: int  # for one token

    def __call__(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        result: Tensor = functional_call(self.empty, dict(zip(self.weight_names, weights, strict=True)), (x,))
        return result


_KNOWN: list[PerTokenModule] = []


def register(module: nn.Module, code: str, example: Tensor) -> int:
    """The number of ``module``'s structure, of which ``code`` tells all that decides what it computes."""
    number = next((number for number, known in enumerate(_KNOWN) if known.code == code), None)
    if number is not None:
        return number
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    on_meta = {id(tensor): nn.Parameter(tensor.to("meta"), False) for tensor in weights.values()}
    with MacCounter() as counter, torch.no_grad():
        module(example)
    macs = counter.macs * example.shape[-1] // example.numel()
    _KNOWN.append(PerTokenModule(code, copy.deepcopy(module, on_meta), tuple(weights), macs))
    return len(_KNOWN) - 1


@torch.library.custom_op("tokencache_compile::per_token", mutates_args=())
def per_token(x: Tensor, weights: list[Tensor], number: int) -> Tensor:
    """The module of structure ``number`` with ``weights``."""
    return _KNOWN[number](x, weights).clone()


@per_token.register_fake
def _(x: Tensor, weights: list[Tensor], number: int) -> Tensor:
    return torch.empty_like(x)


@count_as(torch.ops.tokencache_compile.per_token)
def _macs(x: Tensor, weights: list[Tensor], number: int) -> int:
    return x.numel() // x.shape[-1] * _KNOWN[number].macs
