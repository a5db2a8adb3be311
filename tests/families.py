"""Tiny configurations of diffusers' transformer classes, with inputs: for the coverage test and the table in docs/coverage.md.

Token counts (20 an image, 7 of text) are unlike all other sizes, so that an axis can be told by its size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

B, S, H, W = 2, 7, 4, 5
Given = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One configuration of one class.

    ``text_first``: where text stands in joint attention, for the independent reference; ``reuse_module``: whether its attention
    module gives the attention alone (else the module adds, gates or mixes in more, and the reference reuses the bare attention).
    """

    name: str
    module: str
    variant: str
    make: Callable[[], tuple[Given, Given]]
    text_first: bool
    reuse_module: bool
    std: float

    @property
    def key(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def build(self) -> tuple[nn.Module, Given]:
        """A model in eval mode in which every block matters, and the keyword arguments of one call."""
        torch.manual_seed(0)
        config, inputs = self.make()
        owner = importlib.import_module(f"diffusers.models.transformers.{self.module}")
        model: nn.Module = getattr(owner, self.name)(**config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=self.std)
        return model.eval(), inputs


FAMILIES: dict[str, Family] = {}


def family(
    name: str, module: str, variant: str = "", text_first: bool = True, reuse_module: bool = True, std: float = 0.1
) -> Callable[[Callable[[], tuple[Given, Given]]], Callable[[], tuple[Given, Given]]]:
    def add(make: Callable[[], tuple[Given, Given]]) -> Callable[[], tuple[Given, Given]]:
        entry = Family(name, module, variant, make, text_first, reuse_module, std)
        FAMILIES[entry.key] = entry
        return make

    return add


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


def t(value: float, integer: bool = True) -> Tensor:
    return torch.full((B,), int(value) if integer else value)


def later(inputs: Given) -> Given:
    """The inputs of the next step: another sample, a lower timestep."""
    changed = dict(inputs)
    first = next(iter(inputs))
    torch.manual_seed(5)
    changed[first] = torch.utils._pytree.tree_map(lambda v: v + 0.3 * torch.randn_like(v), inputs[first])
    for name in ("timestep", "timesteps", "t"):
        if isinstance(inputs.get(name), Tensor):
            time = inputs[name]
            changed[name] = time - 20 if not time.is_floating_point() or float(time.max()) > 20 else time * 0.96
    return changed


LATENT = dict(in_channels=4, out_channels=4)
PAIR = dict(num_attention_heads=2, attention_head_dim=16)


# --- images: one stream ----------------------------------------------------------------------------------------------


@family("DiTTransformer2DModel", "dit_transformer_2d")
def _() -> tuple[Given, Given]:
    return {**PAIR, **LATENT, "num_layers": 3, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000}, {
        "hidden_states": r(B, 4, 8, 8),
        "timestep": t(500),
        "class_labels": torch.tensor([1, 5]),
    }


@family("PixArtTransformer2DModel", "pixart_transformer_2d")
def _() -> tuple[Given, Given]:
    config = {**PAIR, "in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 32}
    return {**config, "caption_channels": 24, "use_additional_conditions": False}, {
        "hidden_states": r(B, 4, 8, 10),
        "encoder_hidden_states": r(B, S, 24),
        "timestep": t(500),
    }


# --- images: text and image ------------------------------------------------------------------------------------------


def sd3(**changes: Any) -> tuple[Given, Given]:
    config = {**LATENT, "sample_size": 10, "patch_size": 2, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 4}
    config |= {"joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 12}
    return {**config, **changes}, {
        "hidden_states": r(B, 4, 8, 10),
        "encoder_hidden_states": r(B, S, 24),
        "pooled_projections": r(B, 16),
        "timestep": t(500),
    }


family("SD3Transformer2DModel", "transformer_sd3", text_first=False)(sd3)
family("SD3Transformer2DModel", "transformer_sd3", "3.5: dual attention", text_first=False)(
    lambda: sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")
)


def flux_like(
    axes: Any = (4, 4, 8), ids: int = 3, batched_ids: bool = False, pooled: bool = True, guidance: bool = False
) -> tuple[Given, Given]:
    config: Given = {**PAIR, "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24}
    config["axes_dims_rope"] = axes
    inputs: Given = {"hidden_states": r(B, H * W, 4), "encoder_hidden_states": r(B, S, 24), "timestep": t(0.5, False)}
    lead = (B,) if batched_ids else ()
    inputs |= {"img_ids": r(*lead, H * W, ids), "txt_ids": r(*lead, S, ids)}
    if pooled:
        config["pooled_projection_dim"] = 16
        inputs["pooled_projections"] = r(B, 16)
    if guidance:
        inputs["guidance"] = t(3.5, False)
    return config, inputs


family("FluxTransformer2DModel", "transformer_flux")(flux_like)


@family("FluxTransformer2DModel", "transformer_flux", "guidance")
def _() -> tuple[Given, Given]:
    config, inputs = flux_like(guidance=True)
    return {**config, "guidance_embeds": True}, inputs


@family("Flux2Transformer2DModel", "transformer_flux2", reuse_module=False)
def _() -> tuple[Given, Given]:
    config, inputs = flux_like((4, 4, 4, 4), 4, batched_ids=True, pooled=False, guidance=True)
    return {**config, "timestep_guidance_channels": 32}, inputs


@family("ChromaTransformer2DModel", "transformer_chroma")
def _() -> tuple[Given, Given]:
    config, inputs = flux_like(pooled=False)
    return {**config, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}, inputs


@family("BriaTransformer2DModel", "transformer_bria")
def _() -> tuple[Given, Given]:
    config, inputs = flux_like((0, 8, 8), pooled=False)
    return {**config, "pooled_projection_dim": None}, inputs


@family("BriaFiboTransformer2DModel", "transformer_bria_fibo")
def _() -> tuple[Given, Given]:
    config, inputs = flux_like((0, 8, 8), pooled=False)
    inputs["text_encoder_layers"] = [r(B, S, 16) for _ in range(4)]
    return {**config, "pooled_projection_dim": None, "text_encoder_dim": 16}, inputs


@family("OvisImageTransformer2DModel", "transformer_ovis_image")
def _() -> tuple[Given, Given]:
    config, inputs = flux_like(pooled=False)
    return {**config, "out_channels": 4}, inputs


@family("LongCatImageTransformer2DModel", "transformer_longcat_image")
def _() -> tuple[Given, Given]:
    config, inputs = flux_like(pooled=False, guidance=True)
    return {**config, "pooled_projection_dim": 24}, inputs


@family("QwenImageTransformer2DModel", "transformer_qwenimage")
def _() -> tuple[Given, Given]:
    config = {**PAIR, "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 24}
    return {**config, "axes_dims_rope": (4, 4, 8)}, {
        "hidden_states": r(B, H * W, 16),
        "encoder_hidden_states": r(B, S, 24),
        "encoder_hidden_states_mask": torch.tensor([[1] * S, [1] * 5 + [0] * 2]),
        "timestep": t(0.5, False),
        "img_shapes": [[(1, H, W)]] * B,
    }


@family("AuraFlowTransformer2DModel", "auraflow_transformer_2d")
def _() -> tuple[Given, Given]:
    config = {**LATENT, "sample_size": 10, "patch_size": 2, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 8}
    config |= {"num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 24, "pos_embed_max_size": 64}
    return config, {"hidden_states": r(B, 4, 8, 10), "encoder_hidden_states": r(B, S, 24), "timestep": t(0.5, False)}


def cogview(**changes: Any) -> tuple[Given, Given]:
    config = {**PAIR, **LATENT, "patch_size": 2, "num_layers": 3, "text_embed_dim": 24, "time_embed_dim": 8, "condition_dim": 4}
    size = torch.tensor([[64, 80]] * B)
    return {**config, **changes}, {
        "hidden_states": r(B, 4, 8, 10),
        "encoder_hidden_states": r(B, S, 24),
        "timestep": t(500),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(B, 2, dtype=torch.long),
    }


family("CogView3PlusTransformer2DModel", "transformer_cogview3plus")(lambda: cogview(pos_embed_max_size=12, sample_size=10))
family("CogView4Transformer2DModel", "transformer_cogview4")(cogview)


@family("GlmImageTransformer2DModel", "transformer_glm_image")
def _() -> tuple[Given, Given]:
    config = {**PAIR, **LATENT, "patch_size": 2, "num_layers": 3, "text_embed_dim": 24, "time_embed_dim": 16, "condition_dim": 8}
    return {**config, "prior_vq_quantizer_codebook_size": 64}, {
        "hidden_states": r(B, 4, 8, 10),
        "encoder_hidden_states": r(B, S, 24),
        "prior_token_id": torch.arange(B * H * W).reshape(B, H * W),
        "prior_token_drop": torch.zeros(B, H * W, dtype=torch.bool),
        "timestep": t(500),
        "target_size": torch.tensor([[64.0, 80.0]] * B),
        "crop_coords": torch.zeros(B, 2),
    }


# --- video -----------------------------------------------------------------------------------------------------------


def cogvideox(**changes: Any) -> tuple[Given, Given]:
    config = {**PAIR, **LATENT, "time_embed_dim": 8, "text_embed_dim": 24, "num_layers": 3, "sample_width": 10, "sample_height": 8}
    config |= {"sample_frames": 5, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": S}
    inputs = {"hidden_states": r(B, 2, 4, 8, 10), "encoder_hidden_states": r(B, S, 24), "timestep": t(500)}
    return {**config, **changes}, inputs


family("CogVideoXTransformer3DModel", "cogvideox_transformer_3d")(cogvideox)


@family("CogVideoXTransformer3DModel", "cogvideox_transformer_3d", "rotary")
def _() -> tuple[Given, Given]:
    config, inputs = cogvideox(use_rotary_positional_embeddings=True)
    angles = r(2 * H * W, 16)
    return config, {**inputs, "image_rotary_emb": (angles.cos(), angles.sin())}


@family("MochiTransformer3DModel", "transformer_mochi", text_first=False)
def _() -> tuple[Given, Given]:
    config = {**PAIR, "patch_size": 2, "num_layers": 3, "pooled_projection_dim": 24, "in_channels": 4, "text_embed_dim": 24}
    return {**config, "time_embed_dim": 4, "max_sequence_length": S}, {
        "hidden_states": r(B, 4, 2, 8, 10),
        "encoder_hidden_states": r(B, S, 24),
        "timestep": t(500),
        "encoder_attention_mask": torch.tensor([[True] * S, [True] * 5 + [False] * 2]),
    }


def hunyuan_video() -> tuple[Given, Given]:
    config = {**LATENT, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2}
    config |= {"num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 24}
    config |= {"pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 8), "image_condition_type": None}
    return config, {
        "hidden_states": r(B, 4, 2, 8, 10),
        "timestep": t(500),
        "encoder_hidden_states": r(B, S, 24),
        "encoder_attention_mask": torch.tensor([[1] * S, [1] * 5 + [0] * 2]),
        "pooled_projections": r(B, 8),
        "guidance": t(4000),
    }


family("HunyuanVideoTransformer3DModel", "transformer_hunyuan_video", text_first=False)(hunyuan_video)


def wan(**changes: Any) -> tuple[Given, Given]:
    config = {**LATENT, "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32}
    config |= {"ffn_dim": 48, "num_layers": 3, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32}
    return {**config, **changes}, {"hidden_states": r(B, 4, 2, 8, 10), "timestep": t(500), "encoder_hidden_states": r(B, S, 16)}


family("WanTransformer3DModel", "transformer_wan")(wan)
family("SkyReelsV2Transformer3DModel", "transformer_skyreels_v2")(wan)


@family("LTXVideoTransformer3DModel", "transformer_ltx")
def _() -> tuple[Given, Given]:
    config = {**PAIR, **LATENT, "cross_attention_dim": 32, "num_layers": 3, "qk_norm": "rms_norm_across_heads", "caption_channels": 24}
    return config, {
        "hidden_states": r(B, 2 * H * W, 4),
        "encoder_hidden_states": r(B, S, 24),
        "timestep": t(500),
        "encoder_attention_mask": torch.ones(B, S).bool(),
        "num_frames": 2,
        "height": H,
        "width": W,
    }


@family("LatteTransformer3DModel", "latte_transformer_3d")
def _() -> tuple[Given, Given]:
    config = {"sample_size": 8, "num_layers": 3, "patch_size": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    config |= {"caption_channels": 24, "in_channels": 4, "cross_attention_dim": 32, "out_channels": 8, "attention_bias": True}
    config |= {"activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single"}
    return {**config, "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 3}, {
        "hidden_states": r(B, 4, 3, 8, 8),
        "encoder_hidden_states": r(B, S, 24),
        "timestep": t(500),
        "enable_temporal_attentions": True,
    }


@family("SanaTransformer2DModel", "sana_transformer")
def _() -> tuple[Given, Given]:
    config = {**LATENT, "patch_size": 1, "num_layers": 3, "attention_head_dim": 4, "num_attention_heads": 4, "num_cross_attention_heads": 2}
    config |= {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8, "sample_size": 32}
    return config, {"hidden_states": r(B, 4, H, W), "encoder_hidden_states": r(B, S, 8), "timestep": t(500)}
