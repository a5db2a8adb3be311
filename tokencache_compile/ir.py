"""The data types the passes hand to each other, in the order in which they appear.

    model ─capture─▶ Capture ─outline─▶ BlockProgram ─analyse─▶ BlockProgram (roles known)
          ─fold_skipped─▶ units ─make_full / make_cached─▶ StepProgram

Everything is a frozen value; weights are shared with the user's model by reference, never copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

StepKind = Literal["I", "P"]


@dataclass(frozen=True)
class BlockCall:
    """One call of one block, as the eager model made it: its arguments flattened by ``torch.utils._pytree``.

    ``scales`` are those of its adapters during the call.
    ``flat_inputs`` and ``flat_outputs``: positions of streams that the block itself takes and returns without a batch axis.
    """

    fqn: str
    module: torch.nn.Module
    scales: Mapping[str, Mapping[str, float]]
    leaves: tuple[Any, ...]
    in_spec: Any
    outputs: tuple[Any, ...]
    out_spec: Any
    flat_inputs: frozenset[int] = frozenset()
    flat_outputs: frozenset[int] = frozenset()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor arguments, in order: what a block-call node of the skeleton takes."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    @property
    def output_tensors(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in self.outputs if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Capture:
    """The model around its blocks: a graph in which every block is one opaque call, and how the blocks were called.

    ``sample_inputs`` are the positions of the model's first argument among ``example_inputs``: what the sampler changes.
    ``read_inputs`` are those whose values the skeleton holds for, as the model's forward reads them; mostly there are none.
    ``output_spec`` (a pytree) rebuilds what the model returns, its output class included, from ``example_outputs``.
    """

    skeleton: GraphModule
    calls: tuple[BlockCall, ...]
    input_names: tuple[str, ...]
    example_inputs: tuple[Tensor, ...]
    sample_inputs: tuple[int, ...]
    read_inputs: tuple[int, ...]
    example_outputs: tuple[Tensor, ...]
    output_spec: Any


@dataclass(frozen=True)
class Layout:
    """A token axis: ``before`` rows of other tokens, the N cached tokens, ``after`` more rows of others (text beside an image)."""

    before: int = 0
    after: int = 0

    @property
    def others(self) -> int:
        return self.before + self.after


@dataclass(frozen=True)
class SideInput:
    """A tensor input of a block other than its streams that has a token axis (rotary tables, masks).

    A mask between tokens has a second one, ``other_dim``.
    """

    position: int
    token_dim: int
    has_batch: bool
    layout: Layout = Layout()
    other_dim: int | None = None


@dataclass(frozen=True)
class Groups:
    """Equal groups of tokens that an attention's mask keeps apart: how many, and the nodes of the numbers and of the keys' bias."""

    count: int
    group: str
    bias: str | None


@dataclass(frozen=True)
class Attention:
    """One self-attention of a body: the call node, and how its keys lie. Joint attention has the text's keys beside the tokens'.

    ``has_batch`` is False where its rows are not the stream's samples (Mochi attends sample by sample). ``mask_rows`` tells
    how the queries lie, and whether each sample has its own, where the mask is one between tokens; ``groups`` those it keeps apart.
    """

    node: str
    keys: Layout
    has_batch: bool = True
    mask_rows: tuple[Layout, bool] | None = None
    groups: Groups | None = None


@dataclass(frozen=True)
class ModuleOutput:
    """What a self-attention, or another module of the block, gives to the rest of it: the node and its rows.

    ``layout`` is None where none of the rows is a cached token's.
    """

    node: str
    rows: int
    layout: Layout | None
    has_batch: bool = True


@dataclass(frozen=True)
class Companion:
    """A stream that runs along with the cached one (text beside image): computed in full wherever the block runs."""

    input: int
    output: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Roles:
    """What the analysis found out about a body: its streams, the token axis, and what gathers along with it.

    ``layout`` is the cached stream's own: a block may take text and image as one stream.
    """

    stream_input: int
    stream_output: int
    token_dim: int
    layout: Layout = Layout()
    companions: tuple[Companion, ...] = ()
    side_inputs: tuple[SideInput, ...] = ()
    attentions: tuple[Attention, ...] = ()
    attention_outputs: tuple[ModuleOutput, ...] = ()

    @property
    def needs_shared_index(self) -> bool:
        """True where a per-token side input has no batch axis, so that all samples must keep the same tokens."""
        return any(not side.has_batch for side in self.side_inputs)

    @property
    def is_alone(self) -> bool:
        """True where the block computes nothing but cached tokens: no other stream, no other rows in its own."""
        return not self.companions and not self.layout.others


@dataclass(frozen=True)
class Body:
    """One distinct block structure as a graph ``(*weights, *inputs) -> outputs`` with a symbolic token count.

    Blocks of one structure share a body and bring their own weights, so compile time follows the number of bodies.
    """

    name: str
    graph_module: GraphModule
    weight_names: tuple[str, ...]
    num_inputs: int
    num_outputs: int
    roles: Roles | None = None

    @property
    def known_roles(self) -> Roles:
        if self.roles is None:
            raise AssertionError(f"{self.name} has not been analysed")
        return self.roles


@dataclass(frozen=True)
class Block:
    """Block ``index`` of the model: its module path, its body, and its node in the skeleton."""

    index: int
    fqn: str
    body: int
    node: str

    def weight_fqns(self, body: Body) -> tuple[str, ...]:
        return tuple(f"{self.fqn}.{name}" for name in body.weight_names)


@dataclass(frozen=True)
class Stream:
    """The cached tokens: their number, shape and dtype at the blocks, for this input signature.

    ``grid``: their rows and columns, where they are the patches of an image; None where that is not known.
    """

    batch: int
    tokens: int
    channels: int
    dtype: torch.dtype
    device: torch.device
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class BlockProgram:
    """The model as prologue → blocks → epilogue: a skeleton graph whose block calls refer to ``blocks``."""

    skeleton: GraphModule
    bodies: tuple[Body, ...]
    blocks: tuple[Block, ...]
    tensors: Mapping[str, Tensor]
    input_names: tuple[str, ...]
    stream: Stream | None = None
    provenance: tuple[str, ...] = ()

    @property
    def known_stream(self) -> Stream:
        if self.stream is None:
            raise AssertionError("the program has not been analysed")
        return self.stream

    def body_of(self, block: Block) -> Body:
        return self.bodies[block.body]

    def shares_weights_of(self, model: torch.nn.Module) -> bool:
        """Whether the program's weights still are the model's own parameters, and its buffers equal to the model's.

        A model that leaves the GPU and comes back has the same parameters and other, equal buffers.
        """
        own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        own |= dict(model.named_buffers(remove_duplicate=False))
        return self.tensors.keys() == own.keys() and all(_is_same(self.tensors[name], tensor) for name, tensor in own.items())


def _is_same(known: Tensor, now: Tensor) -> bool:
    if known is now or isinstance(now, torch.nn.Parameter):
        return known is now
    return known.shape == now.shape and known.dtype == now.dtype and known.device == now.device and torch.equal(known, now)


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """What an adapter (LoRA) adds to one linear of the model in P-steps: ``up · down · x``.

    Attributes:
        module: path of the linear.
        down, up: [r, in] and [out, r], the adapter's scale included.
    """

    module: str
    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class CacheUnit:
    """Consecutive blocks that share one cache: a single block, or a run that no P-step ever recomputes."""

    first: int
    last: int
    skipped: bool

    @property
    def name(self) -> str:
        return f"{self.first:02d}" if self.first == self.last else f"{self.first:02d}_{self.last:02d}"


@dataclass(frozen=True)
class CacheSpec:
    """One cache tensor: an explicit input and output of every step graph.

    Attributes:
        dtype: what it is stored in; ``computed`` is what its values are computed in.
        fill: its value in a new request.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    computed: torch.dtype
    fill: float = 0.0

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StepProgram:
    """A step graph ``(*inputs, step, [random_scores], *caches) -> (*outputs, *caches)``, ready for a backend."""

    kind: StepKind
    keep: tuple[int, ...]
    module: GraphModule
    input_names: tuple[str, ...]
    num_outputs: int
    caches: tuple[CacheSpec, ...]
    provenance: tuple[str, ...] = field(default=())

    @property
    def on_float32_cpu(self) -> bool:
        """Whether every weight of the step is a float32 tensor on the CPU."""
        tensors = [t for t in (*self.module.parameters(), *self.module.buffers()) if t.is_floating_point()]
        return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)

    def describe(self) -> str:
        """Which passes made this program, and its graph, printed as code."""
        return "\n".join([f"{self.kind}-step, keep {self.keep}", *self.provenance, self.module.code])


@dataclass(frozen=True)
class HoistedStep:
    """A P-step cut in two (``passes/hoist.py``).

    Attributes:
        ahead: ``(*inputs) -> values`` of the timestep and the condition alone; its placeholders are named like the model's inputs.
        timestep: the name of the timestep's input.
        step: what is left; takes the values as its last extras.
    """

    ahead: GraphModule
    timestep: str
    step: StepProgram


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output of a graph that leaves torch; its shape and dtype are fixed."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StepIO:
    """What an engine's step reads and computes, by name.

    Attributes:
        kind, keep: as of the :class:`StepProgram`.
        arguments: the program's inputs in their order: the model's tensors, the extras, the caches.
        inputs: those of them that are read (and ``index_<block>``, where the host selects).
        outputs: the model's outputs, then the caches that are computed.
        next_caches: for each cache, in order, the output or the argument that holds its next value: a cache that a step
            leaves alone, or that an older value moves into, is not copied.
        selects: blocks whose tokens the host selects, and how many each keeps; empty where the graph selects.
    """

    kind: StepKind
    keep: tuple[int, ...]
    arguments: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    num_outputs: int
    next_caches: tuple[str, ...]
    selects: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class EngineGraph:
    """A step as one flat graph ``(*io.inputs) -> io.outputs`` without regions: what exporters take.

    Attributes:
        scores: where the host selects, the graph of the scores: ``(*inputs) -> scores_<block> [B or 1, N]`` of every block in
            ``io.selects``.
    """

    io: StepIO
    module: GraphModule
    scores: EngineGraph | None = None
