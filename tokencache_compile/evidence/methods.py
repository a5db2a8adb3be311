"""What is measured: a *method* is a name and what makes a fresh model run it; a list of methods has one line a method and setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokencache_compile.api import transform
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.baselines import deepcache, delta_dit, fora, toca, tome
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.plan import CacheConfig
from tokencache_compile.samplers import default_config
from tokencache_compile.schedule import Schedule

# (fresh model, its scheduler, backend) -> what stands in for the model in the sampling loop
Start = Callable[[nn.Module, Any, str], Any]

FEWER, RANDOM, OURS, PAPER = "fewer steps", "random tokens", "ours", "the paper's settings"
SPEED_UPS = (1.5, 2.0, 2.5, 3.0)  # that methods are compared at
_SHARES = (0.8, 0.66, 0.58, 0.5, 0.44, 0.4, 0.34, 0.3, 0.26)  # of the steps, that the plain sampler is measured at


@dataclass(frozen=True)
class Method:
    """One method at one setting.

    Attributes:
        name: unique in a list of methods; results are kept by it.
        family: methods of one family are one line of a plot.
        start: None is the uncached model itself.
        steps: sampling steps, where they are fewer than the run's.
        backends: what the latency is measured in.
        note: what its users would not have to do on a model that it lists.
    """

    name: str
    family: str
    start: Start | None
    steps: int | None = None
    backends: tuple[str, ...] = ("inductor",)
    note: str = ""


def fewer_steps(steps: int) -> list[Method]:
    """The plain sampler with ``steps`` steps cut down in several ways."""
    counts = sorted({max(1, round(share * steps)) for share in _SHARES}, reverse=True)
    return [Method(f"fewer steps: {count}", FEWER, None, count) for count in counts]


def cached(name: str, config: CacheConfig, artefact: CacheArtefact | None = None, family: str = OURS) -> Method:
    """This package under ``config``; ``artefact`` brings the predictor of configs that score by it."""

    def start(net: nn.Module, scheduler: Any, backend: str) -> Any:
        predictor = artefact.predictor if artefact is not None and config.scorer == "predictor" else None
        return transform(net, config=config, predictor=predictor, backend=backend, scheduler=scheduler)

    return Method(name, family, start)


def spacings(steps: int) -> dict[str, Schedule]:
    """I-steps whose runs lie about the speed-ups that methods are compared at."""
    many = max(1, round(0.62 * steps))  # for 1.5×: P-steps, and caches to fill, take some time too
    return {f"{many} I-steps": Schedule.uniform(steps, many)} | {
        f"every {every}": Schedule(every) for every in (2, 3, 4, 5)
    }


def of_blocks(steps: int, blocks: int, tokens: int, image: bool = True) -> list[Method]:
    """Published methods that depend on how many blocks and tokens a model has; ToCa and ToMe only where tokens are those of an image."""
    found = [cached(f"DeepCache, every {every}", deepcache(blocks, tokens, every), family="DeepCache") for every in (2, 3, 4)]
    half = delta_dit(blocks, tokens, blocks // 2, steps // 2)
    found.append(cached("Δ-DiT, half of the blocks", half, family="Δ-DiT"))
    if image:
        found.append(cached("ToCa", toca(steps, blocks, tokens), family="ToCa"))
        found.append(cached("ToMe's tokens, ratio 0.9, every 4", tome(), family="ToMe"))
    return found


def standard_methods(subject: Subject, guided: bool, artefact: CacheArtefact | None = None) -> list[Method]:
    """Fewer steps, random tokens, nothing recomputed, FORA, and with a predictor its tokens and the paper's settings.

    This package's rows start from what ``transform`` takes with the subject's sampler.
    """
    base = replace(default_config(subject.scheduler()), selection="pair" if guided else "sample")
    steps, whole = subject.steps, replace(base, ratio=1.0)
    found = fewer_steps(steps)
    for name, schedule in spacings(steps).items():
        found.append(cached(f"random tokens, ratio 0.9, {name}", replace(base, schedule=schedule), family=RANDOM))
        found.append(cached(f"ours: nothing recomputed, {name}", replace(whole, schedule=schedule)))
        for order, title in ((1, "modules apart"), (2, "modules apart, order 2")):
            modules = replace(whole, forecast=order, granularity="module", schedule=schedule)
            found.append(cached(f"ours: {title}, nothing recomputed, {name}", modules))
        if artefact is not None and artefact.predictor is not None:
            found.append(cached(f"ours: predictor, ratio 0.9, {name}", replace(base, scorer="predictor", schedule=schedule), artefact))
    for every in (2, 3, 4, 5):
        config = replace(whole, schedule=Schedule.with_last(steps, every))
        found.append(cached(f"ours: nothing recomputed, every {every} and the last", config))
    found += [cached(f"FORA, every {interval}", fora(steps, interval), family="FORA") for interval in (2, 3, 4)]
    if artefact is not None and artefact.predictor is not None:
        for full in sorted({max(1, round(share * steps)) for share in (0.24, 0.5)}):
            found.append(cached(f"the paper's: {full} I-steps", CacheConfig.paper(steps=steps, full_steps=full), artefact, PAPER))
    return found
