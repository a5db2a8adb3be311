"""Token selectors on equal terms (paper Table VI): one plan, one set of noises, and only the scores differ.

Every selector runs the same I- and P-step graphs, those of ``scorer="random"`` with its scores put in by hand.
ToMe and ToCa are their authors' scores (SPEC section 7), from what the last I-step shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.engine import Engine
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.passes.cache_ops import tome_score
from tokencache_compile.passes.pipeline import StepPrograms
from tokencache_compile.passes.selection import below_one
from tokencache_compile.predictor import CachePredictor

GRID_CELL_TOCA = 2


class Observed:
    """What the last I-step showed: every block's input stream, and the attention each token received in it."""

    def __init__(self) -> None:
        self.streams: list[Tensor] = []
        self.received: list[Tensor] = []


def observe(model: Any, kwargs: dict[str, Any]) -> Observed:
    """Run the eager model once with hooks on its blocks and self-attentions."""
    seen = Observed()

    def on_block(_: Any, args: tuple[Any, ...]) -> None:
        seen.streams.append(args[0])

    def on_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        heads = (-1, attention.heads)
        query, key = (linear(hidden).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for linear in (attention.to_q, attention.to_k))
        weights = torch.softmax(query @ key.transpose(-1, -2) * attention.scale, dim=-1)
        assert weights.shape[1] == heads[1]
        seen.received.append(weights.mean(1).sum(1))  # over queries: [B, N]

    handles = [block.register_forward_pre_hook(on_block) for block in model.transformer_blocks]
    handles += [block.attn1.register_forward_pre_hook(on_attention, with_kwargs=True) for block in model.transformer_blocks]
    try:
        with torch.no_grad():
            model(**kwargs, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def cells(tokens: int, size: int) -> Tensor:
    """The cell of ``size`` × ``size`` neighbours that each token of a square grid lies in, [N]."""
    side = round(tokens**0.5)
    row, column = torch.arange(tokens) // side, torch.arange(tokens) % side
    return (row // size) * -(-side // size) + column // size


def toca_scores(received: Tensor, age: Tensor, interval: float) -> Tensor:
    """ToCa: attention received (L2-normalised) plus 0.25 · age / interval; the best of every 2×2 cell × 1.6. [B, N]."""
    scores = torch.nn.functional.normalize(received, dim=1) + 0.25 * age / interval
    cell = cells(scores.shape[1], GRID_CELL_TOCA)
    best = torch.full((len(scores), int(cell.max()) + 1), -torch.inf).scatter_reduce(1, cell.expand_as(scores), scores, "amax")
    return torch.where(scores == best[:, cell], 1.6 * scores, scores)


class ScoredRun:
    """A transformer stand-in for one sampling run, its P-steps' tokens chosen by the selector called ``name``.

    ``engines`` run the steps: the I-step's, then one a P-graph.
    """

    def __init__(
        self,
        model: Any,
        steps: StepPrograms,
        engines: Sequence[Engine],
        name: str,
        predictor: CachePredictor | None = None,
        stack: BlockStack | None = None,
    ) -> None:
        self.model, self.steps, self.name, self.predictor, self.stack = model, steps, name, predictor, stack
        self.engines = engines
        self.step, self.caches = 0, steps.initial_caches(torch.device("cpu"))
        self.age: list[Tensor] = []
        self.seen = Observed()

    def __call__(self, rows: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        plan = self.steps.plan
        kwargs = dict(hidden_states=rows, timestep=timestep, class_labels=class_labels)
        full = plan.config.schedule_of(None).is_full(self.step)
        scores = torch.zeros(self.steps.random_shape)
        if full and self.name in ("tome", "toca"):
            self.seen = observe(self.model, kwargs)
            self.age = [torch.zeros(len(rows), plan.tokens) for _ in range(plan.num_cached)]
        if not full:
            scores = torch.stack(self._scores(kwargs, len(rows)), dim=1)
        engine = self.engines[0 if full else 1 + plan.profile_of(self.step)]
        outputs, self.caches = engine([rows, timestep, class_labels], [torch.tensor(float(self.step)), scores], self.caches)
        self.step += 1
        return (outputs[0],)

    def _cache(self, name: str) -> Tensor:
        return self.caches[[spec.name for spec in self.steps.full.caches].index(name)]

    def _scores(self, kwargs: dict[str, Any], rows: int) -> Sequence[Tensor]:
        plan = self.steps.plan
        blocks = range(plan.num_cached)
        draws, side = torch.rand(plan.tokens, generator=torch.Generator().manual_seed(self.step)), isqrt(plan.tokens)
        by_name: dict[str, Callable[[int], Tensor]] = {
            "norm": lambda block: self._cache(f"update_{block:02d}_0").norm(dim=-1),
            "change": lambda block: (self._cache(f"update_{block:02d}_0") - self._cache(f"update_{block:02d}_1")).norm(dim=-1),
            "tome": lambda block: tome_score(self.seen.streams[block], draws, (side, side)),
        }
        if self.name in by_name:
            return [by_name[self.name](block) for block in blocks]
        if self.name == "random":
            draw = torch.Generator().manual_seed(self.step)
            return list(torch.rand(plan.num_cached, plan.tokens, generator=draw)[:, None].expand(-1, rows, -1))
        if self.name == "toca":
            profile = plan.profiles[plan.profile_of(self.step)]
            found = []
            for block in blocks:
                self.age[block] += 1
                found.append(toca_scores(self.seen.received[block], self.age[block], plan.config.schedule_of(None).every))
                if profile[block]:
                    self.age[block].scatter_(1, found[-1].topk(profile[block], dim=1, sorted=False).indices, 0.0)
            return found
        assert self.predictor is not None and self.stack is not None
        first: list[Tensor] = []

        class Enough(Exception):
            pass

        def visit(_: Any, inputs: list[Tensor]) -> Tensor:
            first.extend(inputs)
            raise Enough

        with contextlib.suppress(Enough):
            self.stack.run(kwargs, visit)
        return list(below_one(self.stack.logits(self.predictor, first))[:, : plan.num_cached].unbind(1))
