"""Where an engine's inputs and outputs lie in memory: rotating output buffers, and the table of addresses that a step is run with.

    values ──▶ Bindings.place ──▶ Placement: addresses, all different, 256-byte aligned; few of them in a long run
               own inputs: copied to fixed buffers        the caches: read where they lie
               own outputs: fixed buffers, copied out     new caches: a set of OutputBuffers, free again when nothing reads it

An engine's input never lies where an output does, and a cache that some step still reads is never written to. Plain torch, any device.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tokencache_compile.errors import InputError
from tokencache_compile.ir import TensorSpec

ALIGNMENT = 256
"""Bytes: what TensorRT asks of every address it is given."""


def aligned(nbytes: int) -> int:
    """``nbytes``, rounded up to whole multiples of :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """``nbytes`` of memory [nbytes], uint8, that begin at a multiple of :data:`ALIGNMENT`."""
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]


def carve(memory: Tensor, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Contiguous tensors for ``specs`` one after the other in ``memory``, each aligned. :func:`carved_size` says what they take."""
    tensors, start = {}, 0
    for spec in specs:
        tensors[spec.name] = memory[start : start + spec.nbytes].view(spec.dtype).view(spec.shape)
        start += aligned(spec.nbytes)
    return tensors


def carved_size(specs: Sequence[TensorSpec]) -> int:
    """Bytes that :func:`carve` takes for ``specs``."""
    return sum(aligned(spec.nbytes) for spec in specs)


class OutputBuffers:
    """Sets of buffers for one step's outputs, handed out in turn.

    A set is free again when the last tensor in its memory has died, views of what was handed out included. The first free set is
    taken, so that a run whose caches live for a fixed number of steps comes back to the same addresses. Each thread has its own
    sets, and within it each ``lane``: what runs side by side neither waits for the other nor disturbs its order.
    """

    def __init__(self, specs: Sequence[TensorSpec], device: torch.device) -> None:
        self.specs, self.device = tuple(specs), device
        self._local = threading.local()

    def take(self, lane: Hashable = None) -> dict[str, Tensor]:
        """A tensor for every output by name, contents undefined; no tensor that is alive shares its memory.

        Args:
            lane: the CUDA stream in whose order the tensors will be read, where there are streams.
        """
        if not self.specs:
            return {}
        sets = self._lanes.setdefault(lane, [])
        free = next((one for one in sets if one.free), None)
        if free is None:
            free = _BufferSet(self.specs, self.device)
            sets.append(free)
        return free.hand_out()

    def count(self, lane: Hashable = None) -> int:
        """How many sets the calling thread has in ``lane``."""
        return len(self._lanes.get(lane, ()))

    @property
    def _lanes(self) -> dict[Hashable, list[_BufferSet]]:
        if not hasattr(self._local, "lanes"):
            self._local.lanes = {}
        lanes: dict[Hashable, list[_BufferSet]] = self._local.lanes
        return lanes


class _BufferSet:
    def __init__(self, specs: Sequence[TensorSpec], device: torch.device) -> None:
        self.specs = specs
        self.memory = allocate(carved_size(specs), device)
        self.free = True

    def hand_out(self) -> dict[str, Tensor]:
        # Through DLPack the tensors get a storage of their own over this memory. It holds `lent`, which therefore dies with the
        # last of them: views, detached ones and those of inference mode do not keep the tensor they came from, but its storage.
        lent = self.memory.view(-1)
        weakref.finalize(lent, _release, self).atexit = False
        self.free = False
        return carve(from_dlpack(lent), self.specs)


def _release(buffers: _BufferSet) -> None:
    buffers.free = True


class SharedMemory:
    """Scratch memory for several users of which one runs at a time: as large as the largest asks for.

    It grows by moving: whoever keeps its address compares it with :attr:`address` before each use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = allocate(0, device)

    @property
    def address(self) -> int:
        return self._memory.data_ptr()

    @property
    def nbytes(self) -> int:
        return self._memory.numel()

    def reserve(self, nbytes: int) -> None:
        """Have at least ``nbytes``."""
        if nbytes > self.nbytes:
            self._memory = allocate(aligned(nbytes), self.device)


class Recordings:
    """What was recorded of a step for each binding table (a CUDA graph), the ``capacity`` last used.

    A table runs plainly at first, unless ``at_once``: TensorRT must have run once with what is recorded.
    """

    def __init__(self, capacity: int, at_once: bool = False) -> None:
        self.capacity, self.at_once = capacity, at_once
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._replays: OrderedDict[tuple[int, ...], Callable[[], None]] = OrderedDict()

    def run(self, table: tuple[int, ...], plainly: Callable[[], None], record: Callable[[], Callable[[], None] | None]) -> None:
        """Run the step once: ``plainly`` the first time ``table`` is seen, from then on by what ``record`` returns, unless that is None."""
        replay = self._replays.get(table) or (record() if self.at_once or table in self._seen else None)
        (replay or plainly)()
        if replay is None:
            _keep(self._seen, table, None, 4 * self.capacity)
        else:
            _keep(self._replays, table, replay, self.capacity)

    def clear(self) -> None:
        """Forget all, because something else that was recorded has moved."""
        self._seen.clear()
        self._replays.clear()


def _keep(held: OrderedDict[tuple[int, ...], Any], table: tuple[int, ...], value: Any, capacity: int) -> None:
    held[table] = value
    held.move_to_end(table)
    if len(held) > capacity:
        held.popitem(last=False)


@dataclass(frozen=True)
class Placement:
    """One run of a step: where its inputs and outputs lie.

    Attributes:
        inputs, outputs: by name, in the order of the step's table.
        own: names of the outputs that stand in fixed buffers.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    own: tuple[str, ...]

    @property
    def addresses(self) -> tuple[int, ...]:
        """The binding table: the address of every input, then of every output."""
        return tuple(tensor.data_ptr() for tensor in (*self.inputs.values(), *self.outputs.values()))

    def results(self, copies: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, those in fixed buffers copied into ``copies``."""
        for name in self.own:
            copies[name].copy_(self.outputs[name])
        return self.outputs | copies


class Bindings:
    """Places the inputs and outputs of one step.

    What a step takes from the caller and gives to it, small against the caches, goes through fixed buffers: the caller's tensors lie
    anywhere and may be held forever. Not to be used from two threads at once: see :class:`OutputBuffers` for what may be kept.

    Args:
        inputs, outputs: the step's table.
        caches: names of the inputs that are caches.
        num_outputs: how many of the outputs, the first, are the model's own; the others are caches.
    """

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        caches: Collection[str],
        num_outputs: int,
        device: torch.device,
    ) -> None:
        self.inputs, self.outputs, self.device = tuple(inputs), tuple(outputs), device
        self._caches = {spec.name for spec in inputs} & set(caches)
        self.own_outputs = self.outputs[:num_outputs]
        own_inputs = [spec for spec in inputs if spec.name not in self._caches]
        fixed = allocate(carved_size(own_inputs) + carved_size(self.own_outputs), device)
        self._fixed_inputs = carve(fixed, own_inputs)
        self._fixed_outputs = carve(fixed[carved_size(own_inputs) :], self.own_outputs)
        self.buffers = OutputBuffers(self.outputs[num_outputs:], device)

    def check(self, values: Mapping[str, Tensor]) -> None:
        """Raise an InputError unless there is a tensor for every input, of its shape, dtype and device; caches contiguous."""
        for spec in self.inputs:
            value = values.get(spec.name)
            if value is None:
                raise InputError(f"{spec.name} is missing; {', '.join(one.name for one in self.inputs)} are needed.")
            found, needed = (tuple(value.shape), value.dtype, value.device), (spec.shape, spec.dtype, self.device)
            if found != needed:
                raise InputError(f"{spec.name} is {_kind(*found)}; {_kind(*needed)} is needed, for which the engine was built.")
            if spec.name in self._caches and not value.is_contiguous():
                raise InputError(f"{spec.name} is not contiguous (strides {value.stride()}); an engine reads it where it lies.")

    def place(self, values: Mapping[str, Tensor], lane: Hashable = None) -> Placement:
        """Copy the model's own inputs into place and choose buffers for the outputs. ``values`` are :meth:`check`-ed before."""
        for name, fixed in self._fixed_inputs.items():
            fixed.copy_(values[name])
        inputs = {spec.name: self._fixed_inputs.get(spec.name, values[spec.name]) for spec in self.inputs}
        inputs = {name: value if value.data_ptr() % ALIGNMENT == 0 else _moved(value) for name, value in inputs.items()}
        outputs = self._fixed_outputs | self.buffers.take(lane)
        return Placement(inputs, outputs, tuple(self._fixed_outputs))

    def empty_copies(self) -> dict[str, Tensor]:
        """New memory of the caller's for the model's own outputs: what :meth:`Placement.results` takes."""
        return {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in self.own_outputs}


def _moved(value: Tensor) -> Tensor:
    """A copy at an aligned address, for a cache that did not come from :class:`OutputBuffers`: one of a new request."""
    place = allocate(value.nbytes, value.device).view(value.dtype).view(value.shape)
    return place.copy_(value)


def _kind(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"
