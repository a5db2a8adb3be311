"""What both phases of training share: settings, batches drawn from (seed, step), where a run stands, and its progress bar.

Everything random in an optimizer step is drawn from (seed, step) for the global batch, and each process takes its share: a
resumed run repeats the uninterrupted one, and several processes the single one.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from tokencache_compile.errors import ConfigError, InputError
from tokencache_compile.learn.window import MakeCall, history_of
from tokencache_compile.plan import CacheConfig
from tokencache_compile.schedule import is_ints

CHECKPOINT = "checkpoint.safetensors"


class Data(Protocol):
    """A map-style dataset: item → (sample x_0 [C, …], the model's conditions by argument name, one row without batch axis)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]: ...


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters; the defaults are the paper's where it names them.

    Attributes:
        steps: optimizer steps.
        batch: samples a step, over all processes.
        lr: learning rate of AdamW (betas 0.9, 0.999).
        cost_weight: λ of Eq. 9. None has no cost term: every block's gates are shifted to the mean 1 − ratio, so that the budget
            holds from the first step, and every step counts alike. λ's right scale follows the error of what is reused, which
            differs by orders of magnitude between models, and between the steps of one run.
        label_dropout: share of samples that see the null conditions, in all passes of a step alike.
        guidance: weight of classifier-free guidance of the deployment. 1 trains as the paper does, on single rows. Else every sample
            is a pair of rows, conditional and null, and the loss is on the guided output; ``label_dropout`` is 0 then.
        sampling_steps: of the deployment's solver, whose respaced grid the windows run on.
        ema_decay: of an average of the predictor's weights, which is what is returned; None returns the last ones.
        mixed_precision: accelerate's: "no", "bf16" or "fp16".
        checkpoint_every: optimizer steps between checkpoints.
        seed: of data order, noise, dropped labels and window positions.
    """

    steps: int = 40_000
    batch: int = 32
    lr: float = 1e-5
    cost_weight: float | None = 1e-4
    label_dropout: float = 0.1
    guidance: float = 1.0
    sampling_steps: int = 50
    ema_decay: float | None = None
    mixed_precision: str = "no"
    checkpoint_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "sampling_steps", "checkpoint_every"):
            value = getattr(self, name)
            if not is_ints((value,)) or value < 1:
                raise ConfigError(f"{name}={value!r} was asked for; it is a whole number, 1 or more.")
        if not is_ints((self.seed,)) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} was asked for; it is a whole number, 0 or more.")
        if not 0.0 < self.lr < math.inf:
            raise ConfigError(f"lr={self.lr} was asked for; a learning rate is above 0.")
        if self.cost_weight is not None and not 0.0 <= self.cost_weight < math.inf:
            raise ConfigError(f"cost_weight={self.cost_weight} was asked for; λ is 0 or more, or None to hold the budget instead.")
        if not 0.0 <= self.label_dropout <= 1.0:
            raise ConfigError(f"label_dropout={self.label_dropout} was asked for; it is a share in [0, 1].")
        if self.guidance != 1.0 and self.label_dropout:
            raise ConfigError(
                f"guidance={self.guidance} and label_dropout={self.label_dropout} were asked for; half the rows of a guided run are the "
                "null conditions already. Set label_dropout=0."
            )
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"ema_decay={self.ema_decay} was asked for; it is in [0, 1), or None for the last weights.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ConfigError(f"mixed_precision={self.mixed_precision!r} was asked for; it is 'no', 'bf16' or 'fp16'.")


class Batches:
    """What step ``i`` of the run sees, drawn from (seed, i)."""

    def __init__(
        self, data: Data, null: Mapping[str, Tensor] | None, training: TrainingConfig, p_steps: Sequence[int], share: int, shares: int
    ) -> None:
        self.data, self.null, self.training, self.p_steps = data, null, training, p_steps
        self.rows = slice(share * training.batch // shares, (share + 1) * training.batch // shares)
        if not len(data):
            raise InputError("the data is empty; training needs samples.")
        self.shapes = _shapes(data[0])
        unknown = sorted({*(null or {})} - self.shapes.keys())
        if unknown:
            raise InputError(f"null conditions {unknown} were given, and the data's items have {self.shapes}; null them by these names.")

    def draw(self, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor], int, list[torch.Generator]]:
        """Samples, noise, conditions (some of them null), the P-step, and a generator a row for a stochastic solver."""
        generator = generator_of(self.training.seed, step)
        picked = torch.randint(len(self.data), (self.training.batch,), generator=generator)
        p_step = self.p_steps[int(torch.randint(len(self.p_steps), (), generator=generator))]
        dropped = (torch.rand(self.training.batch, generator=generator) < self.training.label_dropout)[self.rows]
        items = [self._item(int(index)) for index in picked[self.rows]]
        clean = torch.stack([sample for sample, _ in items])
        noise = torch.randn((self.training.batch, *clean.shape[1:]), generator=generator)[self.rows]
        conditions = {name: torch.stack([given[name] for _, given in items]) for name in items[0][1]}
        for name, value in (self.null or {}).items():
            shape = (-1,) + (1,) * (conditions[name].dim() - 1)
            conditions[name] = torch.where(dropped.view(shape), value, conditions[name])
        rows = range(self.rows.start, self.rows.stop)
        return clean, noise, conditions, p_step, [generator_of(self.training.seed, step, 1 + row) for row in rows]

    def _item(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        item = self.data[index]
        if _shapes(item) != self.shapes:
            raise InputError(f"item {index} of the data has {_shapes(item)}, and item 0 has {self.shapes}; one batch needs equal shapes.")
        return item


def _shapes(item: tuple[Tensor, Mapping[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    sample, conditions = item
    return {"sample": tuple(sample.shape)} | {name: tuple(value.shape) for name, value in conditions.items()}


def generator_of(*key: int) -> torch.Generator:
    """A generator of its own for every key. torch seeds it with 32 bits, of which hashing uses all."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def check_run(
    model: nn.Module, config: CacheConfig, training: TrainingConfig, null: Mapping[str, Tensor] | None, accelerator: Any
) -> list[int]:
    """The P-steps there are to learn from.

    Raises:
        ConfigError: the batch cannot be shared among the processes, null conditions are missing, the model is in training mode,
            not in float32 or not on the device of ``accelerator``, there is no P-step.
    """
    shares, name = accelerator.num_processes, type(model).__name__
    if training.batch % shares:
        raise ConfigError(f"batch={training.batch} was asked for on {shares} processes; it must be a multiple of them.")
    if null is None and training.label_dropout:
        raise ConfigError(f"label_dropout={training.label_dropout} was asked for without null conditions; pass null=, or label_dropout=0.")
    if null is None and training.guidance != 1.0:
        raise ConfigError(f"guidance={training.guidance} was asked for without null conditions; pass null=, or guidance=1.")
    if model.training:
        raise ConfigError(f"{name} is in training mode, where it is random (dropped labels). Call model.eval() first.")
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes != {torch.float32}:
        raise ConfigError(
            f"{name} has weights of {sorted(map(str, dtypes))}, where the small steps of training are lost. "
            'Load it in float32; mixed_precision="bf16" computes in bfloat16.'
        )
    device = torch.empty(0, device=accelerator.device).device  # with the index that "cuda" leaves out
    found = {p.device for p in model.parameters()}
    if found != {device}:
        where = ", ".join(sorted(map(str, found)))
        raise ConfigError(f"{name} is on {where}, and the run on {device}. Call model.to({str(device)!r}) first.")
    steps, schedule = training.sampling_steps, config.schedule_of(training.sampling_steps)
    p_steps = [i for i in range(steps) if not schedule.is_full(i) and history_of(config, i, steps)]
    if not p_steps:
        raise ConfigError(f"the schedule ({schedule}) has no P-step among {training.sampling_steps} steps; nothing can be learned.")
    return p_steps


class Feed:
    """The batches of a run as calls of ``model`` on ``device``, and the deployment's solver with its timesteps set."""

    def __init__(self, model: nn.Module, batches: Batches, scheduler: Any, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(batches.training.sampling_steps, device=device)
        self._sample_name = next(iter(inspect.signature(model.forward).parameters))

    def batch(self, step: int) -> tuple[Tensor, Tensor, MakeCall, int, list[torch.Generator]]:
        """What optimizer step ``step`` sees: samples, noise, how to call the model on them, the P-step, and a solver's generators."""
        clean, noise, conditions, p_step, generators = self.batches.draw(step)
        given = {name: value.to(self.device) for name, value in conditions.items()}
        pairs = self.batches.training.guidance != 1.0
        if pairs:
            null = self.batches.null or {}
            given = {name: torch.cat([value, null.get(name, value).to(value).expand_as(value)]) for name, value in given.items()}

        def make_call(x: Tensor, timestep: Tensor) -> dict[str, Any]:
            rows = torch.cat([x, x]) if pairs else x
            return {self._sample_name: rows, "timestep": timestep.expand(len(rows)), **given}

        return clean.to(self.device), noise.to(self.device), make_call, p_step, generators

    def first_call(self) -> Mapping[str, Any]:
        """A call of the model as the run will make them: what it is captured with."""
        clean, _, make_call, _, _ = self.batch(0)
        return make_call(clean, self.scheduler.timesteps[0])


@dataclass
class RunState:
    """Where a run stands: optimizer steps done, and which run it is."""

    step: int
    identity: str

    @classmethod
    def resumed(cls, saved: dict[str, Any], fresh: RunState, path: Path) -> RunState:
        if saved["identity"] != fresh.identity:
            raise ConfigError(
                f"{path} is the checkpoint of another run:\n  {saved['identity']}\nwas saved, and asked for is\n  {fresh.identity}\n"
                "Name another folder, or delete it."
            )
        return cls(**saved)


def identity(config: CacheConfig, training: TrainingConfig, **more: Any) -> str:
    """What must agree between a checkpoint and the run that resumes it; more steps may be asked for."""
    settings = {**asdict(training), "steps": None, "checkpoint_every": None}
    return json.dumps({"config": asdict(config), "training": settings, **more}, sort_keys=True)


def open_log(out: Path, done: int, accelerator: Any) -> TextIO:
    """``log.jsonl`` in ``out``, to append to after ``done`` steps: what a killed run logged after its checkpoint runs again."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "log.jsonl"
    if accelerator.is_main_process and path.exists():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:done]))
    return path.open("a")


def progress(shown: bool, *columns: str) -> Progress:
    """A progress bar that ends in text ``columns``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *map(TextColumn, columns),
        disable=not shown,
    )
