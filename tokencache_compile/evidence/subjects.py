"""Subjects of ``tokencache bench``: the shipped reference DiT, and any saved model with a file of conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencache_compile.demo import DEFAULT_MODEL, SCHEDULER_CONFIG, load_reference
from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.learn.inputs import TensorData, load_model, load_scheduler
from tokencache_compile.sampling import Conditions

SAMPLES_OF_A_SEED = 1_000_000  # torch's generator on the CPU takes 32 bits of a seed, so seed and number share them


def drawn_from(noise: Tensor, conditions: Conditions, device: str) -> Callable[[int, int], tuple[Tensor, Conditions]]:
    """Slices of one set of noises and conditions, so that neither depends on how many are drawn together."""

    def draw(start: int, count: int) -> tuple[Tensor, Conditions]:
        rows = slice(start, start + count)
        given = {name: value[rows].to(device) for name, value in conditions.given.items()}
        null = conditions.null
        if null is not None:
            null = {name: (value[rows] if len(value) == len(noise) else value).to(device) for name, value in null.items()}
        return noise[rows].to(device), Conditions(given, null, conditions.guidance)

    return draw


def noise_of(seed: int, start: int, count: int, shape: Sequence[int]) -> Tensor:
    """Noise [count, *shape] of the samples from number ``start`` on, each from a generator of its own; a million for a seed."""
    generators = [torch.Generator().manual_seed(SAMPLES_OF_A_SEED * seed + start + i) for i in range(count)]
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def reference_subject(samples: int, steps: int, guidance: float, seed: int, device: str = "cpu", **more: Any) -> Subject:
    """The shipped DiT, its classes in turn, guided DDIM; ``more`` goes to :class:`Subject`, such as ``judges``."""
    from diffusers import DDIMScheduler

    def load() -> nn.Module:
        net: nn.Module = load_reference(DEFAULT_MODEL).to(device)
        return net

    config: Any = load().config
    shape = (samples, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(samples) % config.num_embeds_ada_norm
    conditions = (
        Conditions({"class_labels": labels}) if guidance == 1.0 else Conditions.of_labels(labels, config.num_embeds_ada_norm, guidance)
    )
    settings = {"sampler": "DDIM", "guidance": guidance, "seed": seed, "device": device}
    draw = drawn_from(noise, conditions, device)
    return Subject("reference DiT", load, lambda: DDIMScheduler(**SCHEDULER_CONFIG), draw, steps, settings=settings, **more)


def saved_subject(
    model: Path, data: Path | None, scheduler: Path | None, samples: int, steps: int, guidance: float, seed: int, device: str
) -> Subject:
    """A model that ``save_pretrained`` wrote, with the conditions of ``data``.

    Raises:
        ConfigError: there is no data, or no such model, scheduler or file.
    """
    from diffusers import DDIMScheduler

    if data is None:
        raise ConfigError("no data was given; name a safetensors file of samples and conditions with --data (see docs/learning.md).")
    noise, conditions = TensorData(data).batch(0, samples, guidance, seed)
    place = scheduler or model
    settings = {"sampler": type(load_scheduler(place)).__name__, "guidance": guidance, "seed": seed, "device": device, "data": data.name}
    return Subject(
        model.name,
        lambda: load_model(model).to(device),
        lambda: load_scheduler(place),
        drawn_from(noise, conditions, device),
        steps,
        pixels=noise.shape[1] in (1, 3),
        predicts_x0=isinstance(load_scheduler(place), DDIMScheduler),
        settings=settings,
    )
