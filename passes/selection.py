"""Selection: scores at the head of the P-graph, and a static top-k per block.

The scores [B, N] of a block come from its own score cache (``change``, ``norm``, ``attention``), from an input (``random``), from the
block's input tokens (``tome``, whose destinations are drawn by that input), or from the predictor, which sits where block 1 would see the
same stream and conditioning: one node for all blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tokencache_compile.ir import Block, BlockProgram
from tokencache_compile.passes.cache_ops import TOCA_CELL, TOME_CELL, select_tokens, toca_score, tome_score
from tokencache_compile.passes.caches import UnitCaches
from tokencache_compile.passes.regions import plain_region
from tokencache_compile.passes.step_graph import StepGraph
from tokencache_compile.passes.token_grid import grid_of_cells
from tokencache_compile.plan import CachePlan
from tokencache_compile.predictor import CachePredictor


def below_one(logits: Any) -> Any:
    """α − 1 without α's rounding, float32: by what the sigmoid of ``logits`` falls short of 1.

    A trained α rounds to 1 for many tokens, and such ties would fall differently in every engine. Summed over a guidance pair it still
    orders as α does, which the logits do not. As a quotient, because ONNX Runtime's own sigmoid is off by 1e-8: that is all of it here.
    """
    return -1.0 / (1.0 + torch.exp(logits.float()))


def predictor_scores(step: StepGraph, program: BlockProgram, predictor: CachePredictor, first_inputs: list[Node]) -> Any:
    """Scores [B, L, N] = head(block 1's structure with the predictor's weights), from block 1's own inputs: see :func:`below_one`."""
    body = program.body_of(program.blocks[0])
    tensors = {**dict(predictor.block.named_parameters()), **dict(predictor.block.named_buffers())}
    weights = [step.weight(f"predictor.block.{name}", tensors[name]) for name in body.weight_names]
    outputs = step.call(body.name, lambda: plain_region(body), [*weights, *first_inputs], body.num_outputs)
    hidden = step.proxy(outputs[body.known_roles.stream_output])
    layout = body.known_roles.layout
    if layout.others:
        hidden = hidden.narrow(1, layout.before, program.known_stream.tokens)
    head = [step.proxy(step.weight(f"predictor.head.{name}", tensor)) for name, tensor in predictor.head.named_parameters()]
    return below_one(torch.nn.functional.linear(hidden, *head)).transpose(1, 2)


def select(step: StepGraph, plan: CachePlan, block: Block, inputs: list[Node], kept: int, names: UnitCaches, scores: Any) -> Any:
    """Index [B, n_l] of the tokens that ``block``, given ``inputs``, keeps."""
    stream, config = step.program.known_stream, plan.config
    if config.scorer == "attention" and names.score is not None and names.stamps is not None:
        received, stamps = step.cache_in[names.score.name], step.cache_in[names.stamps.name]
        grid = grid_of_cells(block.fqn, stream, TOCA_CELL, config.scorer)
        own = toca_score(received, stamps, step.extras["step"], config.schedule_of(None).every, grid)
    elif names.score is not None:
        own = step.cache_in[names.score.name]
    elif config.scorer == "random":
        own = step.extras["random_scores"][:, block.index]
    elif config.scorer == "tome":
        roles = step.program.body_of(block).known_roles
        tokens = step.proxy(inputs[roles.stream_input])
        if roles.layout.others:
            tokens = tokens.narrow(1, roles.layout.before, stream.tokens)
        own = tome_score(tokens, step.extras["random_scores"][0, block.index], grid_of_cells(block.fqn, stream, TOME_CELL, config.scorer))
    else:
        own = scores[:, block.index]
    return select_tokens(own, kept, config.selection, stream.batch)
