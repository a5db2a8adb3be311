"""The models of the paper's tables on the meta device, and what their forwards and compiled P-steps cost in the paper's convention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from open_sora_plan_macs import latent_grid, meta_call
from published_dit import PublishedDiT

from tokencache_compile import CacheConfig
from tokencache_compile.learn.keep_counts import keep_counts
from tokencache_compile.paper_macs import module_macs, step_macs
from tokencache_compile.passes.pipeline import build_steps
from tokencache_compile.predictor import CachePredictor

PIXART_TEXT, OPEN_SORA_TEXT = 120, 512  # text tokens of the published models' own pipelines
OPEN_SORA_FRAMES, OPEN_SORA_SIZE = 93, 256


@dataclass(frozen=True, eq=False)
class PaperModel:
    """A model without memory, one call of one sample, and where its blocks are.

    Attributes:
        tokens: N, tokens of the cached stream.
        blocks: name of the list of blocks.
        text: name of the projection of the text, which is the same at every step.
    """

    model: Any
    call: dict[str, Any]
    tokens: int
    blocks: str
    text: str | None = None

    @cached_property
    def macs(self) -> dict[str, int]:
        """MACs of one forward by module; "" is the whole."""
        return module_macs(self.model, self.call)

    @property
    def full(self) -> int:
        """MACs of one forward."""
        return self.macs[""]

    @property
    def depth(self) -> int:
        return len(self.model.get_submodule(self.blocks))

    def of_block(self, *names: str) -> int:
        """MACs of these modules of one block; the blocks are alike."""
        return sum(self.macs[f"{self.blocks}.0.{name}"] for name in names)

    @cached_property
    def skipping(self) -> int:
        """MACs of a forward that skips every attention and MLP: embeddings, modulations, last layer; the text is projected before."""
        blocks = [f"{self.blocks}.{index}" for index in range(self.depth)]
        modulations = sum(self.macs.get(f"{block}.adaLN_modulation", 0) for block in blocks)
        text = self.macs[self.text] if self.text else 0
        return self.full - sum(self.macs[block] for block in blocks) + modulations - text

    @cache  # noqa: B019  the models live as long as the process
    def p_step(self, last_k: int, ratio: float, predictor: bool) -> int:
        """MACs of the compiler's P-step: attention among kept tokens, n_l by largest remainders for the budget (1 - r)(L - K)N."""
        cached = self.depth - last_k
        keep = keep_counts(torch.full((cached,), 1.0 - ratio, dtype=torch.float64), self.tokens, ratio)
        scorer = None
        if predictor:
            block = self.model.get_submodule(f"{self.blocks}.0")
            with torch.device("meta"):
                scorer = CachePredictor(block, self.channels, self.depth)
        config = CacheConfig(ratio, last_k, "kept", 0, "computed", "predictor" if predictor else "random", keep=(keep,))
        steps = build_steps(self.model, self.call, config, scorer)
        return step_macs(steps, steps.cached[0], self.call)

    @property
    def channels(self) -> int:
        """C, channels of the cached stream: the weights of the patch embedding say it."""
        return int(next(weight for weight in self.model.parameters() if weight.dim() == 4).shape[0])


def dit(size: int) -> PaperModel:
    """DiT-XL/2; ``size``: height and width of the latent image."""
    with torch.device("meta"):
        model = PublishedDiT(size).eval()
        call = {"x": torch.empty(1, 4, size, size), "t": torch.empty(1), "y": torch.empty(1, dtype=torch.long)}
    return PaperModel(model, call, (size // 2) ** 2, "blocks")


def pixart(size: int, text: int = PIXART_TEXT) -> PaperModel:
    """PixArt-α XL/2 with ``text`` text tokens; at 1024² it also takes resolution and aspect ratio."""
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=size,
            patch_size=2,
            norm_type="ada_norm_single",
            caption_channels=4096,
            cross_attention_dim=1152,
        ).eval()
        call: dict[str, Any] = {
            "hidden_states": torch.empty(1, 4, size, size),
            "encoder_hidden_states": torch.empty(1, text, 4096),
            "timestep": torch.empty(1),
        }
        if model.use_additional_conditions:
            call["added_cond_kwargs"] = {"resolution": torch.empty(1, 2), "aspect_ratio": torch.empty(1, 1)}
    return PaperModel(model, call, (size // 2) ** 2, "transformer_blocks", "caption_projection")


def open_sora_plan() -> PaperModel:
    """Open-Sora-Plan v1.3, 93 frames of 256²."""
    grid = latent_grid(OPEN_SORA_FRAMES, OPEN_SORA_SIZE)
    model, call = meta_call(grid, OPEN_SORA_TEXT)
    patch = model.config.patch_size
    return PaperModel(model, call, grid[0] * (grid[1] // patch) * (grid[2] // patch), "transformer_blocks", "caption_projection")


@cache
def paper_model(name: str) -> PaperModel:
    """The model of a row of the tables."""
    makers = {
        "DiT-XL/2 256²": lambda: dit(32),
        "DiT-XL/2 512²": lambda: dit(64),
        "PixArt-α 256²": lambda: pixart(32),
        "PixArt-α 1024²": lambda: pixart(128),
        "Open-Sora-Plan": open_sora_plan,
    }
    return makers[name]()
