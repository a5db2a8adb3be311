"""Sessions: graphs that run outside torch, tensors by name, and the engine that the dispatcher sees of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tokencache_compile.ir import StepIO


class Session(Protocol):
    """Runs one graph. Writes to nothing it is given; what it returns stays as it is for as long as it is held."""

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A contiguous tensor for every input by name (others are ignored) → a tensor for every output by name."""
        ...


class SessionEngine:
    """A step as the dispatcher runs it, on sessions.

    Args:
        io: what the step reads and computes.
        session: runs it.
        scores: where the host selects, runs the graph of the scores.
    """

    def __init__(self, io: StepIO, session: Session, scores: Session | None = None) -> None:
        self.io, self.session, self.scores = io, session, scores

    def __call__(self, inputs: Sequence[Tensor], extras: Sequence[Tensor], caches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        named = dict(zip(self.io.arguments, (*inputs, *extras, *caches), strict=True))
        values = named | self._selected(named)
        results = self.session.run(values)
        after = named | results
        return [results[spec.name] for spec in self.io.outputs[: self.io.num_outputs]], [after[name] for name in self.io.next_caches]

    def _selected(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``index_<block>`` [B or 1, n] of the blocks whose tokens the host selects."""
        if self.scores is None:
            return {}
        scores = self.scores.run(named)
        return {
            f"index_{block:02d}": torch.topk(scores[f"scores_{block:02d}"], kept, dim=1, sorted=False).indices
            for block, kept in self.io.selects
        }
