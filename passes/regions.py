"""Regions: what a step does for one block, as a graph of its own that every block of the same structure calls.

A region takes its weights as inputs, so blocks of one structure and one keep count share it: the compiler sees it once
(``torch.compiler.nested_compile_region``) however deep the model is. No region returns one of its inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from tokencache_compile.errors import ConfigError
from tokencache_compile.ir import Body, Layout, Stream
from tokencache_compile.passes.cache_ops import add_forecast, extrapolate, forecast_weights, load, store, update_score
from tokencache_compile.passes.caches import UnitCaches
from tokencache_compile.passes.context import BodyCopy
from tokencache_compile.passes.kept_rows import KeptRows
from tokencache_compile.passes.modules import module_outputs, refreshed_modules, scored_attention
from tokencache_compile.passes.narrow_linears import narrow_linears
from tokencache_compile.plan import CacheConfig

_numbers = itertools.count()


class Region(nn.Module):
    """A graph that ``torch.compile`` compiles once and calls from every block that uses it.

    Each region is marked by a function of its own: the compiler takes calls of one function with inputs of the same shapes for the same
    region, whichever graph they run.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module
        own = FunctionType(_run.__code__.replace(co_name=f"region_{next(_numbers)}"), _run.__globals__)
        self._run = torch.compiler.nested_compile_region(own)

    def forward(self, *args: Any) -> Any:
        return self._run(self.graph_module, *args)


def _run(graph_module: GraphModule, *args: Any) -> Any:
    return graph_module(*args)


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

    def kept_inputs(self, body: Body, kept: KeptRows) -> list[Node]:
        """The inputs with the kept rows of what gathers: the cached stream and its side inputs."""
        roles, inputs = body.known_roles, list(self.inputs)
        inputs[roles.stream_input] = kept.take(self.proxy(inputs[roles.stream_input]), roles.layout).node
        for side in roles.side_inputs:
            value = kept.take_along(self.proxy(self.inputs[side.position]), side.token_dim, side.has_batch, side.layout)
            if side.other_dim is not None:
                value = kept.take_along(value, side.other_dim, side.has_batch, side.layout)
            inputs[side.position] = value.node
        return inputs

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
    """An I-step's block: ``(*weights, *inputs, [previous update]) -> (*outputs, [update], [score], *context caches)``.

    The outputs are the block's own, bit for bit; the caches are read off beside them. No update where modules are cached apart.
    """
    region = _RegionGraph(body)
    roles = body.known_roles
    previous = region.placeholder("previous_update") if has_score and config.scorer == "change" else None
    copy = BodyCopy(region.tracer, body, region.weights, region.inputs)
    outputs = [region.proxy(node) for node in copy.run()]
    update = outputs[roles.stream_output] - region.proxy(region.inputs[roles.stream_input])
    scores = []
    if has_score and config.scorer == "attention":
        scores = [copy.received(scored_attention(body))]
    elif has_score:
        scores = [_score(update, previous, roles.layout, stream.tokens)]
    context = [region.proxy(node) for node in copy.context_values(config, stream)]
    updates = [update] if config.granularity == "block" else []
    return region.finish(body, [*outputs, *updates, *scores, *context])


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
    x = region.proxy(region.inputs[roles.stream_input])
    kept_inputs = region.kept_inputs(body, kept)
    x_kept = region.proxy(kept_inputs[roles.stream_input])
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


def module_region(body: Body, config: CacheConfig, stream: Stream, count: int, fresh: Sequence[bool], caches: UnitCaches) -> Region:
    """A P-step's block of modules cached apart: ``(*weights, *inputs, [index], *forecast weights, *modules) -> (*outputs, *written)``.

    Every module's output is held or forecast for all tokens; with ``count`` kept tokens, those of ``index`` [B, n] run through all but
    self-attention, and what their modules give is put in its place. Modules that are ``fresh`` are computed on all tokens. Gates and
    residuals are this step's own, on all tokens. ``written``: with ``history="computed"`` what
    :func:`refreshed_modules` give.

    Raises:
        ConfigError: ``fresh`` names another number of modules.
    """
    region = _RegionGraph(body)
    index = region.placeholder("index") if count else None
    weights = [region.placeholder(f"forecast_weight_{i}") for i in range(config.forecast + 1)] if config.forecast else []
    stored = [[region.placeholder(f"module_{i}_{j}") for j in range(len(h))] for i, h in enumerate(caches.context)]
    parts = module_outputs(body, stream)
    if fresh and len(fresh) != len(parts):
        raise ConfigError(f"fresh={tuple(fresh)} was asked for; {body.name} has {len(parts)} modules: {', '.join(p.node for p in parts)}.")
    given: dict[str, Any] = {}
    for part, values, specs, computed in zip(parts, stored, caches.context, fresh or [False] * len(parts), strict=True):
        if not computed:
            given[part.node] = extrapolate([load(v, spec) for v, spec in zip(values, specs, strict=True)], weights)
    if index is None:
        copy = BodyCopy(region.tracer, body, region.weights, region.inputs)
    else:
        kept = KeptRows(index, stream, count)
        copy = BodyCopy(region.tracer, body, region.weights, region.inputs, region.kept_inputs(body, kept))
        attention = [output.node for output in body.known_roles.attention_outputs]
        copy.run_kept("reuse", [kept.take(given[name], Layout()) for name in attention], kept, [])
        for name in given.keys() - attention:
            given[name] = kept.put(given[name], copy.kept_value(name), Layout())
    outputs = [region.proxy(node) for node in copy.run_beyond(given)]
    if index is None or config.history == "full_steps":
        return region.finish(body, outputs)
    refreshed = zip(parts, caches.context, refreshed_modules(body, stream), strict=True)
    return region.finish(body, [*outputs, *(store(given[part.node], specs[0]) for part, specs, is_new in refreshed if is_new)])
