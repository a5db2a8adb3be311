"""What the sampler's kind decides where nothing is asked for."""

from __future__ import annotations

from typing import Any

from tokencache_compile.plan import CacheConfig

# diffusers' schedulers that add fresh noise at every step, whatever their settings
_ADD_NOISE = frozenset({
    "CosineDPMSolverMultistepScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DDPMWuerstchenScheduler", "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LTXEulerAncestralRFScheduler",
})  # fmt: skip


def adds_noise(scheduler: Any) -> bool:
    """Whether every step of ``scheduler`` (diffusers', or None) adds fresh noise: DDPM, ancestral and SDE samplers.

    A block's update then follows no smooth path from one I-step to the next, and what extrapolates it extrapolates the noise.
    """
    config = getattr(scheduler, "config", None) or {}
    by_setting = str(config.get("algorithm_type", "")).startswith("sde") or bool(config.get("stochastic_sampling", False))
    return by_setting or type(scheduler).__name__ in _ADD_NOISE


def default_config(scheduler: Any) -> CacheConfig:
    """The settings of a run with ``scheduler`` where none is asked for: an update that holds fresh noise is held, not extrapolated."""
    return CacheConfig(forecast=0) if adds_noise(scheduler) else CacheConfig()
