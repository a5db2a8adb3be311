"""Peers as methods of the bench: cache-dit and diffusers' cache hooks, switched on as their users do.

    pip install --no-deps cache-dit==1.5.3

Both list Wan, and neither DiT or PixArt: what had to be done by hand for these is each method's ``note``. Latency is measured both as
torch.compile leaves them, graph breaks and all, and eager.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import CacheMixin, FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, WanTransformer3DModel
from diffusers.hooks import HookRegistry, apply_first_block_cache, apply_mag_cache, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

from tokencache_compile.evidence.methods import Method
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.sampling import sample

Net = Any
BACKENDS = ("inductor", "eager")
DBCACHE_NOTE = "DiT's epilogue reads transformer_blocks[0].norm1, which its wrapper was given"
HOOKS_NOTE = "applied by function and given a context by hand: the class is no CacheMixin"


def blocks_of(net: Net) -> nn.ModuleList:
    """The transformer blocks, by either of the names that diffusers gives them."""
    found: nn.ModuleList = net.blocks if isinstance(net, WanTransformer3DModel) else net.transformer_blocks
    return found


class Requests:
    """A peer's model in a sampling loop: its state is reset before the first of every ``steps`` calls, as its pipelines do."""

    def __init__(self, net: Net, steps: int, reset: Callable[[], object]) -> None:
        self.net, self.steps, self.reset, self.calls = net, steps, reset, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls % self.steps == 0:
            self.reset()
        self.calls += 1
        return self.net(*args, **kwargs)


def compiled(net: nn.Module, backend: str) -> nn.Module:
    """``net`` as torch.compile takes it, whatever breaks its graph; "cudagraphs" is its mode that takes the launches away."""
    if backend != "eager":
        net.compile(mode="reduce-overhead" if backend == "cudagraphs" else None)
    return net


def uncached_by_torch() -> Method:
    """The plain model under torch.compile, which peers build on: this package's own compiled steps have other CPU kernels."""
    return Method("uncached, torch.compile", "uncached, torch.compile", lambda net, _, backend: compiled(net, backend), backends=BACKENDS)


def cache_dit(name: str, family: str, subject: Subject, every: int | None, taylor: int, threshold: float = 0.08) -> Method:
    """DBCache whose first block is computed always, the others by a step mask or by the residual ``threshold``."""
    steps, listed = subject.steps, isinstance(subject.load(), CacheMixin)

    def start(net: nn.Module, _: Any, backend: str) -> Requests:
        import cache_dit as peer
        from cache_dit.caching.cache_blocks.pattern_3_4_5 import CachedBlocks_Pattern_3_4_5 as Wrapped

        if not listed:
            Wrapped.norm1 = property(lambda wrapped: wrapped.transformer_blocks[0].norm1)
        masked: dict[str, Any] = {}
        if every is not None:
            masked = {"steps_computation_mask": [int(i % every == 0) for i in range(steps)], "steps_computation_policy": "static"}
        config = peer.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0 if every else 3, residual_diff_threshold=threshold,
            num_inference_steps=steps, enable_separate_cfg=False, **masked,
        )  # fmt: skip
        pattern = peer.ForwardPattern.Pattern_2 if listed else peer.ForwardPattern.Pattern_3  # cache-dit's own for Wan, for DiT
        adapter = peer.BlockAdapter(transformer=net, blocks=blocks_of(net), forward_pattern=pattern, check_forward_pattern=False)
        calibrator = peer.TaylorSeerCalibratorConfig(taylorseer_order=taylor) if taylor else None
        peer.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
        return Requests(compiled(net, backend), steps, lambda: peer.refresh_context(net, num_inference_steps=steps))

    return Method(f"{family}: {name}", family, start, backends=BACKENDS, note="" if listed else DBCACHE_NOTE)


def hooked(name: str, family: str, subject: Subject, apply: Callable[[Net], None]) -> Method:
    """One of diffusers' cache hooks; ``apply`` puts it on."""
    steps, listed = subject.steps, isinstance(subject.load(), CacheMixin)

    def start(net: nn.Module, _: Any, backend: str) -> Requests:
        apply(net)

        def reset() -> None:
            HookRegistry.check_if_exists_or_initialize(net).reset_stateful_hooks()
            _set_cache_context(net, CacheContext("both branches"))

        return Requests(compiled(net, backend), steps, reset)

    return Method(f"{family}: {name}", family, start, backends=BACKENDS, note="" if listed else HOOKS_NOTE)


def taylorseer(subject: Subject, every: int, order: int) -> Method:
    """diffusers' TaylorSeer on attention and MLP."""
    config = TaylorSeerCacheConfig(
        cache_interval=every, disable_cache_before_step=1, max_order=order, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"(transformer_)?blocks\.\d+\.(attn1|attn2|ffn?)"],
    )  # fmt: skip
    return hooked(f"order {order}, every {every}", "diffusers TaylorSeer", subject, lambda net: apply_taylorseer_cache(net, config))


def mag_cache(subject: Subject, threshold: float) -> Method:
    """diffusers' MagCache, its ratios measured first on one sample, as its own calibration does."""

    def apply(net: Net) -> None:
        ratios = residual_ratios(subject)
        apply_mag_cache(net, MagCacheConfig(threshold=threshold, num_inference_steps=subject.steps, mag_ratios=ratios))

    return hooked(f"threshold {threshold:g}", "diffusers MagCache", subject, apply)


def residual_ratios(subject: Subject) -> list[float]:
    """MagCache's ratios: of the residual of all blocks to the step before's, the mean over tokens of the ratio of their lengths."""
    net: Net = subject.load()
    entered: list[Tensor] = []
    residuals: list[Tensor] = []
    blocks = blocks_of(net)
    blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))  # all models pass the tokens first
    blocks[-1].register_forward_hook(lambda _, args, output: residuals.append(output - entered[-1]))
    noise, conditions = subject.draw(0, 1)
    sample(net, subject.scheduler(), noise, subject.steps, conditions)
    lengths = [residual.float().norm(dim=-1) for residual in residuals]
    return [1.0, *(float((now / before).mean()) for before, now in itertools.pairwise(lengths))]


def peer_methods(subject: Subject) -> list[Method]:
    """All peers' rows."""
    found = [uncached_by_torch()]
    for every in (2, 3, 4, 5):
        found += [taylorseer(subject, every, order) for order in (1, 2)]
        for order in (1, 2):
            found.append(cache_dit(f"order {order}, every {every}", "cache-dit TaylorSeer", subject, every, order))
    for value in (0.05, 0.1, 0.2):
        found.append(cache_dit(f"held, threshold {value:g}", "cache-dit DBCache", subject, None, 0, value))
    for value in (0.05, 0.1, 0.2):
        config = FirstBlockCacheConfig(threshold=value)
        put_on = lambda net, config=config: apply_first_block_cache(net, config)  # noqa: E731
        found.append(hooked(f"threshold {value:g}", "diffusers FirstBlockCache", subject, put_on))
    found += [mag_cache(subject, value) for value in (0.06, 0.24)]
    return found
