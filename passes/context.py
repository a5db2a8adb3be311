"""Context: what a kept token attends to in a P-step (SPEC section 4), as a rewrite of the attention of a block body.

    q, k, v = to_q(h), to_k(h), to_v(h)          kept    h = kept tokens throughout (the body as it is, at n tokens)
    a = attention(q, k, v)                       full    k, v from a second copy of their ancestors, on all tokens
    out = to_out(a)                              cached  k, v of kept tokens put into caches of all tokens
                                                 reuse   out taken from a cache; q, k, v and a fall away

A body's token count is symbolic, so one graph serves for all tokens and for n of them. Cross-attention stays as it is: its
keys do not depend on the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from tokencache_compile.ir import Body
from tokencache_compile.passes.analysis import placeholders
from tokencache_compile.passes.groups import attend_by_group
from tokencache_compile.passes.pair_mask import pair_mask
from tokencache_compile.plan import Context


def tokens_first(value: Any, rank: int) -> Any:
    """[B, heads, N, D] → [B, N, heads, D]; its own inverse. [B, N, C] stays."""
    return value.transpose(1, 2) if rank == 4 else value


def _keys_values(attention: Node) -> list[Node]:
    return [value for value in attention.args[1:3] if isinstance(value, Node)]


class BodyCopy:
    """Copies a body into another graph, once per token set: all tokens, and the kept ones."""

    def __init__(
        self, graph: Graph, body: Body, weights: Sequence[Node], inputs: Sequence[Node], kept_inputs: Sequence[Node] | None = None
    ) -> None:
        self.graph, self.body = graph, body
        self.tracer = GraphAppendingTracer(graph)
        self.source = body.graph_module.graph
        sources = [n for n in self.source.nodes if n.op == "placeholder"]
        self.all_tokens: dict[Node, Node] = dict(zip(sources, [*weights, *inputs], strict=True))
        self.kept: dict[Node, Node] = dict(zip(sources, [*weights, *(kept_inputs or inputs)], strict=True))
        self.per_token = self._per_token_nodes()

    def _per_token_nodes(self) -> set[Node]:
        roles = self.body.known_roles
        inputs = placeholders(self.body)
        found = {inputs[roles.stream_input], *(inputs[side.position] for side in roles.side_inputs)}
        for node in self.source.nodes:
            if any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

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

    def _result(self, env: dict[Node, Node]) -> Node:
        outputs: Any = self.source.output_node().args[0]
        return env[outputs[self.body.known_roles.stream_output]]

    def run(self) -> Node:
        """The body on all tokens, in their own order; returns the stream."""
        grouped = {a.node: a.groups for a in self.body.known_roles.attentions}
        for node in self._nodes():
            groups = grouped.get(node.name)
            if groups is None:
                self._copy(node, self.all_tokens)
            else:
                self.all_tokens[node] = attend_by_group(node, groups, lambda n: Proxy(self.all_tokens[n], self.tracer)).node
        return self._result(self.all_tokens)

    def context_values(self, context: Context) -> list[Node]:
        """After :meth:`run`: what an I-step caches for ``context``, token axis first."""
        values: list[Node] = []
        for attention, output in self._attention_nodes():
            for node in _keys_values(attention) if context == "cached" else [output] if context == "reuse" else []:
                copy = Proxy(self.all_tokens[node], self.tracer)
                values.append(tokens_first(copy, node.meta["val"].dim()).contiguous().node)
        return values

    def _attention_nodes(self) -> list[tuple[Node, Node]]:
        nodes = {n.name: n for n in self.source.nodes}
        return [(nodes[a.node], nodes[a.output]) for a in self.body.known_roles.attentions]

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
        put: Callable[[Any, Any], Any],
        new_caches: list[Any],
    ) -> Node:
        """The body on the kept tokens, its attention rewritten for ``context``; returns their stream.

        ``given``: the kept tokens' attention outputs (``reuse``), or the caches of all tokens' keys and values (``cached``);
        caches that a P-step writes are appended to ``new_caches``.
        """
        stored = iter(given)
        attentions = {sdpa: output for sdpa, output in self._attention_nodes()}
        outputs = set(attentions.values())
        for node in self._nodes():
            if context == "reuse" and node in outputs:
                self.kept[node] = tokens_first(next(stored), node.meta["val"].dim()).node
            elif context in ("full", "cached") and node in attentions:
                self.kept[node] = self._attend(node, context, stored, put, new_caches)
            else:
                self._copy(node, self.kept)
        return self._result(self.kept)

    def _attend(self, node: Node, context: Context, stored: Any, put: Callable[[Any, Any], Any], new_caches: list[Any]) -> Node:
        """The attention of kept queries to every token's keys and values."""
        keys_values = _keys_values(node)
        if context == "full":
            key, value = self.copy_ancestors(keys_values, self.all_tokens)
        else:
            fresh = []
            for part in keys_values:
                rank = part.meta["val"].dim()
                cache = put(next(stored), tokens_first(Proxy(self.kept[part], self.tracer), rank))
                new_caches.append(cache)
                fresh.append(tokens_first(cache, rank).node)
            key, value = fresh
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        all_mask = pair_mask(self, mask) if isinstance(mask, Node) and mask in self.per_token else None
        new = self.graph.node_copy(node, lambda n: self.kept[n])
        new.args = (new.args[0], key, value, *new.args[3:])
        if isinstance(mask, Node) and all_mask is not None:
            new.replace_input_with(self.kept[mask], all_mask)
        return new
