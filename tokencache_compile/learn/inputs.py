"""What the learning commands read: a model, its scheduler, and a file of samples with their conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tokencache_compile.errors import ConfigError
from tokencache_compile.sampling import Conditions

SAMPLE = "sample"
NULL_PREFIX = "null."


class TensorData:
    """Samples and conditions of a safetensors file; a dataset for :func:`train_predictor`.

    The file holds ``sample`` [n, C, …] (latents, or pixels for a model of pixels), one tensor [n, …] for every condition by the name of
    the model's argument, and for guidance ``null.<name>`` [1, …] with what stands for "unconditional".

    Raises:
        ConfigError: the file cannot be read, or its tensors do not belong together.
    """

    def __init__(self, path: Path) -> None:
        try:
            tensors = load_file(path)
        except Exception as error:
            raise ConfigError(f"{path} cannot be read as a safetensors file of samples: {error}") from error
        if SAMPLE not in tensors:
            raise ConfigError(f"{path} holds {sorted(tensors)}; a tensor called {SAMPLE!r} with the samples is needed.")
        self.samples = tensors.pop(SAMPLE)
        self.null: dict[str, Tensor] = {
            name.removeprefix(NULL_PREFIX): value for name, value in tensors.items() if name.startswith(NULL_PREFIX)
        }
        self.conditions = {name: value for name, value in tensors.items() if not name.startswith(NULL_PREFIX)}
        short = [f"{name} {tuple(value.shape)}" for name, value in self.conditions.items() if len(value) != len(self.samples)]
        if short:
            raise ConfigError(f"{path} holds {len(self.samples)} samples, and {', '.join(short)}; one row a sample is needed.")
        if self.null and set(self.null) != set(self.conditions):
            names = f"{sorted(self.null)} of the conditions {sorted(self.conditions)}"
            raise ConfigError(f"{path} has null tensors for {names}; give all or none.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.samples[index], {name: value[index] for name, value in self.conditions.items()}

    @property
    def null_row(self) -> dict[str, Tensor] | None:
        """The null conditions without batch axis, for label dropout."""
        return {name: value[0] for name, value in self.null.items()} or None

    def batch(self, start: int, count: int, guidance: float, seed: int) -> tuple[Tensor, Conditions]:
        """Noise for ``count`` samples from row ``start`` on, and their conditions."""
        rows = torch.arange(start, start + count) % len(self)
        draw = torch.Generator().manual_seed(seed + start)
        noise = torch.randn((count, *self.samples.shape[1:]), generator=draw)
        given = {name: value[rows] for name, value in self.conditions.items()}
        if guidance == 1.0:
            return noise, Conditions(given)
        return noise, Conditions(given, self.null or None, guidance)


def _find(target: Path, subfolder: str, name: str) -> Path:
    """``target/subfolder`` or ``target``, whichever has a file called ``name``."""
    for folder in (target / subfolder, target):
        if (folder / name).exists():
            return folder
    raise ConfigError(f"no {name} was found in {target} or {target / subfolder}. Name a folder that diffusers' save_pretrained wrote.")


def _class_of(config: Path) -> Any:
    import diffusers

    name = json.loads(config.read_text()).get("_class_name", "")
    found = getattr(diffusers, name, None)
    if found is None:
        raise ConfigError(f"{config} names the class {name!r}, which diffusers {diffusers.__version__} does not have.")
    return found


def load_model(target: Path) -> nn.Module:
    """The transformer of a pipeline's folder or a model's own, with its weights, in eval mode.

    Raises:
        ConfigError: there is none.
    """
    folder = _find(target, "transformer", "config.json")
    model: nn.Module = _class_of(folder / "config.json").from_pretrained(folder)
    return model.eval()


def load_scheduler(target: Path) -> Any:
    """The scheduler of a pipeline's folder or its own.

    Raises:
        ConfigError: there is none.
    """
    folder = _find(target, "scheduler", "scheduler_config.json")
    return _class_of(folder / "scheduler_config.json").from_pretrained(folder)
