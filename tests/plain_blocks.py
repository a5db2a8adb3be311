"""Independent reference of one I-step and one P-step, for any diffusers transformer: ``block.forward`` patched on the eager model.

No graphs, and no code of `tokencache_compile`. A P-step's block gathers its tokens, runs the module itself on them and scatters;
what its attention sees is decided by patching ``scaled_dot_product_attention`` meanwhile. Axes are told by their sizes, so a
family's token counts must be unlike its other sizes. Updates are held (no forecast), and all samples keep the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Sdpa = Callable[..., Tensor]


@dataclass
class Recorded:
    """What a block did on all tokens."""

    update: Tensor  # of the cached stream, which may have rows of text too
    stream: tuple[int, int]  # its position among the leaves of the inputs and of the outputs
    axis: int  # its token axis
    others: set[int]  # how many rows stand beside the tokens' on an axis that they share with others
    attention: list[tuple[Any, ...]]  # of each call, in order: query, key, value, mask, result
    modules: dict[str, Any] = field(default_factory=dict)  # self-attention module -> what it returned
    mixed: list[Tensor] = field(default_factory=list)  # what the module on the grid was given


@contextmanager
def attention_replaced(replacement: Callable[[Sdpa, int], Sdpa]) -> Iterator[None]:
    """``replacement(original, number of the call)`` stands for every attention meanwhile."""
    original, numbers = F.scaled_dot_product_attention, iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return replacement(original, next(numbers))(*args, **kwargs)

    F.scaled_dot_product_attention = call  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class PlainBlocks:
    """I- and P-steps of ``model`` whose blocks ``names`` are cached; N ``tokens``.

    ``history`` rows stand before the tokens in the stream itself, and text before or behind all these where they are joined. Blocks
    whose module ``mixer`` works on the ``grid`` of tokens are told its sizes: a P-step's block is told a grid of 1 × n, and the mixer
    sees the whole grid, in which other tokens than the kept ones are as at the I-step.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        tokens: int,
        context: str,
        text_first: bool = True,
        reuse_module: bool = True,
        history: int = 0,
        mixer: str = "",
        grid: Sequence[int] = (),
    ) -> None:
        self.model, self.names, self.tokens, self.context = model, names, tokens, context
        self.text_first, self.reuse_module, self.history = text_first, reuse_module, history
        self.mixer, self.grid = mixer, list(grid)
        self.recorded: dict[str, Recorded] = {}

    @torch.no_grad()
    def full_step(self, kwargs: dict[str, Any]) -> Tensor:
        """The model's own step; everything cached is taken from it."""
        with self._patched(self._record):
            return self._call(kwargs)

    @torch.no_grad()
    def cached_step(self, kwargs: dict[str, Any], kept: dict[str, Tensor]) -> Tensor:
        """A P-step: block ``name`` computes the tokens ``kept[name]`` [n], all others add what the I-step added."""
        with self._patched(lambda name, block, forward, args, kw: self._partial(name, block, forward, args, kw, kept[name])):
            return self._call(kwargs)

    def _call(self, kwargs: dict[str, Any]) -> Tensor:
        output = self.model(**kwargs)
        while not isinstance(output, Tensor):
            output = output[0]
        return output

    @contextmanager
    def _patched(self, forward: Callable[..., Any]) -> Iterator[None]:
        blocks = {name: self.model.get_submodule(name) for name in self.names}
        for name, block in blocks.items():
            own = block.forward
            block.forward = lambda *a, n=name, b=block, f=own, **kw: forward(n, b, f, a, kw)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in blocks.values():
                del block.forward

    def _record(self, name: str, block: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        record, result = self._run_on_all(block, forward, args, kwargs)
        self.recorded[name] = record
        return result

    def _run_on_all(self, block: nn.Module, forward: Any, args: Any, kwargs: Any) -> tuple[Recorded, Any]:
        calls: list[tuple[Any, ...]] = []
        stack: list[str] = []
        returned: dict[str, Any] = {}
        attending: set[str] = set()

        def listen(sdpa: Sdpa, _: int) -> Sdpa:
            def listening(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
                out = sdpa(query, key, value, attn_mask, *rest, **more)
                calls.append((query, key, value, attn_mask, out))
                if key.shape[-2] >= self.tokens and stack:
                    attending.add(stack[-1])
                return out

            return listening

        def entering(path: str) -> Any:
            return lambda *_: stack.append(path)

        def leaving(path: str) -> Any:
            def note(_module: nn.Module, _inputs: Any, out: Any) -> None:
                stack.pop()
                returned[path] = out

            return note

        inner = [(path, module) for path, module in block.named_modules() if path]
        handles = [module.register_forward_pre_hook(entering(path)) for path, module in inner]
        handles += [module.register_forward_hook(leaving(path)) for path, module in inner]
        mixed: list[Tensor] = []
        if self.mixer:
            handles.append(block.get_submodule(self.mixer).register_forward_pre_hook(lambda _, given: mixed.append(given[0])))
        with attention_replaced(listen):
            result = forward(*args, **kwargs)
        for handle in handles:
            handle.remove()
        leaves, outputs = pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(result)
        joint = {key.shape[-2] for _, key, *_ in calls if key.shape[-2] >= self.tokens}
        i, o, axis = self._stream(leaves, outputs, {self.tokens + self.history, *joint})
        others = {size - self.tokens for size in (leaves[i].shape[axis], *joint)} - {0}
        record = Recorded(outputs[o] - leaves[i], (i, o), axis, others, calls, {path: returned[path] for path in attending}, mixed)
        return record, result

    def _stream(self, leaves: list[Any], outputs: list[Any], sizes: set[int]) -> tuple[int, int, int]:
        """Its position among inputs and outputs, and its token axis: the second, or (tokens first) the first."""
        for size, axis in product(sorted(sizes), (1, 0)):
            for o, out in enumerate(outputs):
                if isinstance(out, Tensor) and out.dim() in (2, 3) and out.shape[axis] == size:
                    return next(i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.shape == out.shape), o, axis
        raise AssertionError(f"no stream of {sorted(sizes)} tokens")

    # -- a P-step's block ---------------------------------------------------------------------------------------------

    def _rows(self, size: int, others: set[int], kept: Tensor) -> Tensor | None:
        """Which rows of an axis of ``size`` a P-step works on: the kept tokens, and all of the text; None for other axes."""
        if size == self.tokens:
            return kept
        if size - self.tokens not in others:
            return None
        before = size - self.tokens if self.text_first else self.history
        return torch.cat([torch.arange(before), kept + before, torch.arange(before + self.tokens, size)])

    def _gather(self, value: Any, others: set[int], kept: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return len(kept) if value == self.tokens else value  # a number that tells how many tokens there are
        for axis, size in enumerate(value.shape):
            rows = self._rows(size, others, kept)
            value = value if rows is None else value.index_select(axis, rows)
        return value

    def _partial(self, name: str, block: nn.Module, forward: Any, args: Any, kwargs: Any, kept: Tensor) -> Any:
        before = self.recorded[name]
        i, o = before.stream
        leaves, spec = pytree.tree_flatten((args, kwargs))
        stream = leaves[i]
        now = self._run_on_all(block, forward, args, kwargs)[0] if self.context in ("full", "cached") else before
        few = [self._gather(leaf, before.others, kept) for leaf in leaves]
        if self.grid:
            sizes = [leaf if isinstance(leaf, int) else None for leaf in leaves]
            first = next(i for i in range(len(sizes)) if sizes[i : i + len(self.grid)] == self.grid)
            few[first : first + len(self.grid)] = [1] * (len(self.grid) - 1) + [len(kept)]
        few_args, few_kwargs = pytree.tree_unflatten(few, spec)
        whole = [self._on_all(old, new) for old, new in zip(before.attention, now.attention, strict=True)]
        seeing = attention_replaced(lambda sdpa, number: self._seeing(sdpa, whole[number], before.others, kept))
        with seeing, self._modules_replaced(block, before, kept), self._on_whole_grid(block, before, kept):
            outputs, out_spec = pytree.tree_flatten(forward(*few_args, **few_kwargs))
        moved = stream + before.update
        rows = self._rows(stream.shape[before.axis], before.others, kept)
        outputs[o] = moved.index_copy(before.axis, rows, outputs[o])
        return pytree.tree_unflatten(outputs, out_spec)

    def _on_all(self, before: tuple[Any, ...], now: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the kept tokens' attention sees of all tokens: under ``cached`` keys and values are the I-step's, the mask is today's."""
        return (*before[:3], now[3], before[4]) if self.context == "cached" else now

    def _seeing(self, sdpa: Sdpa, everything: tuple[Any, ...], others: set[int], kept: Tensor) -> Sdpa:
        """The attention of the kept tokens, in the context asked for; ``everything``: the same call on all tokens."""
        _, all_keys, all_values, all_mask, all_out = everything

        def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
            rows = self._rows(all_keys.shape[-2], others, kept)
            if self.context == "kept" or (self.context == "reuse" and self.reuse_module) or rows is None:
                return sdpa(query, key, value, attn_mask, *rest, **more)
            if self.context == "reuse":
                return all_out.index_select(-2, self._rows(all_out.shape[-2], others, kept))
            if all_mask is not None:
                queries = self._rows(all_mask.shape[-2], others, kept)
                all_rows = all_mask if queries is None else all_mask.index_select(-2, queries)
            else:
                all_rows = None
            if self.context == "full":
                return sdpa(query, all_keys, all_values, all_rows, *rest, **more)
            keys, values = all_keys.clone(), all_values.clone()
            keys[..., rows, :], values[..., rows, :] = key, value
            return sdpa(query, keys, values, all_rows, *rest, **more)

        return attend

    @contextmanager
    def _modules_replaced(self, block: nn.Module, before: Recorded, kept: Tensor) -> Iterator[None]:
        """Under ``reuse`` the self-attention modules give what they gave at the I-step."""
        paths = before.modules if self.context == "reuse" and self.reuse_module else {}
        modules = [block.get_submodule(path) for path in paths]
        for module, given in zip(modules, paths.values(), strict=True):
            out = pytree.tree_map(lambda value: self._gather(value, before.others, kept), given)
            module.forward = lambda *_, out=out, **__: out  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    @contextmanager
    def _on_whole_grid(self, block: nn.Module, before: Recorded, kept: Tensor) -> Iterator[None]:
        """The module on the grid sees every token, the kept ones as they are now."""
        if not self.mixer:
            yield
            return
        module = block.get_submodule(self.mixer)
        (then,) = before.mixed
        axis = list(then.shape).index(self.grid[0], 1)
        last = axis + len(self.grid) - 1
        own = module.forward

        def forward(x: Tensor) -> Tensor:
            now = then.flatten(axis, last).index_copy(axis, kept, x.flatten(axis, last))
            return own(now.unflatten(axis, self.grid)).flatten(axis, last).index_select(axis, kept).reshape(x.shape)

        module.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.forward
