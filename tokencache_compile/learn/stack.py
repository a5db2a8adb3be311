"""A captured model run block by block: what training and calibration look into, whatever the model's class.

    stream ─▶ visit(block 0, inputs) ─▶ … ─▶ visit(block L-1, inputs) ─▶ outputs

The skeleton around the blocks is interpreted as it was captured; ``visit`` says what stands in for each block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from tokencache_compile.calls import bind_call
from tokencache_compile.errors import InputError, UnsupportedModelError
from tokencache_compile.ir import Block, BlockProgram
from tokencache_compile.opaque_modules import OPAQUE
from tokencache_compile.passes.capture import BLOCK_OP
from tokencache_compile.passes.outline import block_call_index
from tokencache_compile.passes.pipeline import analysed
from tokencache_compile.predictor import CachePredictor

Visit = Callable[[Block, list[Tensor]], Tensor]


def call_of(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of one call as :func:`capture` takes them: in the order of the signature, without ``return_dict``.

    Raises:
        InputError: they do not fit the model's forward.
    """
    call = bind_call(type(model).__name__, inspect.signature(model.forward), (), kwargs)
    call.pop("return_dict", None)
    return call


class BlockStack:
    """The blocks of one model for one input signature, and what stands around them.

    Args:
        model: in eval mode. Its weights are read, not copied; gradients reach only those named in ``trainable``.
        kwargs: keyword arguments of one call; shapes, dtypes and devices hold for all later ones.
        trainable: names of parameters that take part in autograd; all others are constants.

    Raises:
        InputError, UnsupportedModelError: as at a transformed model's first call.
    """

    def __init__(self, model: nn.Module, kwargs: Mapping[str, Any], trainable: frozenset[str] = frozenset()) -> None:
        self.model = model
        self.program: BlockProgram = analysed(model, call_of(model, kwargs))[0]
        others = next((block.fqn for block in self.program.blocks if not self.program.body_of(block).known_roles.is_alone), None)
        if others is not None:
            raise UnsupportedModelError(
                others, "it carries other tokens than the cached ones (text)", "Training and calibration know blocks of one stream."
            )
        for block in self.program.blocks:
            if any(node.target in OPAQUE for node in self.program.body_of(block).graph_module.graph.nodes):
                raise UnsupportedModelError(
                    block.fqn, "it calls a module as it is, through which no gradient flows", "Such models run with untrained scores."
                )
        self._trainable = trainable

    def weights_of(self, block: Block) -> list[Tensor]:
        """The block's weights in the order of its body's inputs, as constants but for the trainable ones."""
        names = block.weight_fqns(self.program.body_of(block))
        tensors = self.program.tensors
        return [tensors[name] if name in self._trainable else tensors[name].detach() for name in names]

    @property
    def num_blocks(self) -> int:
        return len(self.program.blocks)

    def new_predictor(self) -> CachePredictor:
        """An untrained predictor for this model: a copy of its first block, and a head at 0."""
        first = self.model.get_submodule(self.program.blocks[0].fqn)
        return CachePredictor(first, self.program.known_stream.channels, self.num_blocks)

    def flatten(self, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in the order of the captured graph's inputs.

        Raises:
            InputError: a shape or dtype is not the captured one.
        """
        tensors = [leaf for leaf in pytree.tree_leaves(call_of(self.model, kwargs)) if isinstance(leaf, Tensor)]
        placeholders = [n for n in self.program.skeleton.graph.nodes if n.op == "placeholder"]
        wanted = [(tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in placeholders]
        found = [(tuple(t.shape), t.dtype) for t in tensors]
        if wanted != found:
            raise InputError(f"this call has tensors {found}, and the model was captured with {wanted}; keep one batch size and shape.")
        return tensors

    def stream_of(self, block: Block, inputs: Sequence[Tensor]) -> Tensor:
        """The token stream [B, N, C] among a block's inputs."""
        return inputs[self.program.body_of(block).known_roles.stream_input]

    def compute(self, block: Block, inputs: Sequence[Tensor], stream: Tensor | None = None) -> Tensor:
        """The block itself: its output stream [B, N, C], from ``stream`` instead of the one among ``inputs`` if given."""
        body = self.program.body_of(block)
        given = list(inputs)
        if stream is not None:
            given[body.known_roles.stream_input] = stream
        outputs: Sequence[Tensor] = body.graph_module(*self.weights_of(block), *given)
        return outputs[body.known_roles.stream_output]

    def run(self, kwargs: Mapping[str, Any], visit: Visit) -> Tensor:
        """One forward pass with ``visit`` in the place of the blocks; returns the model's first output."""
        outputs = _Skeleton(self.program, visit).run(*self.flatten(kwargs))
        result: Tensor = outputs[0]
        return result

    def scores(self, predictor: CachePredictor, first: Sequence[Tensor]) -> Tensor:
        """α [B, L, N] in (0, 1) of ``predictor`` for block 0's inputs; what the predictor's node in a P-step computes."""
        return torch.sigmoid(self.logits(predictor, first))

    def logits(self, predictor: CachePredictor, first: Sequence[Tensor]) -> Tensor:
        """The scores before the sigmoid, [B, L, N]."""
        body = self.program.body_of(self.program.blocks[0])
        weights = {**dict(predictor.block.named_parameters()), **dict(predictor.block.named_buffers())}
        outputs: Sequence[Tensor] = body.graph_module(*(weights[name] for name in body.weight_names), *first)
        hidden = outputs[body.known_roles.stream_output]
        result: Tensor = predictor.head(hidden).transpose(1, 2)
        return result

    def updates(self, kwargs: Mapping[str, Any]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """A full pass: the model's output, the stream before every block and after the last, and every block's first inputs.

        Returns:
            output; streams x^0 … x^L, each [B, N, C]; the tensor inputs of block 0.
        """
        streams: list[Tensor] = []
        first: list[Tensor] = []

        def visit(block: Block, inputs: list[Tensor]) -> Tensor:
            if not first:
                first.extend(inputs)
                streams.append(self.stream_of(block, inputs))
            streams.append(self.compute(block, inputs))
            return streams[-1]

        output = self.run(kwargs, visit)
        return output, streams, first


class _Skeleton(Interpreter):
    """Runs a skeleton graph, its weights detached, with ``visit`` for every block call."""

    def __init__(self, program: BlockProgram, visit: Visit) -> None:
        super().__init__(program.skeleton)
        self.program, self.visit = program, visit

    def run_node(self, n: Node) -> Any:
        if n.target is BLOCK_OP:
            block = self.program.blocks[block_call_index(n)]
            inputs, _ = self.fetch_args_kwargs_from_env(n)
            return [self.visit(block, list(inputs[0]))]
        value = super().run_node(n)
        return value.detach() if n.op == "get_attr" and isinstance(value, Tensor) else value
