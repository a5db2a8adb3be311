"""On shapes: a step run on shapes alone, each region once for all the blocks that call it with inputs of the same kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode, UnsupportedOperatorException
from torch.fx import Interpreter
from torch.utils import _pytree as pytree

from tokencache_compile.ir import StepProgram
from tokencache_compile.macs import MacCounter
from tokencache_compile.passes.regions import Region
from tokencache_compile.passes.step_graph import extra_inputs


def run_on_shapes(step: StepProgram, inputs: Sequence[Tensor], num_random: tuple[int, int, int], counter: MacCounter) -> Sequence[Tensor]:
    """Run the step, ``counter`` counting, on shapes alone: the values of ``inputs`` are used only where shapes depend on them."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return _run(_OnShapes(step, counter), step, [mode.from_tensor(t) for t in inputs], num_random, counter)
    except (DynamicOutputShapeException, UnsupportedOperatorException):  # a mask's values decide shapes in it
        counter.macs = 0
        return _run(step.module, step, inputs, num_random, counter)


def _run(run: Any, step: StepProgram, inputs: Sequence[Tensor], num_random: tuple[int, int, int], counter: MacCounter) -> Sequence[Tensor]:
    device = inputs[0].device
    extras = [torch.zeros(num_random if name == "random_scores" else (), device=device) for name in extra_inputs(step)]
    caches = [torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in step.caches]
    with torch.no_grad(), counter:
        results: Sequence[Tensor] = run(*inputs, *extras, *caches)
    return results


class _OnShapes(Interpreter):
    """Runs a step's graph on fake tensors. A region's outputs and MACs follow from the kinds of its inputs, so they are kept by these."""

    def __init__(self, step: StepProgram, counter: MacCounter) -> None:
        super().__init__(step.module)
        self._counter = counter
        self._known: dict[Any, tuple[Any, int]] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(self.fetch_attr(target), Region):
            return super().call_module(target, args, kwargs)
        key = (target, *(_kind(leaf) for leaf in pytree.tree_leaves((args, kwargs))))
        if key not in self._known:
            before = self._counter.macs
            outputs = super().call_module(target, args, kwargs)
            self._known[key] = outputs, self._counter.macs - before
        else:
            self._counter.macs += self._known[key][1]
        return self._known[key][0]


def _kind(value: Any) -> Any:
    """What the outputs of an operator on ``value`` can depend on, if they do not depend on a tensor's values."""
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value
