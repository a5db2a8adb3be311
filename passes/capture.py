"""Capture: run the model once, then export it with every block replaced by one opaque call.

The eager run tells how each block is called (and fills lazy caches, such as rotary tables, that a cold capture would break).
The export then sees one ``tokencache_compile::block`` node per block, so capture time does not grow with depth, whatever
stands inside the blocks. :mod:`outline` exports the distinct blocks themselves.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule
from torch.fx.node import base_types
from torch.utils import _pytree as pytree

from tokencache_compile.calls import TIMESTEP_NAMES
from tokencache_compile.errors import InputError, UnsupportedModelError
from tokencache_compile.ir import BlockCall, Capture
from tokencache_compile.model_state import adapter_scales, scales_set
from tokencache_compile.passes.batch_axis import add_axis, drop_axis, with_batch_axis
from tokencache_compile.passes.casting_hooks import casting_traced
from tokencache_compile.passes.read_values import ReadValues, ValueNeededError


@torch.library.custom_op("tokencache_compile::block", mutates_args=())
def block_op(tensors: list[Tensor], spec: str) -> list[Tensor]:
    """Stands for one call of one block in a skeleton; ``spec`` is JSON: its index and what it returns."""
    raise RuntimeError("a block call of a skeleton graph is not meant to run")


@block_op.register_fake
def _(tensors: list[Tensor], spec: str) -> list[Tensor]:
    outputs = json.loads(spec)["outputs"]
    return [tensors[0].new_empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in outputs]


BLOCK_OP = torch.ops.tokencache_compile.block.default

# What step graphs call their own inputs and outputs; an argument of the model with such a name gets another in the graphs.
_TAKEN = re.compile(r"step|stamps|random_scores|next_.*|(update|stamps|score|scores|key|value|attention|companion|grid|index)_\d.*")


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The model's outermost ``ModuleList`` s by module path, in definition order."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    return lists


def candidate_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Members of the model's :func:`block_lists` that own parameters, by module path, in definition order."""
    return {
        f"{name}.{key}": child
        for name, modules in block_lists(model).items()
        for key, child in modules.named_children()
        if any(True for _ in child.parameters())
    }


def _keeps_a_stream(call: BlockCall) -> bool:
    """A block returns a tensor of the shape and type of one it was given, with batch, token and channel axes."""
    given = {(t.shape, t.dtype) for t in call.tensors if t.is_floating_point() and t.dim() >= 3}
    return any((t.shape, t.dtype) in given for t in call.output_tensors)


def first_line(error: Exception) -> str:
    """What torch says first; its hints to developers follow after it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _lists_of(calls: Iterable[BlockCall]) -> set[str]:
    return {call.fqn.rpartition(".")[0] for call in calls}


def disturbed(tensors: Sequence[Tensor], positions: Iterable[int]) -> list[Tensor]:
    """``tensors`` with noise added to the floating-point ones at ``positions``: every value differs, whatever it was."""
    draw = torch.Generator().manual_seed(0)
    chosen = {i for i in positions if tensors[i].is_floating_point()}
    return [t + torch.randn(t.shape, generator=draw).to(t) if i in chosen else t for i, t in enumerate(tensors)]


def _on_the_sample(
    model: nn.Module, kwargs: Mapping[str, Any], sample: Sequence[int], candidates: Mapping[str, nn.Module], calls: tuple[BlockCall, ...]
) -> tuple[BlockCall, ...]:
    """The calls that are given something made from the sample; text refiners, for one, are not: they stay part of the model around.

    Only a model with several lists of blocks can have others, so only such a model is run once more, on another sample.
    """
    if len(_lists_of(calls)) < 2 or any(tensor.is_meta for call in calls for tensor in call.tensors):
        return calls
    leaves, spec = pytree.tree_flatten(dict(kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for place, tensor in zip(places, disturbed([leaves[i] for i in places], sample), strict=True):
        leaves[place] = tensor
    again: list[BlockCall] = []
    with recording(candidates, again):
        model(**pytree.tree_unflatten(leaves, spec))
    others = {call.fqn: with_batch_axis(call) if calls[0].flat_inputs else call for call in again}
    return tuple(
        call
        for call in calls
        if any(
            not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
            for a, b in zip(call.tensors, others[call.fqn].tensors, strict=True)
        )
    )


@contextmanager
def recording(candidates: Mapping[str, nn.Module], calls: list[BlockCall]) -> Iterator[None]:
    """Within this context, and in this thread, every call of a candidate is appended to ``calls``."""
    owner = threading.get_ident()

    def record(fqn: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if threading.get_ident() != owner:
                return
            leaves, in_spec = pytree.tree_flatten((args, kwargs))
            outputs, out_spec = pytree.tree_flatten(output)
            calls.append(BlockCall(fqn, module, adapter_scales(module), tuple(leaves), in_spec, tuple(outputs), out_spec))

        return hook

    with ExitStack() as stack:
        for fqn, module in candidates.items():
            handle = module.register_forward_hook(record(fqn), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def replaced_forward(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """Within this context, and in this thread, ``module`` runs ``replacement(original forward, *args, **kwargs)``."""
    owner = threading.get_ident()
    original = module.forward
    had_own = module.__dict__.get("forward")

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return original(*args, **kwargs)
        return replacement(original, *args, **kwargs)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had_own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = had_own


@contextmanager
def _opaque(calls: tuple[BlockCall, ...]) -> Iterator[None]:
    """Within this context, and in this thread, the blocks' forward is a call of :data:`BLOCK_OP`."""

    def stub(index: int, call: BlockCall) -> Any:
        outputs = [(list(t.shape), str(t.dtype).removeprefix("torch.")) for t in call.output_tensors]
        spec = json.dumps({"block": index, "outputs": outputs})

        def forward(_: Any, *args: Any, **kwargs: Any) -> Any:
            results = iter(block_op(_tensors(add_axis(pytree.tree_leaves((args, kwargs)), call.flat_inputs)), spec))
            outputs = [next(results) if isinstance(o, Tensor) else o for o in call.outputs]
            return pytree.tree_unflatten(drop_axis(outputs, call.flat_outputs), call.out_spec)

        return forward

    with ExitStack() as stack:
        for index, call in enumerate(calls):
            stack.enter_context(replaced_forward(call.module, stub(index, call)))
        yield


def lifted_names(exported: torch.export.ExportedProgram) -> dict[str, tuple[InputKind, str]]:
    """Placeholder name → (kind, module path) of the weights, buffers and constants that export made inputs."""
    return {
        spec.arg.name: (spec.kind, spec.target or "")
        for spec in exported.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    }


def drop_checks(graph: Graph) -> None:
    """Erase export's own assertions: they carry no value, and a P-step breaks the sizes some of them state."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and "assert" in str(node.target):
            graph.erase_node(node)


def _returned(exported: torch.export.ExportedProgram) -> list[Any]:
    """The model's own outputs among those of the graph. A buffer that is only written (a table made anew in each call) is no state."""
    outputs = exported.graph.output_node().args[0]
    lifted = {target: name for name, (_, target) in lifted_names(exported).items()}
    read = {node.name for node in exported.graph.nodes if node.op == "placeholder" and node.users}
    own: list[Any] = []
    for spec, value in zip(exported.graph_signature.output_specs, outputs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            own.append(value)
        elif lifted.get(spec.target or "") in read:
            raise UnsupportedModelError("the model", f"its forward changes {spec.target}, which it reads", "A step must be a function.")
    return own


def _skeleton(exported: torch.export.ExportedProgram, num_inputs: int) -> GraphModule:
    """The exported graph with weights read by ``get_attr`` and the tensor inputs alone as placeholders."""
    lifted = lifted_names(exported)
    graph = Graph()
    root: dict[str, Any] = {}
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in lifted:
                if not node.users:
                    continue
                target = lifted[node.name][1]
                root[target] = exported.constants[target] if target in exported.constants else exported.state_dict[target]
                env[node] = graph.get_attr(target)
            elif isinstance(node.meta.get("val"), Tensor):
                env[node] = graph.placeholder(f"{node.name}_in" if _TAKEN.fullmatch(node.name) else node.name)
            else:
                continue  # a constant argument (None, a flag): nothing reads it
            env[node].meta = dict(node.meta)
        elif node.op == "output":  # without what the model leaves out: a tuple says None where an output class has no entry
            graph.output(tuple(env[value] for value in _returned(exported) if value is not None))
        else:
            if node.op == "get_attr":  # the graph within an autocast region
                root[node.target] = getattr(exported.graph_module, node.target)
            env[node] = graph.node_copy(node, lambda n: env[n])
    drop_checks(graph)
    if len([n for n in graph.nodes if n.op == "placeholder"]) != num_inputs:
        raise UnsupportedModelError("the model", "its exported graph does not take its tensor inputs one by one", "Pass plain tensors.")
    return GraphModule(root, graph)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _arguments_of(kwargs: Mapping[str, Any]) -> list[str]:
    """The argument that each tensor of the call belongs to."""
    return [name for name, value in kwargs.items() for _ in _tensors(value)]


def _sample_inputs(model: nn.Module, kwargs: Mapping[str, Any], result: Any) -> tuple[int, ...]:
    """Positions of the sample's tensors among all tensors of the call.

    The sample is the argument that has a tensor of the shape of the model's first output; where that is none, or several, the first.
    """
    first = next(iter(inspect.signature(model.forward).parameters))
    arguments = _arguments_of(kwargs)
    given = zip(arguments, _tensors(dict(kwargs)), strict=True)
    shapes = [tensor.shape for tensor in _tensors(result)[:1]]
    alike = [name for name, tensor in given if tensor.is_floating_point() and tensor.shape in shapes]
    sample = first if first in alike else next(iter(alike), first)
    return tuple(position for position, name in enumerate(arguments) if name == sample)


def _answering_reads(kwargs: Mapping[str, Any], known: frozenset[int]) -> Callable[..., Any]:
    """A forward that knows the values of the tensors at positions ``known`` while it is traced."""
    values = [tensor if position in known else None for position, tensor in enumerate(_tensors(dict(kwargs)))]

    def forward(original: Callable[..., Any], *args: Any, **given: Any) -> Any:
        with ReadValues(_tensors((args, given)), values):
            return original(*args, **given)

    return forward


def _export(
    model: nn.Module, kwargs: Mapping[str, Any], calls: tuple[BlockCall, ...], sample: tuple[int, ...]
) -> tuple[torch.export.ExportedProgram, frozenset[int]]:
    """The model around its blocks as a graph, and the positions of the inputs whose values it holds for.

    Most models are captured for all values. Where that fails because Python reads some (the length of a text from its mask), the
    graph is made for the values at hand; see :mod:`read_values`. Reads of constants are answered too: they would be sizes that no
    graph knows.
    """
    has_switch = "return_dict" in inspect.signature(model.forward).parameters
    given = {**kwargs, "return_dict": False} if has_switch else dict(kwargs)

    def export(known: frozenset[int] | None) -> torch.export.ExportedProgram:
        with ExitStack() as stack:
            stack.enter_context(casting_traced(model))
            stack.enter_context(_opaque(calls))
            if known is None:
                stack.enter_context(redirect_stderr(StringIO()))  # torch prints how far it came; there is a second trial
            else:
                stack.enter_context(replaced_forward(model, _answering_reads(kwargs, known)))
            return torch.export.export(model, (), given, strict=False)

    try:
        exported = export(None)
    except Exception as error:
        return _export_for_values(model, kwargs, sample, export, error)
    has_values = not any(tensor.is_meta for tensor in _tensors(given))
    if has_values and any(node.target is torch.ops.aten.item.default for node in exported.graph.nodes):
        with suppress(ValueNeededError):
            return export(frozenset()), frozenset()
    return exported, frozenset()


def _export_for_values(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    sample: tuple[int, ...],
    export: Callable[[frozenset[int]], torch.export.ExportedProgram],
    refusal: Exception,
) -> tuple[torch.export.ExportedProgram, frozenset[int]]:
    """The graph for the values that the forward reads, and the positions of their inputs: those it asks for, one after the other.

    Raises:
        UnsupportedModelError: reads are not why it could not be captured (``refusal``), or what it reads changes at every step.
    """
    arguments = _arguments_of(kwargs)
    moving = {*sample, *(position for position, name in enumerate(arguments) if name in TIMESTEP_NAMES)}
    known: frozenset[int] = frozenset()
    while not known & moving:
        try:
            return export(known), known
        except ValueNeededError as needed:
            known |= needed.positions
        except Exception as error:
            raise UnsupportedModelError(
                type(model).__name__,
                f"torch.export cannot capture what stands around its blocks: {first_line(refusal)}",
                "See docs/architecture.md, capture.",
            ) from error
    names = ", ".join(sorted({arguments[position] for position in known & moving}))
    raise UnsupportedModelError(
        type(model).__name__, f"its forward reads values made from {names}", "They change at every step, and graphs read none."
    ) from refusal


def _check_arguments(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse objects that the model may read tensors from, or write them to, behind the graph's back."""
    for name, value in kwargs.items():
        for leaf in pytree.tree_leaves(value):
            if leaf is not None and not isinstance(leaf, base_types):
                raise UnsupportedModelError(
                    type(model).__name__,
                    f"its argument {name} is a {type(leaf).__name__}, which may hold tensors that its blocks read and write",
                    "A step is a function of tensors and plain values: call the model without it, if it can be.",
                )


def capture(model: nn.Module, kwargs: Mapping[str, Any], left_out: frozenset[str] = frozenset()) -> Capture:
    """Capture ``model`` for the signature of ``kwargs``.

    Args:
        model: a transformer in eval mode.
        kwargs: keyword arguments of one forward call but ``return_dict``; tensors fix shapes, dtypes and device, everything
            else is constant.
        left_out: lists of blocks (module paths) that stay part of the model around the blocks.

    Returns:
        The skeleton, the block calls of the eager run and its tensors in and out.

    Raises:
        InputError: the model itself refuses ``kwargs``.
        UnsupportedModelError: no block that keeps a token stream was found, or ``torch.export`` cannot capture the model.
    """
    has_switch = "return_dict" in inspect.signature(model.forward).parameters
    candidates = {fqn: block for fqn, block in candidate_blocks(model).items() if fqn.rpartition(".")[0] not in left_out}
    calls: list[BlockCall] = []
    with torch.no_grad(), scales_set(model, adapter_scales(model)):
        try:
            with recording(candidates, calls):
                result = model(**kwargs, **({"return_dict": True} if has_switch else {}))
        except Exception as error:
            raise InputError(f"{type(model).__name__} itself refused this call ({', '.join(kwargs)}): {error}") from error
        sample = _sample_inputs(model, kwargs, result)
        streaming = tuple(call for call in calls if _keeps_a_stream(call)) or tuple(filter(_keeps_a_stream, map(with_batch_axis, calls)))
        kept = _on_the_sample(model, kwargs, sample, candidates, streaming)
        _check_arguments(model, kwargs)
        if not kept:
            raise UnsupportedModelError(
                type(model).__name__,
                f"no repeated block was found among {len(candidates)} members of its ModuleLists that returns a token "
                "stream of the shape it was given",
                "TokenCache needs a stack of residual transformer blocks in a torch.nn.ModuleList.",
            )
        names = [call.fqn for call in kept]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UnsupportedModelError(twice, "the block is called more than once in a forward pass", "Its updates have no single cache.")
        exported, read = _export(model, kwargs, kept, sample)
    inputs = tuple(_tensors(dict(kwargs)))
    outputs, output_spec = pytree.tree_flatten(result)
    if not all(isinstance(leaf, Tensor) for leaf in outputs):
        raise UnsupportedModelError(
            type(model).__name__, "it returns values that are not tensors", "Wrap it in a module that returns tensors."
        )
    skeleton = _skeleton(exported, len(inputs))
    input_names = tuple(node.name for node in skeleton.graph.nodes if node.op == "placeholder")
    return Capture(skeleton, kept, input_names, inputs, sample, tuple(sorted(read)), tuple(outputs), output_spec)
