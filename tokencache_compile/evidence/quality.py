"""How close a method's samples are to the uncached run's, and what it computed for them; no clock is read here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.evidence.methods import Method
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.json_data import to_json
from tokencache_compile.macs import MacCounter
from tokencache_compile.metrics import psnr, ssim
from tokencache_compile.paper_macs import PaperMacCounter
from tokencache_compile.runtime import Dispatcher
from tokencache_compile.sampling import sample, seeded

BACKEND = "eager"  # so that MACs are counted as they run, in whatever a method does


@dataclass(frozen=True)
class Samples:
    """What a method made of the noises.

    Attributes:
        images: [n, C, ...], as they are compared.
        predictions: pred_x0 at every step, [steps, n, C, ...]; None where the scheduler tells none.
        macs: of all samples by this package's count, and ``paper_macs`` by the paper's.
        plan: of the cached graphs, as JSON values; None for a method that is not this package's.
    """

    images: Tensor
    predictions: Tensor | None
    macs: int
    paper_macs: int
    plan: dict[str, Any] | None


def draw_samples(subject: Subject, method: Method, count: int, chunk: int, advance: Callable[[], None]) -> Samples:
    """``count`` samples of ``method``, ``chunk`` at a time; ``advance`` is called after each chunk."""
    steps = method.steps or subject.steps
    scheduler = subject.scheduler()
    net: Any = subject.load()
    if method.start is not None:
        net = method.start(net, scheduler, BACKEND)
    kinds: list[str] = []
    if isinstance(net, Dispatcher):
        net.step_callback = lambda report: kinds.append(report.kind)
    images: list[Tensor] = []
    predictions: list[Tensor] = []
    macs = paper_macs = 0
    for start in range(0, count, chunk):
        noise, conditions = subject.draw(start, min(chunk, count - start))
        seen: list[Tensor] = []

        def on_step(_: int, prediction: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(subject.finished(prediction))

        with seeded(start), MacCounter() as own, PaperMacCounter() as paper:
            drawn = sample(net, scheduler, noise, steps, conditions, on_step if subject.predicts_x0 else None)
        macs, paper_macs = macs + own.macs, paper_macs + paper.macs
        images.append(subject.finished(drawn))
        if seen:
            predictions.append(torch.stack(seen))
        advance()
    plan = None
    if isinstance(net, Dispatcher):
        cache = net.summary().cache_bytes / len(images[-1])
        plan = {"config": to_json(net.cache_config), "tokens": net.plan.tokens, "profiles": to_json(net.plan.profiles)}
        plan |= {"kinds": "".join(kinds[:steps]), "cache_bytes": cache}
    return Samples(torch.cat(images), torch.cat(predictions, dim=1) if predictions else None, macs, paper_macs, plan)


def compared(subject: Subject, got: Samples, reference: Samples) -> dict[str, Any]:
    """A row's figures as JSON values; MACs and cache bytes are those of one sample. A PSNR of null means equal samples."""
    data_range = 2.0 if subject.pixels else 2.0 * float(reference.images.abs().max())
    value = psnr(got.images, reference.images, data_range)
    row: dict[str, Any] = {
        "psnr_db": value if math.isfinite(value) else None,
        "macs": got.macs / len(got.images),
        "paper_macs": got.paper_macs / len(got.images),
        "macs_share": got.macs / reference.macs,
        "plan": got.plan,
    }
    if got.images.ndim == 4:
        row["ssim"] = ssim(got.images, reference.images, data_range)
    if got.predictions is not None and reference.predictions is not None and got.predictions.shape == reference.predictions.shape:
        deviation = (got.predictions - reference.predictions).abs().flatten(2).double().mean(2)  # [steps, n]
        means: list[float] = deviation.mean(1).tolist()
        row["deviation"] = {"mean": means, "std": deviation.std(1, correction=0).tolist()}
        row["pred_x0_mae"] = statistics.mean(means)
    return row
