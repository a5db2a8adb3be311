"""The rows of the paper's Tables II to V as methods of this package, beside what the paper prints of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from paper_figures import COLUMNS, TABLES, Printed
from router_counts import published_router
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.baselines import fora, learning_to_cache, toca
from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.methods import FEWER, PAPER, Method, cached
from tokencache_compile.plan import CacheConfig, Scorer

CACHING = ("FORA", "Learning-to-Cache", "ToCa", "Ours")
ROUTER = "router.logits"  # in the checkpoint of learn.router.train_router


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        printed: the paper's; None for a row of this project's own.
        method: None where it cannot be run; ``why`` then says why.
    """

    name: str
    steps: int
    printed: Printed | None = None
    method: Method | None = None
    why: str = ""


@dataclass(frozen=True)
class Learned:
    """What was trained for a model: an artefact's predictor, and Learning-to-Cache's routers [step pairs, blocks, 2] by sampling steps.

    Rows are kept by their names, so these tell one predictor or router from another.
    """

    artefact: CacheArtefact | None = None
    routers: tuple[tuple[int, Tensor], ...] = ()
    threshold: float = 0.1

    @property
    def scorer(self) -> tuple[Scorer, str]:
        """What chooses the tokens, and its name in a row."""
        if self.artefact is None or self.artefact.predictor is None:
            return "random", "random tokens"
        return "predictor", f"predictor {digest(*self.artefact.predictor.state_dict().values())}"


def digest(*tensors: Tensor) -> str:
    """Tells weights from others."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:8]


def groups(model: str) -> list[list[Printed]]:
    """The paper's rows of a model, those of one uncached run together. That run is the first of each group."""
    found: list[list[Printed]] = []
    for row in TABLES:
        if row.model != model or row.table not in COLUMNS:
            continue
        if row.method not in CACHING and (not found or found[-1][-1].method in CACHING):
            found.append([])
        found[-1].append(row)
    return found


def read_router(path: Path) -> tuple[int, Tensor]:
    """Sampling steps and logits [step pairs, blocks, modules] of a router: ``train_router``'s checkpoint, or a published one.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            logits = load_file(path)[ROUTER]
        else:
            steps = int("".join(letter for letter in path.stem if letter.isdigit()))
            logits = published_router(path, steps)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{path} was to be Learning-to-Cache's router and cannot be read as one: {error}. Name the checkpoint that "
            "learn.router.train_router wrote, or DDIM50_router.pt of github.com/horseee/learning-to-cache, DiT/ckpt."
        ) from error
    return 2 * len(logits), logits


def rows_of(group: list[Printed], blocks: int, tokens: int, learned: Learned, backend: str) -> list[Row]:
    """The group's rows, and our defaults at the steps of its uncached run."""
    rows = [_row(printed, blocks, tokens, learned) for printed in group]
    scorer, name = learned.scorer
    defaults = cached(f"ours, defaults, {name}", CacheConfig(scorer=scorer, selection="pair"), learned.artefact)
    rows.append(Row(defaults.name, group[0].steps, None, defaults))
    return [row if row.method is None else replace(row, method=replace(row.method, backends=(backend,))) for row in rows]


def _row(printed: Printed, blocks: int, tokens: int, learned: Learned) -> Row:
    steps = printed.steps
    if printed.method not in CACHING:
        method = Method(f"uncached, {steps} steps", FEWER, None, steps)
    elif printed.method == "FORA":
        interval = 3 if steps == 250 else 2  # as benchmarks/paper_tables.py reads the paper, which states none
        method = cached(f"FORA, every {interval}", fora(steps, interval), family="FORA")
    elif printed.method == "ToCa":
        if printed.table == "V":
            return Row("ToCa", steps, printed, why="ToCa published no settings for this model, and its cells need a square grid.")
        method = cached("ToCa, its settings for DiT", toca(steps, blocks, tokens), family="ToCa")
    elif printed.method == "Learning-to-Cache":
        router = dict(learned.routers).get(steps)
        if router is None:
            return Row(printed.method, steps, printed, why=f"no router for {steps} steps was given (--router).")
        config = learning_to_cache(router, learned.threshold)
        name = f"Learning-to-Cache, router {digest(router)}, threshold {learned.threshold:g}"
        method = cached(name, config, family="Learning-to-Cache")
    else:
        scorer, name = learned.scorer
        config = replace(CacheConfig.paper(printed.ratio, steps, printed.full_steps), last_k=printed.last_k, scorer=scorer)
        method = cached(f"the paper's settings, {name}, {printed.full_steps} I-steps", config, learned.artefact, PAPER)
    return Row(method.name, steps, printed, method)
