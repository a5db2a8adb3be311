"""A quick subset of benchmarks/coverage.py: blocks of one stream and of two, text beside image and joined with it, and refusals."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from check_family import CONTEXTS, TOLERANCE, Checked, check, error, run
from families import FAMILIES

from tokencache_compile import Schedule, UnsupportedModelError, transform
from tokencache_compile.learn.stack import BlockStack


@pytest.mark.parametrize(
    ("key", "streams"),
    [
        ("DiTTransformer2DModel", "1"),
        ("PixArtTransformer2DModel", "1"),
        ("SD3Transformer2DModel", "2"),
        ("FluxTransformer2DModel", "2"),
        ("QwenImageTransformer2DModel", "2"),
        ("CogVideoXTransformer3DModel (rotary)", "2"),
        ("HunyuanVideoFramepackTransformer3DModel", "2 (text +50)"),
    ],
)
def test_right_in_every_context(key: str, streams: str) -> None:
    """The I-step bit for bit, a P-step of all tokens, and one at ratio 0.9 against the independent reference."""
    result = check(FAMILIES[key])
    assert result.streams == streams
    assert {name: context.ok for name, context in result.contexts.items()} == dict.fromkeys(CONTEXTS, True), result.line()


@pytest.mark.parametrize(
    ("key", "where", "reason"),
    [
        ("AnyFlowFARTransformer3DModel", "blocks.0", "BlockMask"),
        ("MiniMaxMusic3RVQDepthDecoder", "layers.0", "its attention is causal"),
        ("WanAnimate2Transformer3DModel", "WanAnimate2Transformer3DModel", "its argument kv_cache is a WanAnimate2KVCache"),
    ],
)
def test_refused_by_name(key: str, where: str, reason: str) -> None:
    (context,) = check(FAMILIES[key], ("kept",)).contexts.values()
    assert context.refusal.startswith(f"{where}: ") and reason in context.refusal, context


@cache
def flux() -> Checked:
    return Checked(FAMILIES["FluxTransformer2DModel"])


@pytest.mark.parametrize("history", ["full_steps", "computed"])
@pytest.mark.parametrize(("context", "keep"), [("cached", (5, 0, 3)), ("full", (0, 0, 4)), ("reuse", (0, 2, 0)), ("reuse", (0, 0, 0))])
def test_skipped_blocks_add_the_updates_of_all_streams(context: str, keep: tuple[int, ...], history: str) -> None:
    """On the I-step's own input a P-step gives the I-step, whatever is kept: so text moves on through skipped blocks too.

    FLUX's blocks have two structures and hand both streams on, so runs of skipped blocks fold into one unit.
    """
    checked = flux()
    steps = checked.steps(context=context, keep=(keep,), history=history, forecast=1)
    units = [(unit.first, unit.last) for unit in steps.units]
    folded = {(0, 0, 4): [(0, 1), (2, 2)], (0, 0, 0): [(0, 2)]}
    assert units == folded.get(keep, [(0, 0), (1, 1), (2, 2)])
    expected, caches = run(steps, False, checked.now, steps.initial_caches(torch.device("cpu")), 0)
    got, _ = run(steps, True, checked.now, caches, 1)
    assert error(got, expected) < TOLERANCE
    named = dict(zip([spec.name for spec in steps.full.caches], caches, strict=True))
    beside = [name for name in named if name.startswith("companion")]
    assert len(beside) == 2 * sum(unit.skipped for unit in steps.units)
    forgotten = [torch.zeros_like(cache) if name in beside else cache for name, cache in named.items()]
    assert error(run(steps, True, checked.now, forgotten, 1)[0], expected) > 10 * TOLERANCE, "the text's updates are not read"


@pytest.mark.parametrize("key", ["FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_a_run_with_forecasts(key: str) -> None:
    """The dispatcher over several steps: I-steps are the model's own, P-steps keep to it where the input moves along a line."""
    model, given = FAMILIES[key].build()
    dispatcher = transform(model, 0.8, last_k=1, forecast=1, schedule=Schedule(every=2), backend="eager")
    start, drift = given["hidden_states"], 1e-3 * torch.randn(given["hidden_states"].shape)
    errors = []
    for step in range(5):
        now = given | {"hidden_states": start + step * drift, "timestep": given["timestep"] - 1e-4 * step}
        with torch.no_grad():
            errors.append(error(dispatcher(**now)[0], model(**now)[0]))
    assert errors[0] == errors[2] == errors[4] == 0 and dispatcher.summary().cached_steps == 2
    moved = error(model(**given)[0], model(**now)[0])
    assert 0 < errors[3] < 0.1 * moved  # its forecast has two I-steps to go by; holding would be off by a quarter of the way


def test_masks_between_tokens_and_joined_streams() -> None:
    """A sliding window for all samples, and text and image in one stream with a mask between all tokens of each sample."""
    for key in ("AceStepTransformer1DModel", "Ideogram4Transformer2DModel"):
        result = check(FAMILIES[key], ("full",))
        assert result.contexts["full"].ok, result.line()


def test_streams_without_a_batch_axis() -> None:
    """Cosmos 3 packs the tokens of one sample, which is not the model's first argument."""
    checked = Checked(FAMILIES["Cosmos3OmniTransformer"])
    assert checked.captured.calls[0].tensors[0].shape == (1, 7, 32) and checked.captured.sample_inputs == (3,)
    assert checked.context("cached").ok and checked.onnx("cached").ok


def test_rows_that_a_mask_repeats() -> None:
    """Qwen-Image 2.1 repeats rows as often as a mask says, and writes the sample into some of them; its shapes are static all the same."""
    checked = Checked(FAMILIES["QwenImage21Transformer2DModel"])
    assert checked.context("kept").ok and checked.onnx("kept").ok


def test_neighbours_on_the_grid_are_held() -> None:
    """Sana's feed-forward convolves over the grid; attention among the kept tokens is its only context."""
    result = check(FAMILIES["SanaTransformer2DModel"], ("kept", "full"))
    assert result.contexts["kept"].ok, result.line()
    assert "transformer_blocks.0: its tokens mix with their neighbours on the grid" in result.contexts["full"].refusal


def test_training_refuses_blocks_with_text() -> None:
    model, given = FAMILIES["FluxTransformer2DModel"].build()
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks.0: it carries other tokens than the cached ones"):
        BlockStack(model, given)


def test_a_list_of_blocks_that_cannot_be_cached_stays_outside() -> None:
    """Latte's blocks over time carry other tokens than those over space."""
    checked = Checked(FAMILIES["LatteTransformer3DModel"])
    assert {block.fqn.split(".")[0] for block in checked.program.blocks} == {"transformer_blocks"}
    assert "left out temporal_transformer_blocks" in checked.program.provenance[0]
    assert checked.context("kept").ok
