"""Rounding: by how much two runs of one block may differ where only the order of additions does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokencache_compile.ir import Body

_COARSE = 5e-2


def relative(got: Tensor, expected: Tensor, x: Tensor) -> float:
    """The difference of two outputs of a block that was given ``x``, relative to what the block adds."""
    return float((got.float() - expected.float()).norm() / (expected.float() - x.float()).norm().clamp_min(1e-6))


def agree(got: Tensor, expected: Tensor, x: Tensor, leap: Callable[[], float]) -> bool:
    """Whether a block that was given ``x`` gave what was expected of it, up to rounding; ``leap`` is asked where it did not."""
    difference = relative(got, expected, x)
    fine = 1e-3 if x.dtype in (torch.float32, torch.float64) else _COARSE
    return difference < fine or torch.allclose(got.float(), expected.float(), atol=1e-5) or difference < min(leap(), _COARSE)


def leap_of(body: Body, weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> float:
    """How far the output of ``body`` moves, at most, when the last bits of its stream do.

    A block that quantises its activations (dynamic int8) turns a difference in the last bits into one of a whole level.
    """
    roles = body.known_roles
    x = tensors[roles.stream_input]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    moved = [x * (1 + 1e-5 * noise) if i == roles.stream_input else t for i, t in enumerate(tensors)]
    with torch.no_grad():
        plain, other = (body.graph_module(*weights, *given)[roles.stream_output] for given in (tensors, moved))
    return 3 * relative(other, plain, x)
