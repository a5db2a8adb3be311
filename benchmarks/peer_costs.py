"""MACs of the methods that skip whole modules, or tokens of an MLP, from the modules' measured MACs.

What such a step costs follows from its definition alone, so no graph is built. Settings are the methods' own published ones.
Each function returns the MACs of all steps of one sample without guidance.
"""

from __future__ import annotations

import json
from pathlib import Path

from paper_models import PaperModel

ROUTERS = Path(__file__).resolve().parent / "results" / "router_counts.json"


def interval_steps(steps: int, interval: int) -> int:
    """I-steps of FORA: the first, and every step i with i % interval == 0, i counting down from T - 1 to 0."""
    return sum(i == steps - 1 or i % interval == 0 for i in range(steps))


def skipping_steps(model: PaperModel, steps: int, full_steps: int) -> int:
    """``full_steps`` in full; the others reuse every attention and MLP."""
    return full_steps * model.full + (steps - full_steps) * model.skipping


def thresholds(steps: int) -> list[str]:
    """Thresholds at which the router for ``steps`` steps was counted."""
    return list(json.loads(ROUTERS.read_text())["routers"][str(steps)]["computed"])


def learning_to_cache(model: PaperModel, steps: int, threshold: str) -> int:
    """Every second step in full; in the others, the attentions and MLPs whose router is above ``threshold``."""
    computed = json.loads(ROUTERS.read_text())["routers"][str(steps)]["computed"][threshold]
    routed: int = computed["attention"] * model.of_block("norm1", "attn") + computed["mlp"] * model.of_block("norm2", "mlp")
    return skipping_steps(model, steps, steps // 2) + routed


def toca_dit(model: PaperModel, steps: int) -> int:
    """ToCa as published for DiT: N0 = 3 with DDIM, 4 for 250 steps. A cached step runs each MLP on some of the tokens."""
    first_interval, step_weight, layer_weight = (4, 0.4, 0.8) if steps == 250 else (3, 2.0, -0.2)
    sensitive = range(int(0.2 * steps), int(0.4 * steps))
    macs = 0
    for i in range(steps):
        interval = 2 if i in sensitive else round(first_interval / (1.4 - 0.8 * i / steps))
        if i == steps - 1 or i % interval == 0:
            macs += model.full
            continue
        macs += model.skipping
        for layer in range(model.depth):
            ratio = 0.07 * (1 + layer_weight - 2 * layer_weight * layer / (model.depth - 1))
            ratio *= (1 + step_weight - 2 * step_weight * i / steps) * 2.5
            macs += _fresh(model, ratio) * model.of_block("norm2", "mlp") // model.tokens
    return macs


def toca_pixart(model: PaperModel, steps: int) -> int:
    """ToCa as published for PixArt-α: N0 = 3; a cached step runs cross-attention and MLP on some of the tokens."""
    text = model.of_block("attn2.to_k", "attn2.to_v")  # the keys and values of the text, whatever the tokens
    cross, mlp = model.of_block("attn2") - text, model.of_block("norm2", "ff")
    macs = 0
    for i in range(steps):
        if i % round(3 / (0.8 + 0.4 * i / steps)) == 0:
            macs += model.full
            continue
        macs += model.skipping
        for layer in range(model.depth):
            ratio = 0.3 * (1.6 - 1.2 * layer / (model.depth - 1)) * (1.9 - 1.8 * i / steps)
            macs += text + (_fresh(model, 0.6 * ratio) * cross + _fresh(model, 1.6 * ratio) * mlp) // model.tokens
    return macs


def _fresh(model: PaperModel, ratio: float) -> int:
    return int(min(max(ratio, 0.0), 1.0) * model.tokens)
