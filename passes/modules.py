"""Modules: what a block adds, taken apart into what its attentions and its feed-forward give, before gates and residuals.

    block    x' = x + u                                u whole is cached
    module   x' = x + g · a;  x'' = x' + g' · m        a and m are cached, the gates are the step's own

The cut is found from the block's outputs backwards: at what a self-attention gives (see ``analysis``), and at what leaves a submodule
that applies linears to tokens (cross-attention, feed-forward). What stands behind the cut, gates, residuals, and what they are made
from, runs on every step.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import Attention, Body, ModuleOutput, Stream
from tokencache_compile.passes.analysis import attention_mask, body_outputs, is_axis, per_token_nodes, placeholders, shape_of
from tokencache_compile.passes.narrow_linears import LINEAR
from tokencache_compile.plan import CacheConfig


def _submodule(node: Node) -> str | None:
    """The block's own submodule that a node belongs to: "ff" of ``ff.net.0.proj``; None for the block's own arithmetic."""
    paths = [entry[0] for entry in node.meta.get("nn_module_stack", {}).values()]
    names = [path.split(".")[0] for path in paths if path]
    return names[-1] if names else None


def module_outputs(body: Body, stream: Stream) -> tuple[ModuleOutput, ...]:
    """Where ``body`` is cut, in the order of its graph.

    Raises:
        UnsupportedModelError: the block carries other streams or rows beside the cached tokens, has no such submodule, or one that
            leaves with other rows than the stream's.
    """
    roles = body.known_roles
    if not roles.is_alone:
        raise UnsupportedModelError(
            body.name, 'it carries text beside the cached tokens, and granularity="module" knows one stream', 'Use granularity="block".'
        )
    nodes = body.graph_module.graph.nodes
    tokens = per_token_nodes(body)
    attention = {output.node: output for output in roles.attention_outputs}
    attending = {_submodule(node) for node in nodes if node.name in {a.node for a in roles.attentions}}
    heavy = {_submodule(node) for node in nodes if node.target is LINEAR and node.args[0] in tokens} - attending - {None}
    cut: set[Node] = set()
    seen: set[Node] = set()
    todo = list(body_outputs(body))
    while todo:
        node = todo.pop()
        if node in seen or not isinstance(node.meta.get("val"), Tensor):
            continue
        seen.add(node)
        if node.name in attention or (node in tokens and _submodule(node) in heavy):
            cut.add(node)
        else:
            todo += node.all_input_nodes
    left = [node for node in seen - cut if node.target is LINEAR and node.args[0] in tokens]
    axis = shape_of(placeholders(body)[roles.stream_input])[1]
    others = [node for node in cut if node.name not in attention and not is_axis(shape_of(node)[-2], axis)]
    if left or others or not cut:
        found = ", ".join(sorted(node.name for node in [*left, *others])) or "no attention and no feed-forward"
        raise UnsupportedModelError(
            body.name, f'its attention and feed-forward do not stand apart, which granularity="module" needs (found {found})',
            'Use granularity="block".',
        )  # fmt: skip
    return tuple(
        attention.get(node.name) or ModuleOutput(node.name, stream.tokens, roles.layout) for node in nodes if node in cut
    )  # fmt: skip


def reused_outputs(body: Body, stream: Stream, config: CacheConfig) -> tuple[ModuleOutput, ...]:
    """What P-steps take from a cache inside ``body``, beside whole updates: under ``reuse`` attention outputs, or those of all modules."""
    if config.granularity == "module":
        return module_outputs(body, stream)
    return body.known_roles.attention_outputs if config.context == "reuse" else ()


def refreshed_modules(body: Body, stream: Stream) -> tuple[bool, ...]:
    """Which of a body's modules a P-step computes for its kept tokens: all but self-attention."""
    attention = {output.node for output in body.known_roles.attention_outputs}
    return tuple(part.node not in attention for part in module_outputs(body, stream))


def scored_attention(body: Body) -> Attention:
    """The self-attention whose weights score the tokens.

    Raises:
        UnsupportedModelError: there is not just one, or it has a mask.
    """
    nodes = {node.name: node for node in body.graph_module.graph.nodes}
    found = body.known_roles.attentions
    if len(found) != 1 or attention_mask(nodes[found[0].node]) is not None or not found[0].has_batch:
        raise UnsupportedModelError(
            body.name, 'scorer="attention" knows blocks with one self-attention without a mask', 'Use scorer="random" or another.'
        )
    return found[0]
