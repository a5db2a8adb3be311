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
    module gives the attention alone (else the module adds, gates or mixes in more, and the reference reuses the bare attention);
    ``history``: how many tokens of earlier frames stand before the sample's in the stream; ``mixer``: the module of a block that
    works on the ``grid`` of tokens, whose sizes the block is told.
    """

    name: str
    module: str
    variant: str
    make: Callable[[], tuple[Given, Given]]
    text_first: bool
    reuse_module: bool
    history: int
    mixer: str
    grid: tuple[int, ...]
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
    name: str,
    module: str,
    variant: str = "",
    text_first: bool = True,
    reuse_module: bool = True,
    history: int = 0,
    mixer: str = "",
    grid: tuple[int, ...] = (),
    std: float = 0.1,
) -> Callable[[Callable[[], tuple[Given, Given]]], Callable[[], tuple[Given, Given]]]:
    def add(make: Callable[[], tuple[Given, Given]]) -> Callable[[], tuple[Given, Given]]:
        entry = Family(name, module, variant, make, text_first, reuse_module, history, mixer, grid, std)
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
        "encoder_attention_mask": torch.ones(B, S, dtype=torch.bool),
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


@family("SanaTransformer2DModel", "sana_transformer", mixer="ff", grid=(H, W))
def _() -> tuple[Given, Given]:
    config = {**LATENT, "patch_size": 1, "num_layers": 3, "attention_head_dim": 4, "num_attention_heads": 4, "num_cross_attention_heads": 2}
    config |= {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8, "sample_size": 32}
    return config, {"hidden_states": r(B, 4, H, W), "encoder_hidden_states": r(B, S, 8), "timestep": t(500)}


# --- more of them ----------------------------------------------------------------------------------------------------


@family("AceStepTransformer1DModel", "ace_step_transformer")
def _() -> tuple[Given, Given]:
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8, "patch_size": 2, "sliding_window": 16}
    return config, {
        "hidden_states": r(B, 40, 8),
        "timestep": t(0.5, False),
        "timestep_r": t(0.4, False),
        "encoder_hidden_states": r(B, S, 32),
        "context_latents": r(B, 40, 16),
    }


@family("AllegroTransformer3DModel", "transformer_allegro")
def _() -> tuple[Given, Given]:
    config = {**LATENT, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "cross_attention_dim": 24}
    config |= {"sample_width": 10, "sample_height": 8, "sample_frames": 8}
    return {**config, "caption_channels": 24}, {
        "hidden_states": r(B, 4, 2, 8, 10),
        "encoder_hidden_states": r(B, S, 24),
        "timestep": t(500),
    }


@family("AnyFlowTransformer3DModel", "transformer_anyflow")
def _() -> tuple[Given, Given]:
    config, inputs = wan(gate_value=0.25, deltatime_type="r")
    config.pop("qk_norm")
    inputs["hidden_states"] = r(B, 2, 4, 8, 10)
    return config, {**inputs, "timestep": torch.full((B, 2), 500.0), "r_timestep": torch.full((B, 2), 250.0)}


@family("AnyFlowFARTransformer3DModel", "transformer_anyflow_far")
def _() -> tuple[Given, Given]:
    config, inputs = wan(gate_value=0.25, deltatime_type="r", compressed_patch_size=(1, 4, 4), full_chunk_limit=3)
    config.pop("qk_norm")
    inputs["hidden_states"] = r(B, 4, 4, 8, 12)
    times = {"timestep": torch.full((B, 4), 500.0), "r_timestep": torch.full((B, 4), 250.0)}
    return config, {**inputs, **times, "chunk_partition": [2, 2]}


@family("BriaFibo2Transformer2DModel", "transformer_bria_fibo2")
def _() -> tuple[Given, Given]:
    config = {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 24}
    config |= {"injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 3, "max_num_gist_tokens": 9, "gist_step": 3}
    config |= {"gist_min_text_len": 1, "gist_max_text_len": 8, "axes_dims": (4, 4, 8), "axes_lens": (64, 16, 16)}
    return config, {"hidden_states": r(B, 4, 8, 10), "timestep": t(0.5, False), "encoder_hidden_states": r(B, 2, S, 24)}


@family("ChronoEditTransformer3DModel", "transformer_chronoedit")
def _() -> tuple[Given, Given]:
    return wan(rope_temporal_skip_len=8)


@family("ConsisIDTransformer3DModel", "consisid_transformer_3d")
def _() -> tuple[Given, Given]:
    config, inputs = cogvideox(cross_attn_interval=1, is_kps=False, is_train_face=True, cross_attn_dim_head=8, cross_attn_num_heads=2)
    config |= {"LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1}
    config |= {"LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 1}
    return config, {**inputs, "id_vit_hidden": [torch.ones(B, 2, 2)], "id_cond": torch.ones(B, 2)}


@family("CosmosTransformer3DModel", "transformer_cosmos")
def _() -> tuple[Given, Given]:
    config = {**LATENT, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "mlp_ratio": 2, "text_embed_dim": 16}
    config |= {"adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0)}
    config |= {"concat_padding_mask": False, "extra_pos_embed_type": "learnable"}
    return config, {
        "hidden_states": r(B, 4, 2, 8, 10),
        "timestep": t(500),
        "encoder_hidden_states": r(B, S, 16),
        "attention_mask": torch.ones(B, S),
        "fps": 30,
    }


@family("Cosmos3OmniTransformer", "transformer_cosmos3")
def _() -> tuple[Given, Given]:
    config = {"head_dim": 16, "hidden_size": 32, "intermediate_size": 48, "latent_channel": 4, "num_attention_heads": 2}
    config |= {"num_hidden_layers": 3, "num_key_value_heads": 1, "patch_latent_dim": 16, "rope_axes_dim": (4, 2, 2), "vocab_size": 64}
    length = S + 2 * H * W
    return config, {
        "vision_tokens": [r(1, 4, 2, 8, 10)],
        "input_ids": torch.arange(S),
        "text_indexes": torch.arange(S),
        "position_ids": torch.arange(length).repeat(3, 1),
        "und_len": S,
        "sequence_length": length,
        "vision_token_shapes": [(2, H, W)],
        "vision_sequence_indexes": torch.arange(S, length),
        "vision_mse_loss_indexes": torch.arange(S, length),
        "vision_timesteps": torch.full((2 * H * W,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


@family("DreamLiteTransformer2DModel", "transformer_2d_dreamlite")
def _() -> tuple[Given, Given]:
    config = {**PAIR, "in_channels": 32, "num_layers": 3, "norm_num_groups": 8, "cross_attention_dim": 24, "qk_norm": "rms_norm"}
    config["ff_mult"] = 2
    return config, {"hidden_states": r(B, 32, H, W), "encoder_hidden_states": r(B, S, 24), "timestep": t(500)}


@family("EasyAnimateTransformer3DModel", "transformer_easyanimate")
def _() -> tuple[Given, Given]:
    config = {**PAIR, **LATENT, "mmdit_layers": 3, "num_layers": 3, "patch_size": 2, "sample_height": 60, "sample_width": 90}
    config |= {"text_embed_dim": 24, "time_embed_dim": 8, "time_position_encoding_type": "3d_rope", "timestep_activation_fn": "silu"}
    return config, {"hidden_states": r(B, 4, 2, 8, 10), "timestep": t(500), "encoder_hidden_states": r(B, S, 24)}


@family("ErnieImageTransformer2DModel", "transformer_ernie_image", text_first=False)
def _() -> tuple[Given, Given]:
    config = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 48, "in_channels": 4, "out_channels": 4}
    config |= {"patch_size": 1, "text_in_dim": 24, "rope_theta": 256, "rope_axes_dim": (8, 4, 4), "qk_layernorm": True}
    return config, {
        "hidden_states": r(B, 4, H, W),
        "timestep": t(0.5, False),
        "text_bth": r(B, S, 24),
        "text_lens": torch.tensor([S] * B),
    }


@family("Flux3Transformer2DModel", "transformer_flux3", reuse_module=False)
def _() -> tuple[Given, Given]:
    config = {**PAIR, "in_channels": 4, "cond_in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24}
    config |= {"timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4)}
    inputs = {"hidden_states": r(B, H * W, 4), "encoder_hidden_states": r(B, S, 24), "timestep": t(0.5, False)}
    return config, {**inputs, "img_ids": r(H * W, 4), "txt_ids": r(S, 4)}


@family("HeliosTransformer3DModel", "transformer_helios", history=42)
def _() -> tuple[Given, Given]:
    config, inputs = wan(rope_dim=(4, 4, 4), has_multi_term_memory_patch=True, guidance_cross_attn=True)
    config |= {"zero_history_timestep": True, "is_amplify_history": False}
    config.pop("rope_max_seq_len")
    frames = {"short": 1, "mid": 1, "long": 4}
    history = {f"indices_latents_history_{k}": torch.ones(B, n) for k, n in frames.items()}
    latents = {f"latents_history_{k}": r(B, 4, n, 8, 16) for k, n in frames.items()}
    inputs["hidden_states"] = r(B, 4, 2, 8, 16)
    return config, {**inputs, "indices_hidden_states": torch.ones(B, 2), **history, **latents}


@family("HiDreamImageTransformer2DModel", "transformer_hidream_image", text_first=False)
def _() -> tuple[Given, Given]:
    config = {**LATENT, "patch_size": 2, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
    config |= {"caption_channels": [8, 4], "text_emb_dim": 8, "num_routed_experts": 4, "num_activated_experts": 2}
    config |= {"axes_dims_rope": (4, 2, 2), "max_resolution": (16, 20), "llama_layers": (0, 1, 0, 1), "force_inference_output": True}
    return config, {
        "hidden_states": r(B, 4, 10, 10),
        "encoder_hidden_states_t5": r(B, S, 8),
        "encoder_hidden_states_llama3": r(2, B, S, 4),
        "pooled_embeds": r(B, 8),
        "timesteps": t(500),
    }


@family("HunyuanDiT2DModel", "hunyuan_transformer_2d")
def _() -> tuple[Given, Given]:
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 4}
    config |= {"cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 4, "hidden_size": 32}
    config |= {"text_len": 3, "text_len_t5": 4, "activation_fn": "gelu-approximate"}
    angles = r(16, 8)
    return config, {
        "hidden_states": r(B, 4, 8, 8),
        "encoder_hidden_states": r(B, 3, 8),
        "text_embedding_mask": torch.ones(B, 3),
        "encoder_hidden_states_t5": r(B, 4, 8),
        "text_embedding_mask_t5": torch.ones(B, 4),
        "timestep": t(500.0, False),
        "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * B),
        "style": torch.zeros(B, dtype=torch.long),
        "image_rotary_emb": [angles.cos(), angles.sin()],
    }


@family("HunyuanVideo15Transformer3DModel", "transformer_hunyuan_video15", text_first=False)
def _() -> tuple[Given, Given]:
    config = {**LATENT, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "num_refiner_layers": 1, "mlp_ratio": 2.0}
    config |= {"patch_size": 1, "patch_size_t": 1, "text_embed_dim": 24, "text_embed_2_dim": 12, "image_embed_dim": 8}
    config |= {"rope_axes_dim": (4, 4, 8), "target_size": 16, "task_type": "t2v"}
    return config, {
        "hidden_states": r(B, 4, 2, H, W),
        "timestep": t(500.0, False),
        "encoder_hidden_states": r(B, 6, 24),
        "encoder_attention_mask": torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2]),
        "encoder_hidden_states_2": r(B, 5, 12),
        "encoder_attention_mask_2": torch.tensor([[1.0] * 5, [1.0] * 2 + [0.0] * 3]),
        "image_embeds": torch.zeros(B, 3, 8),
    }


@family("HunyuanVideoFramepackTransformer3DModel", "transformer_hunyuan_video_framepack", text_first=False, history=50)
def _() -> tuple[Given, Given]:
    config, inputs = hunyuan_video()
    config |= {"has_image_proj": True, "image_proj_dim": 24, "has_clean_x_embedder": True}
    inputs.pop("encoder_attention_mask")
    frames = {"latents_clean": 2, "latents_history_2x": 2, "latents_history_4x": 8}
    history = {name: r(B, 4, n, 8, 10) for name, n in frames.items()} | {f"indices_{name}": torch.ones(n) for name, n in frames.items()}
    more = {"image_embeds": r(B, 5, 24), "indices_latents": torch.ones(2)}
    more["encoder_attention_mask"] = torch.tensor([[1.0] * S, [1.0] * 5 + [0.0] * 2])
    return config, {**inputs, **more, **history}


@family("HunyuanImageTransformer2DModel", "transformer_hunyuanimage", text_first=False)
def _() -> tuple[Given, Given]:
    config = {**PAIR, **LATENT, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": (1, 1)}
    config |= {"text_embed_dim": 24, "rope_axes_dim": (8, 8)}
    return config, {
        "hidden_states": r(B, 4, H, W),
        "timestep": t(500.0, False),
        "encoder_hidden_states": r(B, S, 24),
        "encoder_attention_mask": torch.ones(B, S, dtype=torch.long),
    }


@family("Ideogram4Transformer2DModel", "transformer_ideogram4")
def _() -> tuple[Given, Given]:
    config = {"in_channels": 16, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4, "intermediate_size": 48}
    config |= {"adaln_dim": 12, "llm_features_dim": 24, "rope_theta": 10_000, "mrope_section": (2, 1, 1)}
    owner = importlib.import_module("diffusers.models.transformers.transformer_ideogram4")
    marks = torch.tensor([owner.LLM_TOKEN_INDICATOR] * S + [owner.OUTPUT_IMAGE_INDICATOR] * (H * W)).repeat(B, 1)
    return config, {
        "hidden_states": torch.cat([torch.zeros(B, S, 16), r(B, H * W, 16)], 1),
        "timestep": t(0.5, False),
        "encoder_hidden_states": torch.cat([r(B, S, 24), torch.zeros(B, H * W, 24)], 1),
        "position_ids": torch.arange(S + H * W)[None, :, None].repeat(B, 1, 3),
        "segment_ids": torch.ones(B, S + H * W, dtype=torch.long),
        "indicator": marks,
    }


def joyimage() -> Given:
    config = {"patch_size": [1, 2, 2], "in_channels": 16, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 24, "num_layers": 3}
    return {**config, "rope_dim_list": [4, 6, 6], "theta": 256}


@family("JoyImageEditTransformer3DModel", "transformer_joyimage", text_first=False)
def _() -> tuple[Given, Given]:
    return joyimage(), {"hidden_states": r(B, 16, 1, 8, 10), "encoder_hidden_states": r(B, S, 24), "timestep": t(0.5, False)}


@family("JoyImageEditPlusTransformer3DModel", "transformer_joyimage_edit_plus", text_first=False)
def _() -> tuple[Given, Given]:
    inputs = {"hidden_states": r(B, 20, 16, 1, 2, 2), "encoder_hidden_states": r(B, S, 24), "timestep": t(0.5, False)}
    return joyimage(), {**inputs, "shape_list": [[(1, 4, 5)]] * B}


@family("Kandinsky5Transformer3DModel", "transformer_kandinsky")
def _() -> tuple[Given, Given]:
    config = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 12, "time_dim": 16, "patch_size": (1, 2, 2)}
    config |= {"model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6)}
    return config, {
        "hidden_states": r(1, 2, 8, 10, 4),
        "encoder_hidden_states": r(1, S, 24),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": r(1, 12),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(5)],
        "text_rope_pos": torch.arange(S),
    }


@family("Kandinsky6Transformer3DModel", "transformer_kandinsky6")
def _() -> tuple[Given, Given]:
    config = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 12, "time_dim": 16, "model_dim": 32, "ff_dim": 48}
    config |= {"num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6), "in_audio_dim": 5, "out_audio_dim": 5}
    config |= {"text_token_padding": True, "ca_rope": True, "cross_gates": True, "fix_modulation": True}
    return config, {
        "hidden_states": r(B, 2, 8, 10, 9),
        "encoder_hidden_states": r(B, S, 24),
        "pooled_projections": r(B, 12),
        "timestep": t(500.0, False),
        "audio_hidden_states": r(B, 9, 5),
    }


@family("Kandinsky6SRTransformer3DModel", "transformer_kandinsky6_sr")
def _() -> tuple[Given, Given]:
    config = {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 48, "num_visual_blocks": 3}
    config |= {"axes_dims": (4, 6, 6), "nabla_window": (1, 1, 1)}
    return config, {"hidden_states": r(B, 2, 8, 16, 9), "timestep": t(500.0, False)}


@family("Krea2Transformer2DModel", "transformer_krea2", reuse_module=False)
def _() -> tuple[Given, Given]:
    config = {"in_channels": 16, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"intermediate_size": 48, "timestep_embed_dim": 8, "text_hidden_dim": 24, "num_text_layers": 3}
    config |= {"text_num_attention_heads": 2, "text_num_key_value_heads": 1, "text_intermediate_size": 16}
    config |= {"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2)}
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, -1] = False
    return config, {
        "hidden_states": r(B, H * W, 16),
        "encoder_hidden_states": r(B, S, 3, 24),
        "timestep": t(0.5, False),
        "position_ids": torch.arange(S + H * W)[:, None].repeat(1, 3).float(),
        "encoder_attention_mask": mask,
    }


@family("LongCatAudioDiTTransformer", "transformer_longcat_audio_dit")
def _() -> tuple[Given, Given]:
    config = {"dit_dim": 32, "dit_depth": 3, "dit_heads": 4, "dit_text_dim": 24, "latent_dim": 8, "text_conv": False}
    return config, {
        "hidden_states": r(B, 20, 8),
        "encoder_hidden_states": r(B, S, 24),
        "encoder_attention_mask": torch.ones(B, S, dtype=torch.bool),
        "timestep": t(0.5, False),
        "attention_mask": torch.ones(B, 20, dtype=torch.bool),
    }


@family("LTX2VideoTransformer3DModel", "transformer_ltx2")
def _() -> tuple[Given, Given]:
    config = {**PAIR, **LATENT, "patch_size": 1, "patch_size_t": 1, "cross_attention_dim": 32, "audio_in_channels": 4}
    config |= {"audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
    config |= {"num_layers": 3, "qk_norm": "rms_norm_across_heads", "caption_channels": 24, "rope_double_precision": False}
    return config, {
        "hidden_states": r(B, 2 * H * W, 4),
        "audio_hidden_states": r(B, 9, 4),
        "encoder_hidden_states": r(B, S, 24),
        "audio_encoder_hidden_states": r(B, S, 24),
        "timestep": t(500.0, False),
        "encoder_attention_mask": torch.ones(B, S).bool(),
        "num_frames": 2,
        "height": H,
        "width": W,
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def lumina() -> tuple[Given, Given]:
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 3, "num_attention_heads": 3}
    config |= {"num_kv_heads": 1, "multiple_of": 16, "ffn_dim_multiplier": None, "norm_eps": 1e-5, "scaling_factor": 1.0}
    return config, {"hidden_states": r(B, 4, 8, 10), "encoder_hidden_states": r(B, S, 32), "timestep": t(0.5, False)}


@family("LuminaNextDiT2DModel", "lumina_nextdit2d", reuse_module=False)
def _() -> tuple[Given, Given]:
    config, inputs = lumina()
    more = {"encoder_mask": torch.ones(B, S), "image_rotary_emb": r(384, 384, 4), "cross_attention_kwargs": {}}
    return {**config, "learn_sigma": False, "qk_norm": True, "cross_attention_dim": 32}, {**inputs, **more}


@family("Lumina2Transformer2DModel", "transformer_lumina2")
def _() -> tuple[Given, Given]:
    config, inputs = lumina()
    config |= {"num_refiner_layers": 1, "axes_dim_rope": (4, 2, 2), "axes_lens": (128, 128, 128), "cap_feat_dim": 32}
    return config, {**inputs, "encoder_attention_mask": torch.ones(B, S, dtype=torch.bool)}


@family("MiniMaxH3Transformer3DModel", "transformer_minimax_h3", text_first=True)
def _() -> tuple[Given, Given]:
    config = {**PAIR, "hidden_size": 24, "num_layers": 3, "num_refiner_layers": 2, "ffn_dim": 48, "in_channels": 4, "audio_in_channels": 6}
    config |= {"patch_size": (1, 2, 2), "text_dim": 8, "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 12, "rope_freq_dim": 2}
    length = S + 6 + H * W
    tags = torch.tensor([1] * S + [2] * 6 + [0] * (H * W))
    return config, {
        "hidden_states": r(B, H * W, 16),
        "audio_hidden_states": r(B, 6, 6),
        "encoder_hidden_states": r(B, S, 8),
        "timestep": torch.tensor([500.0, 400.0]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.arange(length)[:, None].repeat(1, 3).float(),
        "video_indices": torch.arange(S + 6, length),
        "audio_indices": torch.arange(S, S + 6),
        "text_indices": torch.arange(S),
    }


@family("MiniMaxMusic3Transformer1DModel", "transformer_minimax_music3")
def _() -> tuple[Given, Given]:
    config = {"in_channels": 8, "condition_dim": 16, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "ff_inner_dim": 48}
    inputs = {"hidden_states": r(B, 8, 20), "encoder_hidden_states": r(B, 20, 16), "timestep": t(0.5, False)}
    return {**config, "rotary_dim": 4, "fourier_embedding_dim": 8}, inputs


@family("MiniMaxMusic3RVQDepthDecoder", "minimax_music3_rvq_depth_decoder")
def _() -> tuple[Given, Given]:
    config = {"hidden_size": 32, "num_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "audio_vocab_size": 64}
    return config, {"inputs_embeds": r(B, 11, 32)}


@family("MotifVideoTransformer3DModel", "transformer_motif_video", text_first=False)
def _() -> tuple[Given, Given]:
    config = {"in_channels": 33, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    config |= {"num_single_layers": 2, "num_decoder_layers": 0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 32}
    config |= {"image_embed_dim": 4, "rope_axes_dim": (4, 4, 4)}
    return config, {"hidden_states": r(B, 33, 2, H, W), "encoder_hidden_states": r(B, S, 32), "timestep": t(500)}


@family("NucleusMoEImageTransformer2DModel", "transformer_nucleusmoe_image", text_first=False)
def _() -> tuple[Given, Given]:
    config = {**PAIR, "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 24}
    config |= {"axes_dims_rope": (8, 4, 4), "moe_enabled": False, "capacity_factors": [8.0, 8.0, 8.0]}
    return config, {
        "hidden_states": r(B, H * W, 16),
        "encoder_hidden_states": r(B, S, 24),
        "encoder_hidden_states_mask": torch.ones(B, S, dtype=torch.long),
        "timestep": t(0.5, False),
        "img_shapes": [(1, H, W)] * B,
    }


@family("OmniGenTransformer2DModel", "transformer_omnigen")
def _() -> tuple[Given, Given]:
    config = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48, "num_layers": 3}
    config |= {"pad_token_id": 0, "vocab_size": 1000, "in_channels": 4, "time_step_dim": 4}
    config["rope_scaling"] = {"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]}
    length = S + 1 + H * W
    return config, {
        "hidden_states": r(B, 4, 8, 10),
        "timestep": t(0.5, False),
        "input_ids": torch.randint(0, 10, (B, S)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(B, length, length),
        "position_ids": torch.arange(length).repeat(B, 1),
    }


@family("PRXTransformer2DModel", "transformer_prx", reuse_module=False)
def _() -> tuple[Given, Given]:
    config = {"in_channels": 4, "patch_size": 2, "context_in_dim": 24, "hidden_size": 32, "mlp_ratio": 3.5, "num_heads": 2, "depth": 3}
    inputs = {"hidden_states": r(B, 4, 8, 10), "timestep": t(0.5, False), "encoder_hidden_states": r(B, S, 24)}
    return {**config, "axes_dim": [8, 8]}, inputs


@family("PriorTransformer", "prior_transformer")
def _() -> tuple[Given, Given]:
    """As Shap-E has it: the sample is a sequence (of the other priors it is a single token)."""
    config = {**PAIR, "num_layers": 3, "embedding_dim": 8, "num_embeddings": 22, "additional_embeddings": 0, "time_embed_dim": 24}
    config |= {"time_embed_act_fn": "gelu", "norm_in_type": "layer", "embedding_proj_norm_type": "layer", "encoder_hid_proj_type": None}
    config |= {"added_emb_type": None, "embedding_proj_dim": 12, "clip_embed_dim": 16}
    return config, {"hidden_states": r(B, 20, 8), "timestep": t(500), "proj_embedding": r(B, 12)}


@family("QwenImage21Transformer2DModel", "transformer_qwenimage21")
def _() -> tuple[Given, Given]:
    config = {**PAIR, "in_channels": 8, "out_channels": 8, "num_layers": 3, "context_in_dim": 24, "axes_dims_rope": (4, 4, 8)}
    slots = H * W // 4  # of the target image, each for 2x2 of its tokens
    return config, {
        "hidden_states": r(B, H * W, 8),
        "encoder_hidden_states": r(B, S, 24),
        "timestep": t(0.5, False),
        "img_shapes": [[(1, H, W)]] * B,
        "img_mask": torch.tensor([[False] * S + [True] * slots] * B),
    }


@family("RFD4ProteinaTransformer", "transformer_rfd4_proteina", reuse_module=False)
def _() -> tuple[Given, Given]:
    config = {"nlayers": 3, "token_dim": 32, "nheads": 2, "dim_cond": 24, "pair_repr_dim": 12, "latent_dim": 8, "token_type_emb_dim": 4}
    config |= {"cath_emb_dim": 4, "t_emb_dim": 16, "seq_sep_dim": 6, "xt_pair_dist_dim": 10, "tri_mult_c": 6}
    config["feats_seq"] = ("xt_bb_ca", "xt_local_latents", "token_type", "sequence_probabilities")
    yes = torch.ones(B, 20, dtype=torch.bool)
    return config, {
        "bb_ca": r(B, 20, 3),
        "local_latents": r(B, 20, 8),
        "bb_ca_time": t(0.5, False),
        "local_latents_time": t(0.5, False),
        "padding_mask": yes,
        "token_type": torch.zeros(B, 20, dtype=torch.long),
        "conditioning": {
            "is_in_context_conditioning": ~yes,
            "supports_local_latent": yes,
            "condition_index-group_1_token": torch.arange(20).repeat(B, 1) // 5,
            "molecule_iid": torch.arange(20).repeat(B, 1) // 10,
            "molecule_entity_id": torch.zeros(B, 20),
            "token_bond_path_length": torch.arange(20).repeat(B, 20, 1) % 6,
        },
    }


@family("SanaWMTransformer3DModel", "transformer_sana_wm")
def _() -> tuple[Given, Given]:
    config = {"in_channels": 4, "num_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2, "linear_head_dim": 16}
    config |= {"chunk_plucker_channels": 12, "caption_channels": 24, "mlp_ratio": 2.0}
    return config, {
        "hidden_states": r(B, 4, 2, H, W),
        "timestep": torch.full((B, 1, 2), 500.0),
        "encoder_hidden_states": r(B, 1, S, 24),
        "encoder_attention_mask": torch.ones(B, S),
        "camera_conditions": torch.cat([torch.eye(4).flatten().repeat(B, 2, 1), torch.tensor([5.0, 5.0, 2.5, 2.0]).repeat(B, 2, 1)], -1),
        "chunk_plucker": r(B, 12, 2, H, W),
    }


@family("SanaWMLTX2RefinerTransformer3DModel", "transformer_sana_wm_refiner")
def _() -> tuple[Given, Given]:
    config = {**PAIR, **LATENT, "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2}
    config |= {"audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 3, "caption_channels": 24}
    angles = r(B, 2 * H * W, 32)
    return config, {
        "hidden_states": r(B, 2 * H * W, 4),
        "encoder_hidden_states": r(B, S, 24),
        "timestep": torch.full((B, 2 * H * W), 500.0),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": torch.ones(B, S),
    }


@family("SanaVideoTransformer3DModel", "transformer_sana_video", mixer="ff", grid=(2, H, W))
def _() -> tuple[Given, Given]:
    config = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3}
    config |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16}
    config |= {"sample_size": 8, "patch_size": (1, 2, 2), "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32}
    return config, {"hidden_states": r(B, 16, 2, 8, 10), "encoder_hidden_states": r(B, S, 16), "timestep": t(500)}


@family("StableAudioDiTModel", "stable_audio_transformer")
def _() -> tuple[Given, Given]:
    config = {"sample_size": 20, "in_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2}
    config |= {"num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 32, "time_proj_dim": 8}
    angles = r(21, 8)
    return {**config, "global_states_input_dim": 12, "cross_attention_input_dim": 24}, {
        "hidden_states": r(B, 4, 20),
        "timestep": t(0.5, False),
        "encoder_hidden_states": r(B, S, 24),
        "global_hidden_states": r(B, 1, 12),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


@family("StableAudio3DiTModel", "transformer_stable_audio3", std=0.05)
def _() -> tuple[Given, Given]:
    config = {"io_channels": 8, "patch_size": 1, "embed_dim": 32, "depth": 3, "num_heads": 4, "cond_token_dim": 16, "global_cond_dim": 12}
    config |= {"local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2, "num_memory_tokens": 3}
    return {**config, "use_differential_attention": False}, {
        "hidden_states": r(B, 8, 20),
        "timestep": t(0.5, False),
        "encoder_hidden_states": r(B, S, 16),
        "global_hidden_states": r(B, 12),
    }


@family("Transformer2DModel", "transformer_2d")
def _() -> tuple[Given, Given]:
    config = {**PAIR, "in_channels": 32, "num_layers": 3, "norm_num_groups": 8, "cross_attention_dim": 24, "sample_size": 8}
    return config, {"hidden_states": r(B, 32, H, W), "encoder_hidden_states": r(B, S, 24), "timestep": t(500)}


@family("TransformerTemporalModel", "transformer_temporal")
def _() -> tuple[Given, Given]:
    config = {**PAIR, "in_channels": 8, "num_layers": 3, "norm_num_groups": 4}
    return config, {"hidden_states": r(2 * 20, 8, 3, 2), "timestep": t(500), "num_frames": 20}


@family("T5FilmDecoder", "t5_film_transformer")
def _() -> tuple[Given, Given]:
    config = {"input_dims": 6, "targets_length": 20, "d_model": 32, "num_layers": 3, "num_heads": 2, "d_kv": 16, "d_ff": 48}
    return config, {
        "decoder_input_tokens": r(B, 20, 6),
        "encodings_and_masks": [(r(B, S, 32), torch.ones(B, S)), (r(B, 5, 32), torch.ones(B, 5))],
        "decoder_noise_time": t(0.5, False),
    }


@family("WanAnimateTransformer3DModel", "transformer_wan_animate")
def _() -> tuple[Given, Given]:
    config, inputs = wan(in_channels=12, latent_channels=4, image_dim=None, motion_encoder_size=16, motion_style_dim=8, motion_dim=4)
    config |= {"motion_encoder_dim": 8, "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2}
    config |= {"num_layers": 4, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}}
    more = {"pose_hidden_states": r(B, 4, 2, 8, 10), "face_pixel_values": r(B, 3, 8, 16, 16)}
    return config, {**inputs, "hidden_states": r(B, 12, 3, 8, 10), **more}


@family("WanAnimate2Transformer3DModel", "transformer_wan_animate_2")
def _() -> tuple[Given, Given]:
    owner = importlib.import_module("diffusers.models.transformers.transformer_wan_animate_2")
    config = {"text_len": S, "in_dim": 12, "dim": 24, "ffn_dim": 48, "freq_dim": 16, "text_dim": 16, "out_dim": 4, "num_heads": 2}
    config |= {"num_layers": 3, "use_img_emb": False}
    return config, {
        "hidden_states": [r(4, 2, 8, 10)],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [r(S, 16)],
        "condition_latents": [r(8, 2, 8, 10)],
        "kv_cache": owner.WanAnimate2KVCache(3),
        "kv_cache_mode": "extract",
        "seq_len": 2 * H * W,
        "offset_grid_sizes": torch.tensor([[2, H, W]]),
    }


@family("WanVACETransformer3DModel", "transformer_wan_vace")
def _() -> tuple[Given, Given]:
    config, inputs = wan(vace_layers=[0, 2], vace_in_channels=12)
    return config, {**inputs, "control_hidden_states": r(B, 12, 2, 8, 10)}


@family("ZImageTransformer2DModel", "transformer_z_image", text_first=False)
def _() -> tuple[Given, Given]:
    config = {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 48, "n_layers": 3, "n_refiner_layers": 1}
    config |= {"n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "cap_feat_dim": 24, "axes_dims": [8, 8, 8], "axes_lens": [256, 32, 32]}
    return config, {"x": [r(16, 1, 8, 10) for _ in range(B)], "t": t(0.5, False), "cap_feats": [r(S, 24) for _ in range(B)]}
