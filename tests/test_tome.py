"""ToMe as a selector: whole runs against a plain loop that looks for destinations and sources token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_loop import BlockState, Conditioning, PlainLoop, choose
from plain_run import SAFE_MARGIN, assert_close, drawn_scores
from tiny import LAYERS, ROWS, build, call_of, conditions, ddim, sample
from torch import Tensor, nn

import tokencache_compile
from tokencache_compile import ExportError, UnsupportedModelError, baselines
from tokencache_compile.passes.engine_graph import engine_graphs
from tokencache_compile.passes.pipeline import build_steps

STEPS, EVERY, CELL = 8, 4, 4
IMAGES = {"dit": (16, 16), "pixart": (8, 24)}  # grids of 8 × 8 and of 4 × 12 tokens


def by_tome(x: Tensor, draws: Tensor, columns: int) -> Tensor:
    """Scores [B, N] of the tokens ``x`` [B, N, C]: a destination's is 4 plus its draw, a source's how little it resembles any of them."""
    cells: dict[tuple[int, int], list[int]] = {}
    for token in range(len(draws)):
        cells.setdefault((token // columns // CELL, token % columns // CELL), []).append(token)
    assert {len(tokens) for tokens in cells.values()} == {CELL * CELL}
    destinations = [max(tokens, key=lambda token: float(draws[token])) for tokens in cells.values()]
    scores = torch.zeros(x.shape[:2])
    for row, tokens in enumerate(x):
        for token, own in enumerate(tokens):
            nearest = torch.cosine_similarity(own[None], tokens[destinations]).max()
            scores[row, token] = 4 + draws[token] if token in destinations else -nearest
    return scores


class TomeLoop(PlainLoop):
    """The plain loop, its tokens chosen from what each block is given."""

    smallest = float("inf")  # distance of the last kept score to the first left out

    def _partial_block(self, block: Any, x: Tensor, cond: Conditioning, state: BlockState, step: int, index: Tensor) -> Tensor:
        layer, kept = list(self.model.transformer_blocks).index(block), index.shape[1]
        draws = drawn_scores(step, len(self.keep), x.shape[1])[layer]
        scores = by_tome(x, draws, IMAGES["dit" if cond.class_labels is not None else "pixart"][1] // 2)
        best = (scores if self.selection == "sample" else scores.unflatten(0, (2, -1)).mean(0)).sort(descending=True).values
        self.smallest = min(self.smallest, float((best[:, kept - 1] - best[:, kept]).min()))
        return super()._partial_block(block, x, cond, state, step, choose(scores, kept, self.selection))


def noise(kind: str, seed: int) -> Tensor:
    return torch.randn(ROWS, 4, *IMAGES[kind], generator=torch.Generator().manual_seed(seed))


def plain_run(model: Any, kind: str, kept: int, selection: str) -> tuple[Tensor, list[Tensor]]:
    """The first noise from which no selection hangs on rounding, and the plain loop's run from there."""
    for seed in range(20):
        loop = TomeLoop(model, (kept,) * LAYERS, 0, "reuse", 2, "external", selection)

        def call(step: int, x: Tensor, timesteps: Tensor, loop: TomeLoop = loop) -> Tensor:
            tokens = x.shape[-2] * x.shape[-1] // 4
            scores = torch.rand(ROWS, LAYERS, tokens)  # what the loop does not go by
            return loop.step(step, step % EVERY == 0, scores, hidden_states=x, timestep=timesteps, **conditions(kind))

        outputs = ddim(call, noise(kind, seed), STEPS)
        if loop.smallest > SAFE_MARGIN:
            return noise(kind, seed), outputs
    pytest.fail("every noise made a selection that hangs on rounding")


@pytest.mark.parametrize(("kind", "selection"), [("dit", "sample"), ("dit", "pair"), ("pixart", "sample")])
def test_the_plain_loop(kind: str, selection: Any) -> None:
    model = build(kind, sample_size=16 if kind == "dit" else 8)
    config = baselines.tome(EVERY, selection=selection)
    kept = int(0.1 * IMAGES[kind][0] * IMAGES[kind][1] / 4 + 0.5)
    start, expected = plain_run(model, kind, kept, selection)
    dispatcher = tokencache_compile.transform(model, config=config, backend="eager")
    assert_close(ddim(call_of(dispatcher, conditions(kind)), start, STEPS), expected)
    assert dispatcher.plan.profiles == ((kept,) * LAYERS,)


def test_compiled_without_a_graph_break() -> None:
    model = build("dit", sample_size=16)
    start, expected = plain_run(model, "dit", 6, "sample")
    compiled = tokencache_compile.transform(model, config=baselines.tome(EVERY), backend="inductor")
    assert_close(ddim(call_of(compiled, conditions("dit")), start, STEPS), expected, 1e-4)


class OnPatches(nn.Module):
    """A DiT that is given its tokens, as packed latents are: nobody tells where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = build("dit").transformer_blocks
        self.patch_size = 2

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        x = hidden_states
        for block in self.transformer_blocks:
            x = block(x, None, None, None, timestep, None, class_labels)
        return x


def test_tokens_on_no_grid_of_cells_are_refused() -> None:
    given = dict(conditions("dit"), timestep=torch.full((ROWS,), 500))
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks.0: scorer=\"tome\".* 36 tokens lie on a grid of 6 × 6"):
        build_steps(build("dit", sample_size=12), given | {"hidden_states": sample(size=12)}, baselines.tome(), None)
    packed = given | {"hidden_states": torch.randn(ROWS, 16, 32, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(UnsupportedModelError, match=r"its 16 tokens lie on no known grid\. Use scorer=\"random\""):
        build_steps(OnPatches().eval(), packed, baselines.tome(), None)


def test_the_host_cannot_score_what_no_block_has_given_yet() -> None:
    given = dict(conditions("dit"), timestep=torch.full((ROWS,), 500), hidden_states=sample(size=16))
    steps = build_steps(build("dit", sample_size=16), given, baselines.tome(), None)
    with pytest.raises(ExportError, match='selection="host" was asked for with scorer="tome"'):
        engine_graphs(steps, ["sample"], "host")
