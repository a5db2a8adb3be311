"""Verify: what every program must be after a pass. A failure here is our bug, except where the model itself is not repeatable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tokencache_compile.errors import InvariantError, UnsupportedModelError
from tokencache_compile.ir import BlockProgram, CacheUnit, Capture, StepProgram
from tokencache_compile.macs import MacCounter
from tokencache_compile.opaque_modules import ON_GRID
from tokencache_compile.passes.caches import unit_caches
from tokencache_compile.passes.capture import BLOCK_OP
from tokencache_compile.passes.kept_rows import KeptRows
from tokencache_compile.passes.on_shapes import run_on_shapes
from tokencache_compile.passes.regions import cached_region
from tokencache_compile.passes.rounding import agree, leap_of
from tokencache_compile.plan import CacheConfig, CachePlan


def verify_blocks(program: BlockProgram) -> None:
    """Every block call of the skeleton has its block, body and weights."""
    program.skeleton.graph.lint()
    calls = [n.name for n in program.skeleton.graph.nodes if n.target is BLOCK_OP]
    if calls != [block.node for block in program.blocks]:
        raise InvariantError(f"the skeleton calls blocks {calls} and the program has {[b.node for b in program.blocks]}")
    for block in program.blocks:
        missing = [name for name in block.weight_fqns(program.body_of(block)) if name not in program.tensors]
        if missing:
            raise InvariantError(f"{block.fqn} lacks the weights {missing}")


def verify_step(step: StepProgram, inputs: Sequence[Tensor], num_random: tuple[int, int, int]) -> int:
    """Run the step on shapes alone, where they suffice: caches come out as they went in. Returns the step's MACs.

    Args:
        inputs: example inputs (their values are used only where shapes depend on them).
        num_random: shape [1, L cached, N] of the ``random_scores`` input, if the step has one.
    """
    step.module.graph.lint()
    if any(n.target is BLOCK_OP for n in step.module.graph.nodes):
        raise InvariantError("a block call of the skeleton was left in a step graph")
    counter = MacCounter()
    results = run_on_shapes(step, inputs, num_random, counter)
    if len(results) != step.num_outputs + len(step.caches):
        raise InvariantError(f"a step of {len(step.caches)} caches returned {len(results)} values")
    for spec, value in zip(step.caches, results[step.num_outputs :], strict=True):
        if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
            raise InvariantError(f"cache {spec.name} {spec.shape} {spec.dtype} came out as {tuple(value.shape)} {value.dtype}")
    return counter.macs


def verify_context(program: BlockProgram, captured: Capture, plan: CachePlan) -> None:
    """Tokens reach each other through the attentions that were found, and through nothing else.

    A P-step's block with every token as context then gives its kept tokens what the block itself gives them. Contexts other
    than ``kept`` are made by rewriting those attentions, and would be something else in a block that mixes tokens elsewhere.
    """
    config = CacheConfig(context="full", forecast=0, history="full_steps", scorer="random")
    draw = torch.Generator().manual_seed(0)
    first_of = {block.body: block for block in reversed(program.blocks[: plan.num_cached])}
    for block in first_of.values():
        body = program.body_of(block)
        if any(node.target is ON_GRID for node in body.graph_module.graph.nodes):
            raise UnsupportedModelError(
                block.fqn,
                f"its tokens mix with their neighbours on the grid, which context={plan.config.context!r} does not know",
                'Use context="kept".',
            )
        call, roles, stream = captured.calls[block.index], body.known_roles, program.known_stream
        kept = max(stream.tokens // 2, 1)
        index = torch.randperm(stream.tokens, generator=draw)[:kept].expand(stream.batch, -1).to(stream.device)
        tensors = list(call.tensors)
        for position in (roles.stream_input, *(c.input for c in roles.companions)):
            tensors[position] = torch.randn(tensors[position].shape, generator=draw).to(tensors[position])
        weights = [program.tensors[name] for name in block.weight_fqns(body)]
        (caches,) = unit_caches(program, replace(plan, config=config), [CacheUnit(block.index, block.index, False)])
        region = cached_region(body, config, stream, kept, caches).graph_module
        with torch.no_grad():
            expected = body.graph_module(*weights, *tensors)
            got = region(*weights, *tensors, index, torch.zeros_like(tensors[roles.stream_input]))
        rows = KeptRows(index, stream, kept).positions(roles.layout)[0]
        streams = [(roles.stream_input, roles.stream_output, rows)]
        streams += [(c.input, c.output, torch.arange(c.shape[1], device=stream.device)) for c in roles.companions]
        leap = partial(leap_of, body, weights, tensors)
        if not all(agree(got[o][:, rows], expected[o][:, rows], tensors[i][:, rows], leap) for i, o, rows in streams):
            raise UnsupportedModelError(
                call.fqn,
                "its tokens reach each other in other ways than torch.nn.functional.scaled_dot_product_attention, "
                f"so context={plan.config.context!r} cannot be made for them",
                'Use context="kept", or an attention processor that calls that function (AttnProcessor2_0).',
            )


def same_as_eager(step: StepProgram, captured: Capture, initial: Sequence[Tensor]) -> None:
    """The I-step gives the eager model's outputs bit for bit on the captured call (``initial``: extras and caches)."""
    with torch.no_grad():
        results = step.module(*captured.example_inputs, *initial)
    for got, expected in zip(results[: step.num_outputs], captured.example_outputs, strict=True):
        if not torch.equal(torch.nan_to_num(got), torch.nan_to_num(expected)):
            raise UnsupportedModelError(
                "the model",
                f"its captured graph differs from an eager run by up to {float((got - expected).abs().max()):.1e}",
                "Its forward is not a fixed function of its inputs (random numbers, state, or a branch on values).",
            )
