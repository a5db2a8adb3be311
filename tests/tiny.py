"""Tiny models with random weights, their inputs, and a real sampling loop: what the tests run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

import tokencache_compile

Model = Any  # a diffusers transformer or a dispatcher; their attributes are not typed
Call = Callable[[int, Tensor, Tensor], Tensor]  # (step, sample, timesteps [B]) -> the model's output
ROWS, TOKENS, LAYERS, LAST_K = 4, 16, 4, 1
SETTINGS: dict[str, Any] = {
    "ratio": 0.9,
    "last_k": LAST_K,
    "context": "cached",
    "forecast": 2,
    "history": "full_steps",
    "scorer": "change",
    "backend": "eager",
}


def build(kind: str, layers: int = LAYERS, std: float | None = None, heads: int = 2, **changes: Any) -> Model:
    """A DiT or PixArt ("pixart", "pixart_masked", "pixart_added") in eval mode, 16 tokens, in which every block matters."""
    torch.manual_seed(0)
    common: dict[str, Any] = dict(
        num_attention_heads=heads, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=layers, sample_size=8, patch_size=2
    )
    model: Model
    if kind == "dit":
        model = DiTTransformer2DModel(**common | {"num_embeds_ada_norm": 1000} | changes)
    else:
        heads = common["num_attention_heads"] = 3 if kind == "pixart_added" else heads  # its embeddings split the width in three
        text = {"cross_attention_dim": 16 * heads, "caption_channels": 20, "use_additional_conditions": kind == "pixart_added"}
        model = PixArtTransformer2DModel(**common | text | changes)
    draw_weights(model, std or (0.2 if kind == "dit" else 0.1))
    return model.eval()


def draw_weights(model: nn.Module, std: float) -> None:
    """diffusers' own initialisation leaves the gates too small for the blocks to matter."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)


def conditions(kind: str, rows: int = ROWS, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Everything a call takes but the sample and the timestep: the same on every step of a run."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "dit":
        return {"class_labels": torch.randint(0, 1000, (rows,), generator=draw)}
    given: dict[str, Any] = {"encoder_hidden_states": torch.randn(rows, 7, 20, generator=draw).to(dtype)}
    if kind == "pixart_masked":
        lengths = torch.randint(1, 8, (rows, 1), generator=draw)
        given["encoder_attention_mask"] = (torch.arange(7) < lengths).long()
        given["attention_mask"] = (torch.arange(TOKENS) % 5 != 0).float().repeat(rows, 1)
    if kind == "pixart_added":
        ratios = torch.rand(rows, 1, generator=draw) + 0.5
        given["added_cond_kwargs"] = {"resolution": torch.full((rows, 2), 512.0, dtype=dtype), "aspect_ratio": ratios.to(dtype)}
    return given


def sample(rows: int = ROWS, seed: int = 2, dtype: torch.dtype = torch.float32, size: int = 8) -> Tensor:
    """Noise [rows, 4, size, size]."""
    return torch.randn(rows, 4, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(kind: str, rows: int = ROWS, seed: int = 1, dtype: torch.dtype = torch.float32, timestep: int = 500) -> dict[str, Any]:
    """The keyword arguments of one call."""
    given = conditions(kind, rows, seed, dtype)
    return {"hidden_states": sample(rows, seed + 1, dtype), "timestep": torch.full((rows,), timestep), **given}


def transformed(model: Model, **changes: Any) -> Model:
    """A dispatcher on the model with :data:`SETTINGS` and ``changes``, or with a ``config``."""
    settings: dict[str, Any] = {"backend": "eager"} if "config" in changes else dict(SETTINGS)
    if changes.get("predictor") is not None:
        settings.pop("scorer", None)
    return tokencache_compile.transform(model, **settings | changes)


def call_of(model: Model, given: dict[str, Any]) -> Call:
    """One evaluation of ``model`` with the conditions ``given``, as a sampler calls it."""

    def call(_: int, x: Tensor, timesteps: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(hidden_states=x, timestep=timesteps, **given, return_dict=False)[0]
        return out

    return call


def sampler(steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    return scheduler


def ddim(call: Call, noise: Tensor, steps: int = 20, scheduler: Any = None, start: int = 0) -> list[Tensor]:
    """A DDIM run in which the model's own output makes the next input. Returns the model's output at every step.

    The first four output channels are the noise (the others a variance that DDIM does not use).
    """
    scheduler = scheduler or sampler(steps)
    x, outputs = noise, []
    for step, t in enumerate(scheduler.timesteps[start:]):
        outputs.append(call(step, x, t.expand(x.shape[0])))
        x = scheduler.step(outputs[-1][:, :4], t, x).prev_sample
    return [*outputs, x]


def run(model: Model, kind: str, steps: int = 20, rows: int = ROWS, seed: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A whole DDIM run of ``model``: its output at every step, and the sample it ends with."""
    return ddim(call_of(model, conditions(kind, rows, dtype=dtype)), sample(rows, seed, dtype), steps)


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two runs agree bit for bit, and are finite."""
    return len(first) == len(second) and all(bool(a.isfinite().all()) and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@contextmanager
def parameters_unchanged(model: nn.Module) -> Iterator[None]:
    """The parameters are the same objects with the same values afterwards."""
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    yield
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name] is parameter and torch.equal(parameter, value), name
