"""One weights file for all graphs of a bundle: safetensors, and where in it each tensor lies, which is how ONNX refers to it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_HEADER_LENGTH = 8  # bytes: a little-endian uint64, then that many bytes of JSON, then the tensors


@dataclass(frozen=True)
class Region:
    """Bytes ``offset`` … ``offset + length`` of a file."""

    offset: int
    length: int


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Region]:
    """Write ``weights`` and return where each lies; tensors that share their memory are written once."""
    first: dict[tuple[object, ...], str] = {}
    stands_for = {name: first.setdefault(_identity(t), name) for name, t in weights.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors leaves its files to their owner alone; a bundle is read by whoever may read its folder
    save_file({name: weights[name].detach().cpu().contiguous() for name in first.values()}, path)
    path.chmod(mode)
    regions = read_regions(path)
    return {name: regions[kept] for name, kept in stands_for.items()}


def read_regions(path: Path) -> dict[str, Region]:
    """Where each tensor of a safetensors file lies in it."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(_HEADER_LENGTH))
        header = json.loads(file.read(length))
    start = _HEADER_LENGTH + length
    ranges = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: Region(start + begin, end - begin) for name, (begin, end) in ranges.items()}


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (object(),)


def nbytes(weights: Mapping[str, Tensor]) -> int:
    """Bytes that :func:`write_weights` will take, but for the header."""
    unique = {_identity(t): t for t in weights.values()}
    return sum(t.numel() * t.element_size() for t in unique.values() if isinstance(t, torch.Tensor))
