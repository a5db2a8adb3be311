"""MACs of a DiT by formula, per sample: what the counter is held against.

Matmuls, convolutions and the two products of attention; norms and activations count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def dit_macs(config: Any, keep: Sequence[int | None], context: str = "kept", predictor: bool = False) -> int:
    """One forward of one sample. ``keep`` holds n_l for each block; None is a block that runs in full."""
    width: int = config.num_attention_heads * config.attention_head_dim
    tokens: int = (config.sample_size // config.patch_size) ** 2
    patch: int = config.patch_size**2
    embedding = 256 * width + width**2  # sinusoids → timestep embedding, which diffusers has in every block
    full = _block(width, tokens, tokens, tokens, tokens) + embedding
    total: int = tokens * patch * config.in_channels * width
    for kept in keep:
        if kept is None:
            total += full
        elif kept:
            attended = {"kept": kept, "cached": tokens, "full": tokens, "reuse": 0}[context]
            total += _block(width, kept, attended, tokens if context == "full" else kept, 0 if context == "reuse" else kept) + embedding
            total -= 2 * width**2 if context == "reuse" else 0  # nothing reads the shift and scale before attention
    total += embedding + 2 * width**2 + tokens * width * patch * config.out_channels
    total += full + tokens * width * len(keep) if predictor else 0
    return total


def _block(width: int, kept: int, attended: int, keyed: int, queried: int) -> int:
    """``kept`` tokens through a block: ``queried`` of them ask ``attended`` ones, of which ``keyed`` get new keys and values."""
    modulation: int = 6 * width**2
    attention: int = 2 * queried * width**2 + 2 * queried * attended * width + (2 * keyed * width**2 if queried else 0)
    return modulation + attention + 8 * kept * width**2
