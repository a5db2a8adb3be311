"""Regions: what a step does for one block, as a graph of its own that every block of the same structure calls.

A region takes its weights as inputs, so blocks of one structure and one keep count share it: the compiler sees it once
(``torch.compiler.nested_compile_region``) however deep the model is. No region returns one of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from tokencache_compile.ir import Body, Stream
from tokencache_compile.passes.cache_ops import (
    add_forecast,
    extrapolate,
    forecast_weights,
    put_tokens,
    take_tokens,
    token_rows,
    update_score,
)
from tokencache_compile.passes.context import BodyCopy
from tokencache_compile.passes.narrow_linears import narrow_linears
from tokencache_compile.plan import CacheConfig


class Region(nn.Module):
    """A graph that ``torch.compile`` compiles once and calls from every block that uses it."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    @torch.compiler.nested_compile_region
    def forward(self, *args: Any) -> Any:
        return self.graph_module(*args)


class _RegionGraph:
    """A graph under construction: plain torch code on proxies appends nodes to it."""

    def __init__(self, body: Body) -> None:
        self.graph = Graph()
        self.tracer = GraphAppendingTracer(self.graph)
        nodes = [n for n in body.graph_module.graph.nodes if n.op == "placeholder"]
        copies = [self.graph.placeholder(node.name) for node in nodes]
        self.weights, self.inputs = copies[: len(body.weight_names)], copies[len(body.weight_names) :]

    def placeholder(self, name: str) -> Any:
        return Proxy(self.graph.placeholder(name), self.tracer)

    def proxy(self, node: Node) -> Any:
        return Proxy(node, self.tracer)

    def finish(self, body: Body, outputs: Sequence[Any]) -> Region:
        self.graph.output(tuple(value.node for value in outputs))
        # Attention may draw dropout, so torch.fx would keep it though nothing reads it (context "reuse").
        self.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
        narrow_linears(self.graph)
        self.graph.lint()
        return Region(GraphModule(body.graph_module, self.graph))


def plain_region(body: Body) -> Region:
    """The block as it is on all tokens: ``(*weights, *inputs) -> outputs``."""
    if all(attention.groups is None for attention in body.known_roles.attentions):
        return Region(body.graph_module)
    region = _RegionGraph(body)
    copy = BodyCopy(region.graph, body, region.weights, region.inputs)
    copy.run()
    outputs: Any = body.graph_module.graph.output_node().args[0]
    return region.finish(body, [region.proxy(copy.all_tokens[node]) for node in outputs])


def full_region(body: Body, config: CacheConfig, has_score: bool) -> Region:
    """An I-step's block: ``(*weights, *inputs, [previous update]) -> (stream, update, [score], *context caches)``.

    The stream is the block's own output, bit for bit; the caches are read off beside it.
    """
    region = _RegionGraph(body)
    roles = body.known_roles
    previous = region.placeholder("previous_update") if has_score and config.scorer == "change" else None
    copy = BodyCopy(region.graph, body, region.weights, region.inputs)
    output = region.proxy(copy.run())
    update = output - region.proxy(region.inputs[roles.stream_input])
    scores = [update_score(update, previous)] if has_score else []
    context = [region.proxy(node) for node in copy.context_values(config.context)]
    return region.finish(body, [output, update, *scores, *context])


def cached_region(body: Body, config: CacheConfig, stream: Stream, kept: int, context_depths: Sequence[int]) -> Region:
    """A P-step's block: ``(*weights, *inputs, index, *forecast, *updates, [score], *context) -> (stream, *written caches)``.

    Gathers the tokens of ``index`` [B, n], runs the body on them and scatters the stream back; every other token adds its
    held or forecast update. ``forecast`` is nothing (order 0), the m+1 weights [1, 1, 1] that hold for all tokens (only
    I-steps in the history), or each token's stamps and the step. ``updates`` are newest first; the score is there if the
    scorer keeps one. Which caches are written: see :func:`caches.written_in_p_steps`.
    """
    region = _RegionGraph(body)
    roles = body.known_roles
    batch, tokens, order = stream.batch, stream.tokens, config.forecast
    shared = config.history == "full_steps"
    index = region.placeholder("index")
    if order and shared:
        forecast = [region.placeholder(f"forecast_weight_{i}") for i in range(order + 1)]
    elif order:
        stamps, step = region.placeholder("stamps"), region.placeholder("step")
        forecast = forecast_weights(stamps, step, order)
    else:
        forecast = []
    updates = [region.placeholder(f"update_{i}") for i in range(order + 1)]
    score = region.placeholder("score") if config.scorer in ("change", "norm") else None
    context = [[region.placeholder(f"{config.context}_{i}_{j}") for j in range(depth)] for i, depth in enumerate(context_depths)]

    rows = token_rows(index, batch, tokens)

    def take(value: Any) -> Any:
        return take_tokens(value, rows, batch, kept)

    def put(value: Any, new: Any) -> Any:
        return put_tokens(value, rows, new, batch, tokens)

    kept_inputs = list(region.inputs)
    x = region.proxy(region.inputs[roles.stream_input])
    x_kept = take(x)
    kept_inputs[roles.stream_input] = x_kept.node
    for side in roles.side_inputs:
        value = region.proxy(region.inputs[side.position])
        if side.has_batch:
            moved = take(value.transpose(1, side.token_dim)).transpose(1, side.token_dim)
        else:
            moved = value.index_select(side.token_dim, index[0])
        kept_inputs[side.position] = moved.node

    copy = BodyCopy(region.graph, body, region.weights, region.inputs, kept_inputs)
    new_context: list[Any] = []
    if config.context == "reuse":
        given = [extrapolate([take(value) for value in history], forecast if len(history) > 1 else []) for history in context]
    else:
        given = [history[0] for history in context]
    output = region.proxy(copy.run_kept(config.context, given, put, new_context))
    held = add_forecast(x, updates, forecast)
    stream_out = put(held, output)
    if shared:
        return region.finish(body, [stream_out, *new_context])
    update = output - x_kept
    results = [stream_out, put(updates[0], update)]
    older = [take(value) for value in updates[: max(order, 1)]]
    results += [put(cache, value) for cache, value in zip(updates[1:], older, strict=False)]
    if order:
        now = torch.cat([step.expand(batch, kept, 1), take(stamps)[..., :order]], dim=-1)
        results.append(put(stamps, now))
    if score is not None:
        results.append(put(score, update_score(update, older[0] if config.scorer == "change" else None)))
    return region.finish(body, [*results, *new_context])
