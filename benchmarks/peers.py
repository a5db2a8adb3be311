"""Peers on the reference DiT, in the same run: cache-dit and diffusers' cache hooks beside this project, by deviation and MACs.

    pip install --no-deps cache-dit==1.5.3
    python benchmarks/peers.py --out benchmarks/results/peers.json

Every row is one guided 50-step DDIM run of the same noises, eager: PSNR and MSE of the final images and the mean |Δ pred_x0| over the
steps to the uncached run, and the MACs that ran, counted as they ran. Each method is switched on as its users do; what had to be done
beside that, as neither peer lists the model, is the row's ``note``. A method that fails is a row that says so. Rows are kept as they
come, so a stopped run goes on. Latency is not measured.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig, apply_first_block_cache, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from judge_reference import machine
from rich.progress import track
from torch import Tensor
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

import tokencache_compile as tc
from tokencache_compile.macs import MacCounter
from tokencache_compile.metrics import deviation_per_step, psnr
from tokencache_compile.sampling import Conditions, sample

STEPS, GUIDANCE, SEED = 50, 2.5, 1234
MODEL = Path("tokencache_compile/reference/dit")
Net = Any


@dataclass(frozen=True)
class Method:
    """One method at one setting: ``start`` makes a fresh model run it, ``note`` is what users would not have to do elsewhere."""

    name: str
    start: Callable[[Net, DDIMScheduler], Net]
    note: str = ""
    steps: int = STEPS


def fewer(steps: int) -> Method:
    """The plain sampler."""
    return Method(f"fewer steps: {steps}", lambda net, _: net, steps=steps)


def ours(name: str, **settings: Any) -> Method:
    return Method(f"ours: {name}", lambda net, scheduler: tc.transform(net, backend="eager", scheduler=scheduler, **settings))


def cache_dit(name: str, every: int | None, taylor: int, threshold: float = 0.08, blocks: int = 1) -> Method:
    """cache-dit's DBCache with its first ``blocks`` blocks computed always: by a step mask, or by the residual ``threshold``."""

    def start(net: Net, _: DDIMScheduler) -> Net:
        import cache_dit as peer
        from cache_dit.caching.cache_blocks.pattern_3_4_5 import CachedBlocks_Pattern_3_4_5 as Wrapped

        Wrapped.norm1 = property(lambda wrapped: wrapped.transformer_blocks[0].norm1)
        masked = {} if every is None else {"steps_computation_mask": [int(i % every == 0) for i in range(STEPS)]}
        if every is not None:
            masked["steps_computation_policy"] = "static"
        config = peer.DBCacheConfig(
            Fn_compute_blocks=blocks, Bn_compute_blocks=0, max_warmup_steps=0 if every else 3, residual_diff_threshold=threshold,
            num_inference_steps=STEPS, enable_separate_cfg=False, **masked,
        )  # fmt: skip
        pattern = peer.ForwardPattern.Pattern_3
        adapter = peer.BlockAdapter(transformer=net, blocks=net.transformer_blocks, forward_pattern=pattern, check_forward_pattern=False)
        calibrator = peer.TaylorSeerCalibratorConfig(taylorseer_order=taylor) if taylor else None
        peer.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
        return net

    return Method(f"cache-dit: {name}", start, "DiT's epilogue reads transformer_blocks[0].norm1, which its wrapper was given")


def hooked(name: str, apply: Callable[[Net, Any], None], config: Any) -> Method:
    """One of diffusers' cache hooks."""

    def start(net: Net, _: DDIMScheduler) -> Net:
        apply(net, config)
        _set_cache_context(net, CacheContext("both branches"))
        return net

    return Method(f"diffusers: {name}", start, "applied by function and given a context by hand: the class is no CacheMixin")


def methods() -> list[Method]:
    """All rows, in their order."""
    found = [fewer(steps) for steps in (12, 13, 16, 17, 20, 25, 26)]
    for every in (4, 3, 2):
        schedule = tc.Schedule(every=every)
        found.append(ours(f"default, every {every}", schedule=schedule))
        for order in (1, 2):
            found.append(ours(f"nothing recomputed, order {order}, every {every}", ratio=1.0, forecast=order, schedule=schedule))
            modules = dict(granularity="module", forecast=order, schedule=schedule)
            found.append(ours(f"modules, nothing recomputed, order {order}, every {every}", ratio=1.0, **modules))
            found.append(ours(f"modules, ratio 0.9, order {order}, every {every}", **modules))
        found += [cache_dit(f"TaylorSeer order {order}, F1, every {every}", every, order) for order in (1, 2)]
        for order in (1, 2):
            taylor = TaylorSeerCacheConfig(
                cache_interval=every, disable_cache_before_step=1, max_order=order, taylor_factors_dtype=torch.float32,
                cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
            )  # fmt: skip
            found.append(hooked(f"TaylorSeer order {order}, attention and MLP, every {every}", apply_taylorseer_cache, taylor))
    found += [cache_dit("DBCache, held, F1, every 4", 4, 0)]
    found += [cache_dit(f"DBCache, held, F1, threshold {value:g}", None, 0, value) for value in (0.05, 0.1, 0.2)]
    found += [cache_dit(f"DBCache, TaylorSeer order 1, F1, threshold {value:g}", None, 1, value) for value in (0.05, 0.1, 0.2, 0.4)]
    for value in (0.05, 0.1, 0.2):
        found.append(hooked(f"FirstBlockCache, threshold {value:g}", apply_first_block_cache, FirstBlockCacheConfig(threshold=value)))
    return found


@dataclass(frozen=True)
class Run:
    """What one run gave: final images, pred_x0 of every step, and MACs."""

    images: Tensor
    predictions: list[Tensor]
    macs: int


def run(method: Method, noise: Tensor) -> Run:
    """One run of a fresh model."""
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    net = method.start(DiTTransformer2DModel.from_pretrained(MODEL).eval(), scheduler)
    conditions = Conditions.of_labels(torch.arange(len(noise)) % 10, NULL_LABEL, GUIDANCE)
    predictions: list[Tensor] = []
    with MacCounter() as counter:
        images = sample(net, scheduler, noise, method.steps, conditions, lambda _, x: predictions.append(x.clamp(-1, 1)))
    return Run(images.clamp(-1, 1), predictions, counter.macs)


def main(out: Annotated[Path, typer.Option(help="JSON file, appended to.")], samples: int = 40) -> None:
    """Measure every method that is not in OUT yet."""
    noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(SEED))
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    versions["cache-dit"] = importlib.metadata.version("cache-dit") if importlib.util.find_spec("cache_dit") else "not installed"
    result["settings"] = dict(samples=samples, steps=STEPS, guidance=GUIDANCE, seed=SEED, versions=versions, machine=machine())
    out.parent.mkdir(parents=True, exist_ok=True)
    reference = run(fewer(STEPS), noise)
    for method in track(methods(), "methods"):
        if method.name in result["rows"]:
            continue
        try:
            got = run(method, noise)
        except Exception as error:
            result["rows"][method.name] = dict(failed=f"{type(error).__name__}: {str(error).splitlines()[0]}", note=method.note)
        else:
            row = dict(
                psnr_db=psnr(got.images, reference.images), mse=float((got.images - reference.images).square().mean()),
                full_step_equivalents=got.macs / reference.macs * STEPS, note=method.note,
            )  # fmt: skip
            if method.steps == STEPS:
                row["pred_x0_mae"] = statistics.mean(deviation_per_step(got.predictions, reference.predictions))
            result["rows"][method.name] = row
        out.write_text(json.dumps(result, indent=1))
    for name, row in sorted(result["rows"].items(), key=lambda item: item[1].get("full_step_equivalents", 0.0)):
        figures = f"{row['full_step_equivalents']:5.1f}  {row['psnr_db']:5.2f} dB" if "psnr_db" in row else "failed"
        print(figures, name, row.get("failed", ""))


if __name__ == "__main__":
    typer.run(main)
