"""A plain diffusion sampling loop with classifier-free guidance, for a model itself and for its transformed self alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tokencache_compile.errors import InputError

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Conditions:
    """What the images of one batch are conditioned on.

    Attributes:
        given: keyword arguments of the model besides sample and timestep, tensors (or mappings of them) with one row an image.
        null: the same arguments for "unconditional", with one row or one an image; None samples without guidance.
        guidance: weight w of uncond + w · (cond − uncond).
    """

    given: Mapping[str, Any]
    null: Mapping[str, Any] | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.null is not None and set(self.null) != set(self.given):
            raise InputError(
                f"conditions {sorted(self.given)} and null conditions {sorted(self.null)} were given; they need one set of names."
            )
        if self.null is None and self.guidance != 1.0:
            raise InputError(f"guidance={self.guidance} was asked for without null conditions; pass null=, or guidance=1.0.")

    @classmethod
    def of_labels(cls, labels: Tensor, null_label: int, guidance: float) -> Conditions:
        """Class labels [B] of a class-conditional model, guided."""
        return cls({"class_labels": labels}, {"class_labels": torch.full_like(labels, null_label)}, guidance)

    @property
    def rows(self) -> Mapping[str, Any]:
        """The model's arguments for one call: the conditional rows first, then with guidance the unconditional ones."""
        if self.null is None:
            return self.given

        def both(given: Tensor, null: Tensor) -> Tensor:
            return torch.cat([given, null.expand(len(given), *null.shape[1:])])

        null = {name: self.null[name] for name in self.given}  # in the same order
        joined: Mapping[str, Any] = pytree.tree_map(both, dict(self.given), null)
        return joined


def guided(output: Tensor, guidance: float) -> Tensor:
    """uncond + w · (cond − uncond) of an output [2B, …] whose rows are the conditional ones, then the unconditional."""
    conditional, unconditional = output.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What a sampler draws within, besides its first noise, comes from ``seed``, so that runs can be compared; torch's own generators
    go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def sample(transformer: Any, scheduler: Any, noise: Tensor, steps: int, conditions: Conditions, on_step: OnStep | None = None) -> Tensor:
    """One image for each row of ``noise``; a step is one forward, with guidance of 2B rows.

    Args:
        transformer: a diffusers transformer whose first argument is the sample and that takes ``timestep``, or a Dispatcher
            of one. Output channels beyond the image's own (a learned variance) are left aside.
        scheduler: a diffusers scheduler. ``set_timesteps`` is called here, so a dispatcher that was given this scheduler
            sees exactly where the request begins. ``on_step`` needs one with ``pred_original_sample``, such as DDIMScheduler.
        noise: standard normal, [B, C, ...].
        on_step: called after every step with its index and its prediction of the final images, [B, C, ...].

    Returns:
        The images [B, C, ...] as the sampler leaves them, not clamped.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    images: Tensor = noise * scheduler.init_noise_sigma
    rows_given = conditions.rows
    with torch.no_grad():
        for index, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(images, timestep)
            rows = scaled if conditions.null is None else torch.cat([scaled, scaled])
            predicted = transformer(rows, timestep=timestep.expand(len(rows)), **rows_given, return_dict=False)[0][:, : noise.shape[1]]
            if conditions.null is not None:
                predicted = guided(predicted, conditions.guidance)
            result = scheduler.step(predicted, timestep, images)
            images = result.prev_sample
            if on_step is not None:
                on_step(index, result.pred_original_sample)
    return images
