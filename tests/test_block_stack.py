"""A model run block by block: the same bits as the model, the predictor's scores, and who gets a gradient."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from plain_run import first_block_call, make_predictor
from tiny import LAYERS, TOKENS, Model, build, inputs
from torch import Tensor

from tokencache_compile.errors import InputError
from tokencache_compile.ir import Block
from tokencache_compile.learn.stack import BlockStack, call_of

KINDS = ["dit", "pixart", "pixart_masked", "pixart_added"]


@cache
def stack_of(kind: str) -> tuple[Model, BlockStack]:
    model = build(kind)
    return model, BlockStack(model, inputs(kind))


def eager_streams(model: Model, **given: Any) -> tuple[Tensor, list[Tensor]]:
    """The eager model's output, and the stream before its first block and after each, seen by hooks."""
    streams: list[Tensor] = []
    first = model.transformer_blocks[0].register_forward_pre_hook(lambda _, args: streams.append(args[0].clone()))
    handles = [first, *(b.register_forward_hook(lambda _, args, out: streams.append(out.clone())) for b in model.transformer_blocks)]
    with torch.no_grad():
        output: Tensor = model(**given, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return output, streams


@pytest.mark.parametrize("kind", KINDS)
def test_run_and_updates_are_the_model_bit_for_bit(kind: str) -> None:
    """With other values than those it was captured with."""
    model, stack = stack_of(kind)
    given = inputs(kind, seed=7, timestep=321)
    expected, expected_streams = eager_streams(model, **given)
    assert not torch.equal(expected, eager_streams(model, **inputs(kind))[0])
    visited: list[int] = []

    def visit(block: Block, block_inputs: list[Tensor]) -> Tensor:
        visited.append(block.index)
        return stack.compute(block, block_inputs)

    with torch.no_grad():
        assert torch.equal(stack.run(given, visit), expected)
        output, streams, first = stack.updates(given)
    assert visited == list(range(LAYERS)) and stack.num_blocks == LAYERS
    assert torch.equal(output, expected)
    assert len(streams) == LAYERS + 1 == len(expected_streams)
    assert all(torch.equal(a, b) for a, b in zip(streams, expected_streams, strict=True))
    assert torch.equal(stack.stream_of(stack.program.blocks[0], first), expected_streams[0])


def test_a_visitor_stands_in_for_its_block() -> None:
    """A block replaced by the identity: what the eager model computes with that block taken out."""
    model, stack = stack_of("dit")
    given = inputs("dit")

    def visit(block: Block, block_inputs: list[Tensor]) -> Tensor:
        return stack.stream_of(block, block_inputs) if block.index == 1 else stack.compute(block, block_inputs)

    handle = model.transformer_blocks[1].register_forward_hook(lambda _, args, out: args[0])
    try:
        expected, _ = eager_streams(model, **given)
    finally:
        handle.remove()
    with torch.no_grad():
        got = stack.run(given, visit)
    assert torch.equal(got, expected)
    assert not torch.equal(got, eager_streams(model, **given)[0])


def test_compute_takes_another_stream() -> None:
    model, stack = stack_of("dit")
    given = inputs("dit")
    _, streams, first = stack.updates(given)
    (_, *rest), kwargs = first_block_call(model, **given)
    other = torch.randn_like(streams[0])
    with torch.no_grad():
        got = stack.compute(stack.program.blocks[0], first, other)
        assert torch.equal(got, model.transformer_blocks[0](other, *rest, **kwargs))
        assert torch.equal(stack.compute(stack.program.blocks[0], first), streams[1])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_predictor_on_the_first_blocks_call(kind: str) -> None:
    model, stack = stack_of(kind)
    predictor = make_predictor(model)
    given = inputs(kind, seed=9)
    args, kwargs = first_block_call(model, **given)
    with torch.no_grad():
        expected = predictor(*args, **kwargs)
        _, _, first = stack.updates(given)
        got = stack.scores(predictor, first)
    assert got.shape == (4, LAYERS, TOKENS) and float(expected.std()) > 0.01
    assert torch.equal(got, expected)


def test_a_new_predictor_is_block_1_with_an_idle_head() -> None:
    model, stack = stack_of("pixart")
    predictor = stack.new_predictor()
    own, block = predictor.block.state_dict(), model.transformer_blocks[0].state_dict()
    assert own.keys() == block.keys()
    assert all(torch.equal(own[name], block[name]) and own[name].data_ptr() != block[name].data_ptr() for name in own)
    with torch.no_grad():
        _, _, first = stack.updates(inputs("pixart"))
        assert torch.equal(stack.scores(predictor, first), torch.full((4, LAYERS, TOKENS), 0.5))


def test_gradients_of_the_scores_reach_the_predictor_alone() -> None:
    model, stack = stack_of("dit")
    predictor = make_predictor(model)
    _, _, first = stack.updates(inputs("dit"))
    stack.scores(predictor, first).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in predictor.parameters() if p.numel() > 1)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_reach_only_trainable_parameters() -> None:
    """Of a block in the middle; the values are those of the eager model's own backward pass."""
    model = build("dit", layers=3)
    given = inputs("dit")
    names = frozenset(f"transformer_blocks.1.{name}" for name in ("attn1.to_q.weight", "ff.net.2.bias"))
    stack = BlockStack(model, given, trainable=names)
    output = stack.run(given, stack.compute)
    output.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == names
    for p in model.parameters():
        p.grad = None
    model(**given, return_dict=False)[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in names:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
            assert bool(found[name].abs().max() > 0)


def test_without_trainable_parameters_nothing_requires_a_gradient() -> None:
    _, stack = stack_of("dit")
    assert not stack.run(inputs("dit"), stack.compute).requires_grad


@pytest.mark.parametrize("change", ["rows", "dtype", "missing mask"])
def test_flatten_refuses_another_signature(change: str) -> None:
    _, stack = stack_of("pixart_masked")
    given = inputs("pixart_masked")
    assert [tuple(t.shape) for t in stack.flatten(given)][:2] == [(4, 4, 8, 8), (4, 7, 20)]
    if change == "rows":
        given = inputs("pixart_masked", rows=2)
    elif change == "dtype":
        given["hidden_states"] = given["hidden_states"].double()
    else:
        del given["attention_mask"]
    with pytest.raises(InputError, match="keep one batch size and shape"):
        stack.flatten(given)


def test_a_call_that_does_not_fit_the_model_is_refused() -> None:
    model, stack = stack_of("dit")
    with pytest.raises(InputError, match=r"does not fit DiTTransformer2DModel.*prompt"):
        stack.flatten({**inputs("dit"), "prompt": torch.zeros(4)})
    with pytest.raises(InputError, match=r"does not fit.*hidden_states"):
        BlockStack(model, {"timestep": torch.zeros(4)})


def test_call_of_orders_and_completes_a_call() -> None:
    model, _ = stack_of("dit")
    given = inputs("dit")
    bound = call_of(model, dict(reversed(given.items())) | {"return_dict": False})
    assert list(bound) == ["hidden_states", "timestep", "class_labels", "cross_attention_kwargs"]
    assert bound["hidden_states"] is given["hidden_states"] and bound["cross_attention_kwargs"] is None
