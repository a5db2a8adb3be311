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

from tokencache_compile.ir import Body, Layout, Stream
from tokencache_compile.passes.cache_ops import add_forecast, extrapolate, forecast_weights, load, store, update_score
from tokencache_compile.passes.caches import UnitCaches
from tokencache_compile.passes.context import BodyCopy
from tokencache_compile.passes.kept_rows import KeptRows
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
    copy = BodyCopy(region.tracer, body, region.weights, region.inputs)
    return region.finish(body, [region.proxy(node) for node in copy.run()])


def full_region(body: Body, config: CacheConfig, stream: Stream, has_score: bool) -> Region:
    """An I-step's block: ``(*weights, *inputs, [previous update]) -> (*outputs, update, [score], *context caches)``.

    The outputs are the block's own, bit for bit; the caches are read off beside them.
    """
    region = _RegionGraph(body)
    roles = body.known_roles
    previous = region.placeholder("previous_update") if has_score and config.scorer == "change" else None
    copy = BodyCopy(region.tracer, body, region.weights, region.inputs)
    outputs = [region.proxy(node) for node in copy.run()]
    update = outputs[roles.stream_output] - region.proxy(region.inputs[roles.stream_input])
    scores = [_score(update, previous, roles.layout, stream.tokens)] if has_score else []
    context = [region.proxy(node) for node in copy.context_values(config.context, stream.tokens)]
    return region.finish(body, [*outputs, update, *scores, *context])


def _score(update: Any, previous: Any, layout: Layout, tokens: int) -> Any:
    """The scores of ``tokens`` tokens, of updates that stand in ``layout``."""
    if layout.others:
        update, previous = (v if v is None else v.narrow(1, layout.before, tokens) for v in (update, previous))
    return update_score(update, previous)


def cached_region(body: Body, config: CacheConfig, stream: Stream, count: int, caches: UnitCaches) -> Region:
    """A P-step's block: ``(*weights, *inputs, index, *forecast, *updates, [score], *context) -> (*outputs, *written caches)``.

    Gathers the tokens of ``index`` [B, n], runs the body on them and scatters the stream back; every other token adds its
    held or forecast update. Rows and streams of other tokens (text) are computed in full. ``forecast`` is nothing (order 0),
    the m+1 weights [1, 1, 1] that hold for all tokens (only I-steps in the history), or each token's stamps and the step.
    ``updates`` are newest first; the score is there if the scorer keeps one. Which caches are written: see
    :func:`caches.written_in_p_steps`. ``caches`` are those of one of the blocks that call the region.
    """
    region = _RegionGraph(body)
    roles = body.known_roles
    layout, order = roles.layout, config.forecast
    shared = config.history == "full_steps"
    index = region.placeholder("index")
    given_weights = [region.placeholder(f"forecast_weight_{i}") for i in range(order + 1)] if order and shared else []
    stamped = [region.placeholder(name) for name in ("stamps", "step")] if order and not shared else []
    stored = [region.placeholder(f"update_{i}") for i in range(order + 1)]
    score = region.placeholder("score") if config.scorer in ("change", "norm") else None
    stored_context = [[region.placeholder(f"{config.context}_{i}_{j}") for j in range(len(h))] for i, h in enumerate(caches.context)]
    forecast = forecast_weights(stamped[0], stamped[1], order) if stamped else given_weights
    updates = [load(value, spec) for value, spec in zip(stored, caches.updates, strict=True)]
    context = [[load(v, spec) for v, spec in zip(*pair, strict=True)] for pair in zip(stored_context, caches.context, strict=True)]

    kept = KeptRows(index, stream, count)
    kept_inputs = list(region.inputs)
    x = region.proxy(region.inputs[roles.stream_input])
    x_kept = kept.take(x, layout)
    kept_inputs[roles.stream_input] = x_kept.node
    for side in roles.side_inputs:
        value = kept.take_along(region.proxy(region.inputs[side.position]), side.token_dim, side.has_batch, side.layout)
        if side.other_dim is not None:
            value = kept.take_along(value, side.other_dim, side.has_batch, side.layout)
        kept_inputs[side.position] = value.node

    copy = BodyCopy(region.tracer, body, region.weights, region.inputs, kept_inputs)
    new_context: list[Any] = []
    if config.context == "reuse":
        given = []
        for history, source in zip(context, roles.attention_outputs, strict=False):
            values = history if source.layout is None else [kept.take(value, source.layout) for value in history]
            given.append(extrapolate(values, forecast if len(history) > 1 else []))
    else:
        given = [history[0] for history in context]
    outputs = [region.proxy(node) for node in copy.run_kept(config.context, given, kept, new_context)]
    output = outputs[roles.stream_output]
    held = add_forecast(x, updates, forecast)
    outputs[roles.stream_output] = kept.put(held, output, layout)
    new_context = [store(value, spec) for value, spec in zip(new_context, caches.flat_context, strict=False)]
    if shared:
        return region.finish(body, [*outputs, *new_context])
    update = output - x_kept
    older = [kept.take(value, layout) for value in updates[: max(order, 1)]]
    written = [kept.put(cache, value, layout) for cache, value in zip(updates, [update, *older], strict=False)]
    results = [*outputs, *(store(value, spec) for value, spec in zip(written, caches.updates, strict=True))]
    if order:
        stamps, step = stamped
        now = torch.cat([step.expand(stream.batch, count + layout.others, 1), kept.take(stamps, layout)[..., :order]], dim=-1)
        results.append(kept.put(stamps, now, layout))
    if score is not None:
        new = _score(update, older[0] if config.scorer == "change" else None, layout, count)
        results.append(kept.put(score, new, Layout()))
    return region.finish(body, [*results, *new_context])
