"""Checkpoints of a training run: safetensors, written aside and moved in place, so that a killed run resumes where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tokencache_compile.errors import ConfigError

FORMAT = 1


def save_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Write the modules, the optimizer's state and ``progress`` (JSON) into one file."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    save_file(tensors, aside, metadata={"format": str(FORMAT), "progress": json.dumps(dict(progress))})
    os.replace(aside, path)


def load_checkpoint(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote into ``modules`` and ``optimizer``; returns its progress.

    Raises:
        ConfigError: the file is no checkpoint, of another format, or of other modules.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as a checkpoint: {error}. Delete it to begin anew.") from error
    if metadata.get("format") != str(FORMAT):
        raise ConfigError(f"{path} is of checkpoint format {metadata.get('format')}; this version reads {FORMAT}. Delete it to begin anew.")
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        if {key: tuple(value.shape) for key, value in own.items()} != wanted:
            raise ConfigError(f"{path} holds a {name} of another shape than this run's. Delete it to begin anew, or name another folder.")
        module.load_state_dict(own)
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)
    progress: dict[str, Any] = json.loads(metadata["progress"])
    return progress
