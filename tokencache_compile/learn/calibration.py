"""Calibration: what the predictor says along full sampling runs, and the keep counts and schedules that follow (SPEC 4 and 5).

    full runs ─calibrate─▶ Calibration ─save / load─▶ file ─to_config─▶ CacheConfig
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tokencache_compile.errors import ConfigError, InputError
from tokencache_compile.ir import Block
from tokencache_compile.learn.keep_counts import Profiles, group_profiles, marked_share
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.plan import CacheConfig, resolve_plan
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.sampling import Conditions, guided
from tokencache_compile.schedule import Schedule, is_ints

FORMAT = 1
Batches = Iterable[tuple[Tensor, Conditions]]
OnIndex = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured along full runs of one model with its predictor.

    Attributes:
        steps: T, model calls of a run.
        samples: images it was measured on.
        ratio: share of tokens that is not recomputed, for which ``share`` holds.
        last_k: K, last blocks that are never cached.
        alpha: [T, L] float64, mean α over all rows (both guidance halves) and tokens.
        share: [T, L − K] float64, Eq. 12's share of marked tokens, mean over batches weighted by their size.
        examples: [n, T, L, N] float16, α of the first n images (conditional rows).
        images: [n, C, …] float32, those images as the sampler leaves them.
    """

    steps: int
    samples: int
    ratio: float
    last_k: int
    alpha: Tensor
    share: Tensor
    examples: Tensor
    images: Tensor

    def __post_init__(self) -> None:
        CacheConfig(ratio=self.ratio, last_k=self.last_k)
        if not is_ints((self.steps, self.samples, self.last_k)) or min(self.steps, self.samples) < 1:
            raise ConfigError(f"steps={self.steps!r}, samples={self.samples!r} and last_k={self.last_k!r} were given; counts are needed.")
        alpha, share, examples, images = (tuple(t.shape) for t in (self.alpha, self.share, self.examples, self.images))
        blocks = alpha[-1] if alpha else 0
        fits = alpha == (self.steps, blocks) and blocks > self.last_k and share == (self.steps, blocks - self.last_k)
        if not fits or len(examples) != 4 or examples[1:3] != alpha or len(images) < 2 or images[0] != examples[0]:
            raise ConfigError(
                f"alpha {alpha}, share {share}, examples {examples} and images {images} were given; [T, L], [T, L-K], [n, T, L, N] and "
                f"[n, C, …] with T = {self.steps} and K = {self.last_k} are needed."
            )
        if not bool(self.alpha.isfinite().all() and self.share.isfinite().all()):
            raise ConfigError("alpha or share holds NaN or infinity; check the predictor's weights and calibrate again.")

    @property
    def mean_alpha(self) -> Tensor:
        """ᾱ [T] of Eq. 13: mean α over samples, tokens and the cached blocks (the last K are never gated, theirs means nothing)."""
        return self.alpha[:, : self.share.shape[1]].mean(1)

    def keep(
        self, tokens: int, groups: int = 1, multiple: int = 1, p_steps: Sequence[int] | None = None
    ) -> tuple[Profiles, tuple[int, ...]]:
        """Keep profiles and the profile of every step for ``p_steps`` (None: all steps); see :func:`group_profiles`."""
        steps = range(self.steps) if p_steps is None else p_steps
        return group_profiles(self.share, steps, tokens, self.ratio, groups, multiple)

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name).contiguous().cpu() for name in _TENSORS}
        header = {"format": FORMAT} | {name: getattr(self, name) for name in _NUMBERS}
        side = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, side, metadata={"calibration": json.dumps(header)})
            os.replace(side, path)
        finally:
            side.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: there is no such file, it is not a calibration, of another format version, or incomplete.
        """
        if not path.is_file():
            raise ConfigError(f"a calibration at {path} was asked for; there is no such file.")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("calibration", "null"))
                tensors = {name: file.get_tensor(name) for name in _TENSORS if name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} is not a readable calibration: {error}. Calibrate again.") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            found = header.get("format") if isinstance(header, dict) else None
            raise ConfigError(f"{path} has calibration format {found!r}, and format {FORMAT} is needed. Calibrate again.")
        missing = [name for name in (*_NUMBERS, *_TENSORS) if name not in header and name not in tensors]
        if missing:
            raise ConfigError(f"{path} lacks {', '.join(missing)}. Calibrate again.")
        return cls(**{name: header[name] for name in _NUMBERS}, **tensors)


_NUMBERS = ("steps", "samples", "ratio", "last_k")
_TENSORS = ("alpha", "share", "examples", "images")


@dataclass(frozen=True)
class GuidedCall:
    """The model's calls along one run: arguments for all rows, and classifier-free guidance of what comes out."""

    model: nn.Module
    conditions: Conditions

    def kwargs(self, images: Tensor, timestep: Tensor) -> dict[str, Any]:
        """The call's keyword arguments for scaled ``images`` [B, C, …]: B rows, with guidance 2B, conditional ones first."""
        rows = images if self.conditions.null is None else torch.cat([images, images])
        sample = next(iter(inspect.signature(self.model.forward).parameters))
        return {sample: rows, "timestep": timestep.expand(len(rows)), **self.conditions.rows}

    def guided(self, output: Tensor, images: Tensor) -> Tensor:
        """What the scheduler takes [B, C, …], of the model's output for all rows; a learned variance is left aside."""
        predicted = output[:, : images.shape[1]]
        return predicted if self.conditions.null is None else guided(predicted, self.conditions.guidance)


class _Stacks:
    """A :class:`BlockStack` of the model for every batch shape that comes, checked against the predictor."""

    def __init__(self, model: nn.Module, predictor: CachePredictor) -> None:
        self.model, self.predictor = model, predictor
        self._known: dict[Hashable, BlockStack] = {}

    def of(self, kwargs: Mapping[str, Any]) -> BlockStack:
        signature = tuple((t.shape, t.dtype) for t in pytree.tree_leaves(kwargs) if isinstance(t, Tensor))
        if signature not in self._known:
            stack = BlockStack(self.model, kwargs)
            first = stack.program.blocks[0]
            names = stack.program.body_of(first).weight_names
            shapes = {name: tuple(stack.program.tensors[f"{first.fqn}.{name}"].shape) for name in names}
            self.predictor.check_fits(stack.program.known_stream.channels, stack.num_blocks, shapes)
            self._known[signature] = stack
        return self._known[signature]


def full_pass(stack: BlockStack, predictor: CachePredictor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """One uncached forward pass: the model's output, and the predictor's α [rows, L, N] for it (float32)."""
    first: list[Tensor] = []

    def visit(block: Block, inputs: list[Tensor]) -> Tensor:
        if not first:
            first.extend(inputs)
        return stack.compute(block, inputs)

    output = stack.run(kwargs, visit)
    return output, stack.scores(predictor, first).float()


def check_run(model: nn.Module, noise: Tensor, conditions: Conditions) -> None:
    """Raise an InputError where the model would be random or noise and conditions have different rows."""
    if model.training:
        raise InputError(f"{type(model).__name__} is in training mode, where it is random (dropout). Call model.eval() first.")
    rows = {name: len(leaf) for name, value in conditions.given.items() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
    if any(count != len(noise) for count in rows.values()):
        raise InputError(f"noise of {len(noise)} images and conditions of {rows} rows were given; one row an image is needed.")


def calibrate(
    model: nn.Module,
    predictor: CachePredictor,
    scheduler: Any,
    batches: Batches,
    steps: int,
    ratio: float = 0.9,
    last_k: int = 0,
    examples: int = 4,
    on_step: OnIndex | None = None,
) -> Calibration:
    """Run the uncached model over ``batches`` and gather what its predictor scores at every step.

    Nothing that grows with the number of samples is kept.

    Args:
        model: in eval mode.
        predictor: on the model's device.
        scheduler: a diffusers scheduler; ``set_timesteps`` is called on it for every batch.
        batches: pairs of standard normal noise [B, C, …] and what its images are conditioned on. Eq. 12 marks tokens batch by
            batch, so these should be of the size that will be sampled, or larger.
        steps: sampling steps.
        ratio: share of the cached blocks' tokens that P-steps will not recompute.
        last_k: blocks that will not be cached, as in :class:`CacheConfig`.
        examples: images to keep α maps of.
        on_step: called after every step with its running number over all batches.

    Raises:
        ConfigError: no batch was given, a setting is out of range, or the predictor was made for another model.
        InputError: the model is in training mode, or a batch does not fit.
        UnsupportedModelError: as at a transformed model's first call.
    """
    if not is_ints((steps, examples)) or steps < 1 or examples < 0:
        raise ConfigError(f"steps={steps!r} and examples={examples!r} were asked for; at least 1 step and 0 examples are needed.")
    config = CacheConfig(ratio=ratio, last_k=last_k)
    stacks = _Stacks(model, predictor)
    alpha_sum, share_sum, samples, done = torch.zeros(()), torch.zeros(()), 0, 0
    maps: list[Tensor] = []
    finals: list[Tensor] = []
    for noise, conditions in batches:
        check_run(model, noise, conditions)
        wanted = min(examples - sum(map(len, maps)), len(noise))
        call = GuidedCall(model, conditions)
        scheduler.set_timesteps(steps, device=noise.device)
        images: Tensor = noise * scheduler.init_noise_sigma
        alphas, shares, seen = [], [], []
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                kwargs = call.kwargs(scheduler.scale_model_input(images, timestep), timestep)
                stack = stacks.of(kwargs)
                stream = stack.program.known_stream
                resolve_plan(config, stack.num_blocks, stream.tokens, False, stream.batch)  # refuses a last_k that leaves no block
                output, alpha = full_pass(stack, predictor, kwargs)
                alphas.append(alpha.double().mean((0, 2)).cpu())
                shares.append(marked_share(alpha[:, : stack.num_blocks - last_k], ratio))
                seen.append(alpha[:wanted].half().cpu())
                images = scheduler.step(call.guided(output, images), timestep, images).prev_sample
                if on_step is not None:
                    on_step(done)
                done += 1
        alpha_sum = alpha_sum + len(noise) * torch.stack(alphas)
        share_sum = share_sum + len(noise) * torch.stack(shares)
        samples += len(noise)
        maps.append(torch.stack(seen, 1))
        finals.append(images[:wanted].float().cpu())
    if not samples:
        raise ConfigError("a calibration without batches was asked for; give one or more pairs of noise and conditions.")
    mean_alpha, mean_share = alpha_sum / samples, share_sum / samples
    return Calibration(len(mean_alpha), samples, float(ratio), last_k, mean_alpha, mean_share, torch.cat(maps), torch.cat(finals))


def to_config(
    calibration: Calibration, base: CacheConfig, schedule: Schedule, tokens: int, groups: int = 1, multiple: int = 1
) -> CacheConfig:
    """``base`` with the predictor as scorer, this schedule, and the calibrated keep counts for its P-steps.

    Args:
        tokens: N of the model that will run.
        groups: at most so many keep profiles, each one more compiled graph.
        multiple: keep counts are multiples of it.

    Raises:
        ConfigError: ``base`` asks for another ratio or ``last_k`` than was calibrated, the schedule leaves no P-step, or as in
            :func:`group_profiles`.
    """
    if base.ratio != calibration.ratio or base.last_k != calibration.last_k:
        raise ConfigError(
            f"ratio={base.ratio} and last_k={base.last_k} were asked for, and the calibration was made for ratio={calibration.ratio} and "
            f"last_k={calibration.last_k}; ask for those, or calibrate again."
        )
    p_steps = [step for step in range(calibration.steps) if not schedule.is_full(step)]
    if not p_steps:
        raise ConfigError(f"schedule {schedule} was asked for; all its {calibration.steps} steps run in full, so there is nothing to keep.")
    profiles, group_of_step = calibration.keep(tokens, groups, multiple, p_steps)
    return replace(base, scorer="predictor", schedule=schedule, keep=profiles, groups=group_of_step)
