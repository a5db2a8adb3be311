"""The reference is only worth something if it is right itself: checks of `plain_loop` against the eager models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from plain_loop import PlainLoop, choose, forecast_update, take
from torch import Tensor, nn

KINDS = ("dit", "pixart", "pixart_masked", "pixart_added")
LAYERS, ROWS, TOKENS = 4, 4, 16
Model = Any  # either class; diffusers' submodules are not typed


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(kind: str, layers: int = LAYERS) -> Model:
    torch.manual_seed(0)
    model: Model
    if kind == "dit":
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=layers, sample_size=16,
            patch_size=4, num_embeds_ada_norm=1000,
        )  # fmt: skip
    else:
        # the size embeddings split the width in three, hence three heads
        model = PixArtTransformer2DModel(
            num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=layers, sample_size=16,
            patch_size=4, cross_attention_dim=48, caption_channels=20, use_additional_conditions=kind == "pixart_added",
        )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if kind == "dit" else 0.1)  # diffusers' own initialisation leaves the gates too small to matter
    return model.eval()


def inputs(kind: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(seed)
    out: dict[str, Any] = {"hidden_states": torch.randn(ROWS, 4, 16, 16, dtype=dtype), "timestep": torch.randint(0, 1000, (ROWS,))}
    if kind == "dit":
        out["class_labels"] = torch.randint(0, 1000, (ROWS,))
        return out
    out["encoder_hidden_states"] = torch.randn(ROWS, 7, 20, dtype=dtype)
    if kind == "pixart_masked":
        out["attention_mask"] = (torch.arange(TOKENS) % 5 != 0).float().repeat(ROWS, 1)
        out["encoder_attention_mask"] = (torch.arange(7) < torch.tensor([[3], [5], [7], [1]])).long()
    if kind == "pixart_added":
        out["added_cond_kwargs"] = {
            "resolution": torch.full((ROWS, 2), 512.0, dtype=dtype), "aspect_ratio": torch.rand(ROWS, 1).to(dtype) + 0.5,
        }  # fmt: skip
    return out


@torch.no_grad()
def eager(model: Model, given: dict[str, Any]) -> Tensor:
    out: Tensor = model(**given, return_dict=False)[0]
    return out


def snapshot(loop: PlainLoop) -> list[dict[str, Tensor]]:
    """A copy of the state with tokens in dimension 1 throughout."""
    out = []
    for state in loop.state:
        tensors = {f"history{j}": entry for j, entry in enumerate(state.history)} | {"stamps": state.stamps, "score": state.score}
        if state.key is not None and state.value is not None:
            tensors |= {"key": state.key.transpose(1, 2), "value": state.value.transpose(1, 2)}
        if state.attention is not None:
            tensors |= {f"attention{j}": entry for j, entry in enumerate(state.attention)}
        out.append({name: tensor.clone() for name, tensor in tensors.items()})
    return out


def add_junk(loop: PlainLoop) -> None:
    for state in loop.state:
        for entry in [*state.history, state.key, state.value]:
            if entry is not None:
                entry.normal_(std=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", ["kept", "cached", "reuse"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_steps_equal_the_model(kind: str, context: str, dtype: torch.dtype) -> None:
    model = build(kind).to(dtype)
    loop = PlainLoop(model, [3] * (LAYERS - 1), 1, context, 2, "change")
    for step in range(3):
        given = inputs(kind, seed=step, dtype=dtype)
        assert torch.equal(loop.step(step, True, **given), eager(model, given))
    for state in loop.state:
        assert {entry.dtype for entry in state.history} == {dtype}
        assert state.stamps.dtype == state.score.dtype == torch.float32
        assert state.stamps.unique(dim=0).shape[0] == 1 and state.stamps[0, 0].tolist() == [2, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_matter(kind: str) -> None:
    """With gates near 0 every test here would pass on anything."""
    loop = PlainLoop(build(kind), [0] * LAYERS, 0, "kept", 0, "norm")
    given = inputs(kind)
    loop.step(0, True, **given)
    stream = loop.model.pos_embed(given["hidden_states"]).norm()
    for state in loop.state:
        assert state.history[0].norm() > 0.1 * stream


@pytest.mark.parametrize("context", ["kept", "full", "cached"])
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_every_token_is_the_model(kind: str, context: str) -> None:
    model = build(kind)
    loop = PlainLoop(model, [TOKENS] * (LAYERS - 1), 1, context, 2, "change")
    loop.step(0, True, **inputs(kind, seed=1))
    add_junk(loop)
    given = inputs(kind, seed=2)
    torch.testing.assert_close(loop.step(1, False, **given), eager(model, given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_while_the_input_stays(kind: str) -> None:
    """On the I-step's own input a held update and a reused attention output are right, and so is any mixture."""
    model, given = build(kind), inputs(kind)
    for context in ("full", "cached", "reuse"):
        loop = PlainLoop(model, [0, 5, 11, TOKENS], 0, context, 0, "norm")
        loop.step(0, True, **given)
        torch.testing.assert_close(loop.step(1, False, **given), eager(model, given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
@pytest.mark.parametrize("kind", ["dit", "pixart", "pixart_masked"])
def test_first_block_against_the_eager_block(kind: str, context: str) -> None:
    """What a context means, told by diffusers' own block with its attn1 patched or fed other tokens."""
    model, before, given = build(kind, layers=1), inputs(kind, seed=1), inputs(kind, seed=2)
    loop = PlainLoop(model, [5], 0, context, 0, "external", history="computed")
    loop.step(0, True, **before)
    scores = torch.rand(ROWS, 1, TOKENS)
    block = model.transformer_blocks[0]
    calls: list[dict[str, Any]] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args, kwargs: calls.append({"args": args, "kwargs": kwargs}), with_kwargs=True),
        block.attn1.register_forward_pre_hook(lambda _, args: calls[-1].update(normed=args[0])),
        block.attn1.register_forward_hook(lambda _, args, out: calls[-1].update(attention=out)),
    ]
    eager(model, before)
    eager(model, given)
    for handle in handles:
        handle.remove()
    x, kwargs = calls[1]["args"][0], calls[1]["kwargs"]
    index = scores[:, 0].topk(5).indices.sort().values
    x_kept = take(x, index)
    mask = kwargs["attention_mask"]

    def patched(attention: Tensor) -> Tensor:
        """The eager block on the kept tokens with its self-attention's output replaced."""
        handle = block.attn1.register_forward_hook(lambda *_: attention)
        out: Tensor = block(x_kept, **(kwargs | {"attention_mask": None}))  # the mask has had its effect on what replaces it
        handle.remove()
        return out

    with torch.no_grad():
        if context == "kept":
            kept_mask = None if mask is None else take(mask[:, 0], index)[:, None]
            expected = block(x_kept, **(kwargs | {"attention_mask": kept_mask}))
        elif context == "full":
            expected = take(block(x, **kwargs), index)
        elif context == "reuse":
            expected = patched(take(calls[0]["attention"], index))
        else:
            # keys and values come from the old normed stream, but for the kept tokens
            sources = calls[0]["normed"].clone()
            for b in range(ROWS):
                sources[b, index[b]] = calls[1]["normed"][b, index[b]]
            attention = block.attn1(take(calls[1]["normed"], index), encoder_hidden_states=sources, attention_mask=mask)
            expected = patched(attention)
    loop.step(1, False, scores, **given)
    assert torch.equal(loop.chosen[0], index)
    torch.testing.assert_close(take(loop.state[0].history[0], index), expected - x_kept, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_history_of_full_steps(kind: str, context: str) -> None:
    """What a P-step recomputes reaches the stream as with the other history, and the caches of keys and values alone."""
    loops = [PlainLoop(build(kind), [5, 0, 16], 1, context, 2, "change", history=history) for history in ("full_steps", "computed")]
    for loop in loops:
        for step in range(3):
            loop.step(step, True, **inputs(kind, seed=step))
    before = snapshot(loops[0])
    outputs = [loop.step(4, False, **inputs(kind, seed=4)) for loop in loops]
    assert torch.equal(*outputs) == (context != "reuse")  # whose attention is forecast from the I-steps alone, or held
    for old, new, computed in zip(before, snapshot(loops[0]), snapshot(loops[1]), strict=True):
        for name in old:
            assert torch.equal(new[name], (computed if name in ("key", "value") else old)[name]), name


@pytest.mark.parametrize("scorer", ["change", "norm", "external"])
@pytest.mark.parametrize("context", ["kept", "full", "cached", "reuse"])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_partial_step_touches_only_the_kept_tokens(kind: str, context: str, scorer: str) -> None:
    loop = PlainLoop(build(kind), [5, 0, 16], 1, context, 2, scorer, history="computed")
    for step in range(3):
        loop.step(step, True, **inputs(kind, seed=step))
    before = snapshot(loop)
    scores = torch.rand(ROWS, 3, TOKENS) if scorer == "external" else None
    loop.step(4, False, scores, **inputs(kind, seed=4))
    for old, new, index in zip(before, snapshot(loop), loop.chosen, strict=True):
        kept = torch.zeros(ROWS, TOKENS, dtype=torch.bool).scatter(1, index, True)
        for name in old:
            assert torch.equal(old[name][~kept], new[name][~kept]), name
        assert torch.equal(new["history1"][kept], old["history0"][kept])
        assert torch.equal(new["history2"][kept], old["history1"][kept])
        assert (new["stamps"][kept] == torch.tensor([4.0, 2.0, 1.0])).all()
        assert (new["history0"][kept] != old["history0"][kept]).any(dim=-1).all()
        for name in {"key", "value"} & old.keys():
            assert (new[name][kept] != old[name][kept]).flatten(1).any(dim=-1).all()
        if context == "reuse":
            assert torch.equal(old["attention0"], new["attention0"])
        wanted = {"change": new["history0"] - old["history0"], "norm": new["history0"], "external": torch.zeros(ROWS, TOKENS, 1)}
        torch.testing.assert_close(new["score"][kept], wanted[scorer].norm(dim=-1)[kept])


def test_first_scores() -> None:
    loop = PlainLoop(build("dit"), [1] * LAYERS, 0, "kept", 1, "change")
    loop.step(0, True, **inputs("dit", seed=0))
    first = [state.history[0] for state in loop.state]
    for state in loop.state:
        torch.testing.assert_close(state.score, state.history[0].norm(dim=-1))
    loop.step(1, True, **inputs("dit", seed=1))
    for state, old in zip(loop.state, first, strict=True):
        torch.testing.assert_close(state.score, (state.history[0] - old).norm(dim=-1))


def test_bfloat16_partial_steps() -> None:
    for kind in ("dit", "pixart_masked"):
        model = build(kind).to(torch.bfloat16)
        for context in ("kept", "full", "cached", "reuse"):
            loop = PlainLoop(model, [5, 0, 16], 1, context, 2, "change", "pair")
            outs = [loop.step(step, step < 2, **inputs(kind, seed=step, dtype=torch.bfloat16)) for step in range(4)]
            assert all(out.dtype == torch.bfloat16 and out.isfinite().all() for out in outs)
            for state in loop.state:
                assert {entry.dtype for entry in state.history} == {torch.bfloat16}
                assert state.score.dtype == state.stamps.dtype == torch.float32


@pytest.mark.parametrize("order", [0, 1, 2])
def test_forecast_is_exact_on_polynomials(order: int) -> None:
    """Small integers, so that fp32 has nothing to round; every token has stamps of its own."""
    torch.manual_seed(0)
    shape = (2, 8, 3)
    coefficients = [torch.randint(-4, 5, shape).float() for _ in range(order + 1)]

    def polynomial(at: Tensor) -> Tensor:
        return sum(c * at**power for power, c in enumerate(coefficients))  # type: ignore[return-value]

    gaps = torch.tensor([2.0, 4.0])[torch.randint(0, 2, (*shape[:2], order + 1))]
    stamps = 8.0 - (gaps.cumsum(-1) - gaps[..., :1])  # newest first
    history = [polynomial(stamps[..., j : j + 1]) for j in range(order + 1)]
    for step in (9, 10):
        torch.testing.assert_close(forecast_update(history, stamps, step), polynomial(torch.tensor(float(step))), atol=1e-4, rtol=1e-6)


def test_forecast_leaves_out_what_was_never_computed() -> None:
    history = [torch.full((1, 3, 1), value) for value in (5.0, 3.0, 100.0)]
    stamps = torch.tensor([[[4.0, -1.0, -1.0], [4.0, 2.0, -1.0], [4.0, 2.0, 0.0]]])
    expected = torch.tensor([[[5.0], [7.0], [3 * 5.0 - 3 * 3.0 + 100.0]]])
    torch.testing.assert_close(forecast_update(history, stamps, 6), expected)
    assert forecast_update([entry.bfloat16() for entry in history], stamps, 6).dtype == torch.float32


def test_forecast_falls_back_where_it_would_magnify_errors() -> None:
    """Values computed close together are extrapolated far by a lower degree: all three at step 5, none of them at step 8."""
    history = [torch.full((1, 3, 1), value) for value in (5.0, 3.0, 2.0)]
    stamps = torch.tensor([[[4.0, 3.0, 2.0], [4.0, 2.0, 1.0], [4.0, 1.0, 0.0]]])
    for step, expected in ((5, [8.0, 6.0, 16 / 3]), (6, [9.0, 7.0, 19 / 3]), (8, [5.0, 9.0, 23 / 3])):
        torch.testing.assert_close(forecast_update(history, stamps, step).flatten(), torch.tensor(expected))


def test_nothing_kept_adds_the_forecast() -> None:
    model = build("dit")
    loop = PlainLoop(model, [0] * LAYERS, 0, "kept", 1, "norm")
    streams = []
    for step in range(2):
        given = inputs("dit", seed=step)
        loop.step(step, True, **given)
        streams.append([state.history[0] for state in loop.state])
    given = inputs("dit", seed=7)
    out = loop.step(4, False, **given)
    with torch.no_grad():
        x = model.pos_embed(given["hidden_states"]) + sum(new + 3 * (new - old) for old, new in zip(*streams, strict=True))
        blocks, model.transformer_blocks = model.transformer_blocks, nn.ModuleList([PassTo(x, model.transformer_blocks[0])])
        expected = eager(model, given)
        model.transformer_blocks = blocks
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


class PassTo(nn.Module):
    """Stands in for all blocks: gives x whatever comes in. The epilogue of DiT reads norm1.emb of block 0."""

    def __init__(self, x: Tensor, block: nn.Module) -> None:
        super().__init__()
        self.x = x
        self.norm1 = block.norm1

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.x


def test_selection() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.0, 5.0, 1.0, 4.0], [9.0, 0.0, 0.0, 1.0], [0.0, 0.0, 6.0, 5.0]])
    assert choose(scores, 2, "sample").tolist() == [[1, 2], [1, 3], [0, 3], [2, 3]]
    assert choose(scores, 2, "batch").tolist() == [[0, 2]] * 4  # sums 10, 7, 10, 10: of a tie the lower indices
    assert choose(scores, 1, "pair").tolist() == [[0], [3], [0], [3]]
    assert choose(scores, 0, "sample").shape == (4, 0)
    with pytest.raises(ValueError, match="even"):
        choose(scores[:3], 1, "pair")


def test_reset_and_refusals() -> None:
    model, given = build("dit"), inputs("dit")
    loop = PlainLoop(model, [3] * LAYERS, 0, "cached", 1, "external")
    with pytest.raises(RuntimeError, match="I-step"):
        loop.step(0, False, torch.rand(ROWS, LAYERS, TOKENS), **given)
    loop.step(0, True, **given)
    with pytest.raises(ValueError, match="scores"):
        loop.step(1, False, **given)
    loop.reset()
    assert loop.state == []
    with pytest.raises(ValueError, match="counts"):
        PlainLoop(model, [3] * LAYERS, 1, "cached", 1, "norm")
    with pytest.raises(ValueError, match="eval"):
        PlainLoop(build("dit").train(), [3] * LAYERS, 0, "cached", 1, "norm")
