"""LoRA adapters on the tiny models, and windows of sampling that go through them."""

from __future__ import annotations

from typing import Any

import torch
from tiny import Model, sample, sampler
from torch import Tensor, nn

from tokencache_compile import CacheConfig, CachePredictor, Schedule
from tokencache_compile.learn.lora import HardPass, HardStep, HardWindow, lora_targets, low_rank_updates
from tokencache_compile.passes.pipeline import analysed, steps_of

ROWS, NULL = 2, 1000  # NULL: the label that stands for "unconditional"
DIT_LINEARS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
PIXART_LINEARS = (*DIT_LINEARS, "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
CONFIG = CacheConfig(0.7, 1, "reuse", 1, "full_steps", "predictor", schedule=Schedule(3))


def names_of(layers: tuple[str, ...], *blocks: int) -> set[str]:
    return {f"transformer_blocks.{block}.{layer}" for block in blocks for layer in layers}


def draw_adapter(model: Model, std: float = 0.1) -> list[nn.Parameter]:
    """Give the adapter weights that matter: peft's own have B = 0."""
    weights = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=draw) * std)
    return weights


def shape_of(model: nn.Module) -> tuple[dict[str, int], dict[str, bool], set[str]]:
    """Which modules a model has, which parameters are trainable, which attributes stand on it."""
    modules = {name: id(module) for name, module in model.named_modules()}
    return modules, {name: parameter.requires_grad for name, parameter in model.named_parameters()}, set(vars(model))


class Hard:
    """A tiny model with a drawn adapter, its steps without and with it, and a window on both; with guidance on pairs of rows."""

    def __init__(self, config: CacheConfig, model: Model, predictor: CachePredictor | None = None, guidance: float = 1.0) -> None:
        self.config, self.model, self.scheduler, self.guidance = config, model, sampler(6), guidance
        self.labels = torch.tensor([3, 7])
        self.clean, self.noise = sample(ROWS, seed=21), sample(ROWS, seed=22)
        call = self.make_call(self.clean, self.scheduler.timesteps[0])
        self.front, self.predictor = analysed(model, call), predictor
        self.original = steps_of(*self.front, config, predictor)
        self.targets = lora_targets(model, self.original.program, self.original.plan.last_k)

    def make_call(self, x: Tensor, timestep: Tensor) -> dict[str, Any]:
        labels = self.labels
        if self.guidance != 1.0:
            x, labels = torch.cat([x, x]), torch.cat([labels, torch.full_like(labels, NULL)])
        # What the model's forward binds to, in its order.
        full = {"hidden_states": x, "timestep": timestep.expand(len(x)), "class_labels": labels}
        return {**full, "cross_attention_kwargs": None}

    def window(self) -> tuple[HardWindow, HardPass, list[nn.Parameter]]:
        """Within the adapter's context."""
        weights = draw_adapter(self.model)
        adapted = steps_of(*self.front, self.config, self.predictor, low_rank_updates(self.model, self.targets))
        window = HardWindow(self.model, self.original, adapted, self.scheduler, self.guidance)
        return window, HardPass(weights, adapted, self.guidance), weights

    def step(self, window: HardWindow, index: int) -> HardStep:
        return window.run(self.clean, self.noise, index, self.make_call, [torch.Generator() for _ in range(ROWS)])
