"""Values that P-steps take from their timestep and condition alone, made for many steps to come at once (``passes/hoist.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tokencache_compile.calls import TIMESTEP_NAMES
from tokencache_compile.engine import Engine, TorchEngine
from tokencache_compile.ir import HoistedStep
from tokencache_compile.passes.hoist import hoist, run_ahead
from tokencache_compile.passes.pipeline import StepPrograms

STEPS_AHEAD = 64  # at once: the P-steps of most runs; a bound on what their values take


@dataclass
class Ahead:
    """The values of one branch.

    Attributes:
        given: the inputs that they hold for, beside the timestep.
        values: by timestep.
    """

    given: Mapping[str, Tensor] = field(default_factory=dict)
    values: dict[float, list[Tensor]] = field(default_factory=dict)


def as_given(t: Tensor) -> tuple[Tensor, ...]:
    """What pipelines give a model for a schedule's timesteps ``t`` [T]: t, t/1000, 1 − t/1000 (Z-Image, Lumina 2) or 1000 − t (Mochi)."""
    return t, t / 1000, (1000 - t) / 1000, 1 - t / 1000, 1000 - t


class HoistedEngine:
    """A P-step without what it computes from timestep and condition alone, and that part of it.

    Args:
        engine: of ``hoisted.step``.
    """

    def __init__(self, hoisted: HoistedStep, engine: Engine) -> None:
        self.engine, self._hoisted = engine, hoisted
        self._names = hoisted.step.input_names
        self._reads = {str(node.target) for node in hoisted.ahead.graph.find_nodes(op="placeholder")} - {hoisted.timestep}

    def schedule(self, inputs: Sequence[Tensor], timesteps: Sequence[float], step: int, timestep: float) -> list[float] | None:
        """A sampler's ``timesteps`` as the model is given them, the one of ``step`` being ``timestep``; None where it is another.

        See :func:`as_given`, which is taken in the dtype of ``inputs``.
        """
        for given in as_given(torch.tensor(timesteps).to(inputs[self._names.index(self._hoisted.timestep)].dtype)):
            if step < len(given) and float(given[step]) == timestep:
                return [float(one) for one in given]
        return None

    def values(self, known: Ahead, inputs: Sequence[Tensor], timestep: float, to_come: Sequence[float]) -> list[Tensor] | None:
        """The values of a step, taken from ``known`` or made with those of the steps ``to_come`` and kept there.

        Returns None where they cannot be: the condition changes within the run, or not all samples have this timestep.

        Args:
            inputs: the model's tensors.
            to_come: timesteps of P-steps, from this one on; read where this one's values are not known.
        """
        call = dict(zip(self._names, inputs, strict=True))
        times = call[self._hoisted.timestep]
        if not bool((times == timestep).all()):
            return None
        given = {name: call[name] for name in self._reads}
        if known.given and any(not torch.equal(known.given[name], tensor) for name, tensor in given.items()):
            return None
        if timestep not in known.values:
            chunk = list(to_come[:STEPS_AHEAD])
            timesteps = torch.stack([torch.full_like(times, one) for one in chunk])
            with torch.no_grad():
                made = run_ahead(self._hoisted.ahead, call, self._hoisted.timestep, timesteps)
            known.given = {name: tensor.clone() for name, tensor in given.items()}
            known.values = dict(zip(chunk, map(list, zip(*(value.unbind() for value in made), strict=True)), strict=True))
        return known.values[timestep]


def hoisted_engines(backend: str, steps: StepPrograms, call: Mapping[str, Any]) -> tuple[HoistedEngine | None, ...]:
    """Each P-step cut in two; None where it cannot be, or ``backend`` is another runtime's.

    Args:
        call: the arguments of one call by name, in the order of the model's forward, whose first is the sample.
    """
    if backend not in ("eager", "inductor"):
        return (None,) * len(steps.cached)
    sample = next(iter(call))
    paths, _ = pytree.tree_flatten_with_path(dict(call))
    leaves = [(getattr(path[0], "key", None), leaf) for path, leaf in paths if isinstance(leaf, Tensor)]
    arguments = dict(zip(steps.program.input_names, leaves, strict=True))
    inputs = {name: tensor for name, (_, tensor) in arguments.items()}
    samples = [name for name, (argument, _) in arguments.items() if argument == sample]
    (timestep,) = [name for name, (argument, _) in arguments.items() if argument in TIMESTEP_NAMES]
    cut = [hoist(step, inputs, samples, timestep, steps.program.known_stream.batch) for step in steps.cached]
    return tuple(None if one is None else HoistedEngine(one, TorchEngine(one.step, backend == "inductor")) for one in cut)
