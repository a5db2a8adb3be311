"""Context: what a kept token attends to in a P-step (SPEC section 4), as a rewrite of the attention of a block body.

    q, k, v = to_q(h), to_k(h), to_v(h)          kept    h = kept tokens throughout (the body as it is, at n tokens)
    a = attention(q, k, v)                       full    k, v from a second copy of their ancestors, on all tokens
    out = to_out(a)                              cached  k, v of kept tokens put into caches of all tokens
                                                 reuse   out taken from a cache; q, k, v and a fall away

A body's token count is symbolic, so one graph serves for all tokens and for n of them. Cross-attention stays as it is: its
keys do not depend on the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import Attention, Body, Layout, Stream
from tokencache_compile.opaque_modules import ON_GRID, from_rows, to_rows
from tokencache_compile.passes.analysis import attention_mask, body_outputs, per_token_nodes
from tokencache_compile.passes.cache_ops import attention_received
from tokencache_compile.passes.groups import attend_by_group
from tokencache_compile.passes.kept_rows import KeptRows
from tokencache_compile.passes.modules import reused_outputs
from tokencache_compile.passes.pair_mask import pair_mask
from tokencache_compile.plan import CacheConfig, Context


def tokens_first(value: Any, rank: int) -> Any:
    """[B, heads, N, D] → [B, N, heads, D]; its own inverse. [B, N, C] stays."""
    return value.transpose(1, 2) if rank == 4 else value


def _keys_values(attention: Node) -> list[Node]:
    return [value for value in attention.args[1:3] if isinstance(value, Node)]


class BodyCopy:
    """Copies a body into another graph, once per token set: all tokens, and the kept ones."""

    def __init__(
        self,
        tracer: GraphAppendingTracer,
        body: Body,
        weights: Sequence[Node],
        inputs: Sequence[Node],
        kept_inputs: Sequence[Node] | None = None,
    ) -> None:
        self.graph, self.tracer, self.body = tracer.graph, tracer, body
        self.source = body.graph_module.graph
        sources = [n for n in self.source.nodes if n.op == "placeholder"]
        self.all_tokens: dict[Node, Node] = dict(zip(sources, [*weights, *inputs], strict=True))
        self.kept: dict[Node, Node] = dict(zip(sources, [*weights, *(kept_inputs or inputs)], strict=True))
        self.per_token = per_token_nodes(body)

    def _copy(self, node: Node, env: dict[Node, Node]) -> Node:
        if node not in env:
            if env is self.all_tokens and node not in self.per_token and node in self.kept:
                env[node] = self.kept[node]  # conditioning is computed once, whatever the token set
            else:
                env[node] = self.graph.node_copy(node, lambda n: env[n])
                # Shapes hold for another token count only where there are no tokens.
                kept = ("nn_module_stack",) if node in self.per_token else ("nn_module_stack", "val")
                env[node].meta = {key: value for key, value in node.meta.items() if key in kept}
        return env[node]

    def _nodes(self) -> list[Node]:
        return [n for n in self.source.nodes if n.op not in ("placeholder", "output")]

    def _results(self, env: dict[Node, Node]) -> list[Node]:
        return [env[node] for node in body_outputs(self.body)]

    def run(self) -> list[Node]:
        """The body on all tokens, in their own order; returns its outputs."""
        grouped = {a.node: a.groups for a in self.body.known_roles.attentions}
        for node in self._nodes():
            groups = grouped.get(node.name)
            if groups is None:
                self._copy(node, self.all_tokens)
            else:
                self.all_tokens[node] = attend_by_group(node, groups, lambda n: Proxy(self.all_tokens[n], self.tracer)).node
        return self._results(self.all_tokens)

    def context_values(self, config: CacheConfig, stream: Stream) -> list[Node]:
        """After :meth:`run`: what an I-step caches beside updates, token axis first; of keys and values the N tokens' alone."""
        context, tokens = config.context, stream.tokens
        roles, nodes = self.body.known_roles, {n.name: n for n in self.source.nodes}
        values: list[Any] = []
        if context == "cached":
            for attention in roles.attentions:
                for node in _keys_values(nodes[attention.node]):
                    value = tokens_first(Proxy(self.all_tokens[node], self.tracer), node.meta["val"].dim())
                    values.append(value.narrow(1, attention.keys.before, tokens) if attention.keys.others else value)
        for output in reused_outputs(self.body, stream, config):
            node = nodes[output.node]
            values.append(tokens_first(Proxy(self.all_tokens[node], self.tracer), node.meta["val"].dim()))
        for node in self._on_grid() if context == "kept" else ():
            x, _, _, axis, grid = node.args
            values.append(to_rows(Proxy(self.all_tokens[x], self.tracer), axis, len(grid)))
        return [value.contiguous().node for value in values]

    def _on_grid(self) -> list[Any]:
        return [node for node in self._nodes() if node.target is ON_GRID]

    def copy_ancestors(self, targets: Sequence[Node], env: dict[Node, Node]) -> list[Node]:
        """The copies of ``targets`` in ``env`` (all tokens, or the kept ones), made with what they are made from."""
        needed = set(targets)
        for node in reversed(self.source.nodes):
            if node in needed and node not in env:
                needed |= set(node.all_input_nodes)
        for node in self._nodes():
            if node in needed:
                self._copy(node, env)
        return [env[target] for target in targets]

    def run_kept(
        self,
        context: Context,
        given: Sequence[Any],
        kept: KeptRows,
        new_caches: list[Any],
    ) -> list[Node]:
        """The body on the kept tokens, its attention rewritten for ``context``; returns its outputs.

        ``given``: the attentions' outputs (``reuse``), the caches of all tokens' keys and values (``cached``), or what modules on
        the grid were given (``kept``); caches that a P-step writes are appended to ``new_caches``.
        """
        stored = iter(given)
        roles = self.body.known_roles
        attentions = {attention.node: attention for attention in roles.attentions}
        outputs = {output.node for output in roles.attention_outputs}
        for node in self._nodes():
            if context == "reuse" and node.name in outputs:
                self.kept[node] = tokens_first(next(stored), node.meta["val"].dim()).node
            elif context in ("full", "cached") and node.name in attentions:
                self.kept[node] = self._attend(node, attentions[node.name], context, stored, kept, new_caches)
            elif node.target is ON_GRID:
                self.kept[node] = self._among_neighbours(node, next(stored), kept)
            else:
                self._copy(node, self.kept)
        return self._results(self.kept)

    def run_beyond(self, given: Mapping[str, Any]) -> list[Node]:
        """What stands behind some nodes, on all tokens: the body's outputs made from their values ``given`` by name, token axis first."""
        for node in self._nodes():
            if node.name in given:
                self.all_tokens[node] = tokens_first(given[node.name], node.meta["val"].dim()).node
        return self.copy_ancestors(body_outputs(self.body), self.all_tokens)

    def received(self, attention: Attention) -> Any:
        """After :meth:`run`: how much attention each token received, see :func:`attention_received`."""
        node = next(node for node in self.source.nodes if node.name == attention.node)
        query: Any
        key: Any
        query, key = (Proxy(self.all_tokens[value], self.tracer) for value in node.args[:2] if isinstance(value, Node))
        return attention_received(query, key, node.kwargs.get("scale"))

    def kept_value(self, name: str) -> Any:
        """After :meth:`run_kept`: the value of a node for the kept tokens, token axis first."""
        node = next(node for node in self.source.nodes if node.name == name)
        return tokens_first(Proxy(self.kept[node], self.tracer), node.meta["val"].dim())

    def _among_neighbours(self, node: Any, stored: Any, kept: KeptRows) -> Node:
        """A module on the grid: the kept tokens' input is fresh, their neighbours' is that of the last I-step (``stored`` [B, N, …])."""
        x, weights, number, axis, grid = node.args
        fresh = to_rows(Proxy(self.kept[x], self.tracer), axis, len(grid))
        whole = from_rows(kept.put(stored, fresh, Layout()), axis, len(grid))
        given = [Proxy(self.kept[weight], self.tracer) for weight in weights]
        result = to_rows(ON_GRID(whole, given, number, axis, grid), axis, len(grid))
        rows: Proxy = from_rows(kept.take(result, Layout()), axis, len(grid))
        return rows.node

    def _attend(self, node: Node, attention: Attention, context: Context, stored: Any, kept: KeptRows, new_caches: list[Any]) -> Node:
        """The attention of kept queries to every token's keys and values."""
        keys_values = _keys_values(node)
        if context == "full":
            key, value = self.copy_ancestors(keys_values, self.all_tokens)
        else:
            key, value = (self._refreshed(part, attention.keys, next(stored), kept, new_caches) for part in keys_values)
        mask = attention_mask(node)
        all_mask = self._mask_of_all(mask, attention, kept) if mask is not None and mask in self.per_token else None
        new = self.graph.node_copy(node, lambda n: self.kept[n])
        new.args = (new.args[0], key, value, *new.args[3:])
        if mask is not None and all_mask is not None:
            new.replace_input_with(self.kept[mask], all_mask)
        return new

    def _mask_of_all(self, mask: Node, attention: Attention, kept: KeptRows) -> Node:
        """The mask over every token's keys; one between tokens is made anew for the kept queries, or cut out of the whole one."""
        try:
            return pair_mask(self, mask)
        except UnsupportedModelError:
            if attention.mask_rows is None:
                raise
        (all_mask,) = self.copy_ancestors([mask], self.all_tokens)
        layout, has_batch = attention.mask_rows
        if not has_batch and not self.body.known_roles.needs_shared_index:
            raise UnsupportedModelError(
                self.body.name, "its self-attention mask between tokens is one for all samples", 'Use context="kept".'
            )
        rows: Proxy = kept.take_along(Proxy(all_mask, self.tracer), mask.meta["val"].dim() - 2, has_batch, layout)
        return rows.node

    def _refreshed(self, part: Node, layout: Layout, stored: Any, kept: KeptRows, new_caches: list[Any]) -> Node:
        """Keys or values of all tokens: the kept ones' put into the cache; rows of other tokens are fresh, on their side of it."""
        rank = part.meta["val"].dim()
        fresh = tokens_first(Proxy(self.kept[part], self.tracer), rank)
        own = fresh.narrow(1, layout.before, kept.count) if layout.others else fresh
        cache = kept.put(stored, own, Layout())
        new_caches.append(cache)
        parts = [cache]
        if layout.before:
            parts.insert(0, fresh.narrow(1, 0, layout.before))
        if layout.after:
            parts.append(fresh.narrow(1, layout.before + kept.count, layout.after))
        whole: Proxy = tokens_first(torch.cat(parts, 1) if layout.others else cache, rank)
        return whole.node
