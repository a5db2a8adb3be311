"""Open-Sora-Plan v1.3's text-to-video transformer, ``OpenSoraT2V_v1_3-2B/122``, which diffusers has no class for.

Architecture, configuration keys and parameter names: https://github.com/PKU-YuanGroup/Open-Sora-Plan,
``opensora/models/diffusion/opensora_v1_3`` and ``docs/Report-v1.3.0.md``. The published model carries its tokens as [N, B, C],
this one as [B, N, C], which no parameter depends on: the official checkpoint fits, and the compiler finds its stream.

    z [B, c, F, H, W] ──2×2 patches──▶ x [B, N, C], N = F·H/2·W/2      t ──adaLN-single──▶ 6 factors for every block
    block:  x += gate · self-attention(modulate(x))      rotary in three thirds: frame, row, column
            x += cross-attention(x, text)
            x += gate · MLP(modulate(x))

Blocks 2 to 29 use *Skiparse* attention: with k = ``sparse_n``, token p attends to the tokens q of its own group only,

    even blocks (single skip)   p mod k = q mod k
    odd blocks (group skip)     ⌊p/k⌋ mod k = ⌊q/k⌋ mod k

In a P-step the groups come along as a number a token, which is gathered with the tokens: whichever tokens are kept, each
attends to those of its group, by a mask over pairs. That equals the published form, which reshapes N tokens into k shorter
sequences. Running on all tokens, the model goes group by group too, at a k-th of the cost, wherever the k groups have one size.
The published one pads other counts with zero keys at a bias of -9980. That is the same but for groups of masked tokens alone.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from tokencache_compile.grouped_attention import attend_in_groups, same_group_mask

Skip = Literal["none", "single", "group"]

# The published rule names blocks by number, whatever the depth: the first two are dense, and those from 30 on.
FIRST_SPARSE, END_SPARSE = 2, 30
MASKED = -10000.0


def skip_of_block(index: int, sparse: bool) -> Skip:
    """How block ``index`` gathers the tokens that attend to each other."""
    if not sparse or not FIRST_SPARSE <= index < END_SPARSE:
        return "none"
    return "group" if index % 2 else "single"


def skiparse_group(tokens: int, sparse_n: int, skip: Skip, device: torch.device) -> Tensor:
    """The group [N] of each token, in 0 … ``sparse_n`` - 1."""
    place = torch.arange(tokens, device=device)
    return (place if skip == "single" else place // sparse_n) % sparse_n


def equal_groups(tokens: int, sparse_n: int, skip: Skip) -> int:
    """How many groups the tokens make, if all groups have one size; else 0."""
    run = 1 if skip == "single" else sparse_n  # neighbours of one group
    if tokens % (run * sparse_n) == 0:
        return sparse_n
    few = tokens < run * sparse_n and (tokens % run == 0 or tokens < run)
    return -(-tokens // run) if few else 0


def rotary_tables(
    grid: tuple[int, int, int], scales: tuple[float, float, float], dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, dim] of tokens in a grid (frames, rows, columns): a third of the channels for each axis.

    Within a third, channels c and c + dim/6 turn together. As published, angles are rounded to ``dtype`` before the cosine.
    """
    third = dim // 3
    frequency = 10000.0 ** (-torch.arange(0, third, 2, device=device, dtype=torch.float32) / third)
    angles = []
    for axis, (size, scale) in enumerate(zip(grid, scales, strict=True)):
        place = torch.arange(size, device=device, dtype=torch.float32) / scale
        along = (place[:, None] * frequency).repeat(1, 2)
        shape = [1, 1, 1, third]
        shape[axis] = size
        angles.append(along.view(shape).expand(*grid, third))
    angle = torch.cat(angles, dim=-1).flatten(0, 2).to(dtype)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn ``x`` [B, N, heads, D] by the tables [B, N, D]; see :func:`rotary_tables`."""
    first, second = x.unflatten(-1, (3, 2, -1)).unbind(-2)
    turned: Tensor = torch.stack((-second, first), dim=-2).flatten(-3)
    return x * cosine[:, :, None] + turned * sine[:, :, None]


class _Attention(nn.Module):
    """The four projections of an attention, under the published names."""

    def __init__(self, width: int, context_width: int, heads: int, head_dim: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=bias)
        self.to_k = nn.Linear(context_width, inner, bias=bias)
        self.to_v = nn.Linear(context_width, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, width), nn.Dropout(dropout)])

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, n, heads·D] → [B, n, heads, D]."""
        apart: Tensor = x.unflatten(-1, (self.heads, -1))
        return apart

    def _leave(self, attended: Tensor) -> Tensor:
        """[B, heads, N, D] → [B, N, C]."""
        out: Tensor = self.to_out[1](self.to_out[0](attended.transpose(1, 2).flatten(2)))
        return out


class SkiparseAttention(_Attention):
    """Self-attention: rotary, and among the tokens of one group where there are groups."""

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, group: Tensor | None, num_groups: int, token_bias: Tensor | None) -> Tensor:
        """[B, N, C] → [B, N, C]; for the inputs see :class:`OpenSoraBlock`."""
        query = rotate(self._by_head(self.to_q(x)), cosine, sine).transpose(1, 2)
        key = rotate(self._by_head(self.to_k(x)), cosine, sine).transpose(1, 2)
        value = self._by_head(self.to_v(x)).transpose(1, 2)
        # An exported block must hold for any subset of the tokens, so it gets the mask over pairs.
        if group is not None and num_groups and not torch.compiler.is_exporting():
            return self._leave(attend_in_groups(query, key, value, group, num_groups, token_bias))
        if group is not None:
            mask: Tensor | None = same_group_mask(group, token_bias)
        else:
            mask = None if token_bias is None else token_bias[:, None, None, :]
        return self._leave(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


class TextAttention(_Attention):
    """Cross-attention to the text: no rotary. Every token sees the whole text, in sparse blocks too."""

    def forward(self, x: Tensor, text: Tensor, text_bias: Tensor | None) -> Tensor:
        """``x`` [B, N, C], ``text`` [B, T, C], ``text_bias`` [B, T] → [B, N, C]."""
        query, key, value = (self._by_head(y).transpose(1, 2) for y in (self.to_q(x), self.to_k(text), self.to_v(text)))
        mask = None if text_bias is None else text_bias[:, None, None, :]
        return self._leave(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


class OpenSoraBlock(nn.Module):
    """One block; ``config`` is the model's."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        heads, head_dim, bias, dropout = config.num_attention_heads, config.attention_head_dim, config.attention_bias, config.dropout
        affine, eps = config.norm_elementwise_affine, config.norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps, elementwise_affine=affine)
        self.attn1 = SkiparseAttention(width, width, heads, head_dim, bias, dropout)
        self.norm2 = nn.LayerNorm(width, eps=eps, elementwise_affine=affine)
        self.attn2 = TextAttention(width, config.cross_attention_dim or width, heads, head_dim, bias, dropout)
        self.ff = FeedForward(width, dropout=dropout, activation_fn=config.activation_fn)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        group: Tensor | None = None,
        num_groups: int = 0,
        token_bias: Tensor | None = None,
        text_bias: Tensor | None = None,
    ) -> Tensor:
        """One block on any set of tokens.

        Args:
            hidden_states: [B, N, C].
            timestep: the factors of adaLN-single [B, 6·C].
            encoder_hidden_states: the text [B, T, C].
            rotary: cosines and sines, each [B, N, D].
            group: the group [B, N] of each token in a sparse block.
            num_groups: how many groups of one size there are, N being all tokens; 0 if they differ, or if N is some tokens.
            token_bias: [B, N], added to the scores of keys in self-attention.
            text_bias: [B, T], the same in cross-attention.
        """
        factors = self.scale_shift_table + timestep.unflatten(-1, (6, -1))  # [B, 6, C]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = factors.chunk(6, dim=1)
        x = hidden_states
        x = gate * self.attn1(self.norm1(x) * (1 + scale) + shift, *rotary, group, num_groups, token_bias) + x
        x = self.attn2(x, encoder_hidden_states, text_bias) + x
        moved: Tensor = gate_mlp * self.ff(self.norm2(x) * (1 + scale_mlp) + shift_mlp) + x
        return moved


class _PatchEmbedding(nn.Module):
    """Frames cut into patches, one after the other: the published ``PatchEmbed2D``."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, z: Tensor) -> Tensor:
        """[B, c, F, H, W] → [B, F·H/p·W/p, C]."""
        patches: Tensor = self.proj(z.transpose(1, 2).flatten(0, 1)).unflatten(0, (z.shape[0], z.shape[2]))
        return patches.movedim(2, -1).flatten(1, 3)


class OpenSoraT2V_v1_3(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Text-to-video transformer; the class is named as in the configuration of the official checkpoint.

    The configuration keys are the published ones. ``only_cross_attention``, ``double_self_attention`` and
    ``upcast_attention`` are False in every published model, and ``patch_size_t`` is 1: anything else is refused.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_attention_heads: int = 24,
        attention_head_dim: int = 96,
        in_channels: int = 8,
        out_channels: int | None = None,
        num_layers: int = 32,
        dropout: float = 0.0,
        cross_attention_dim: int | None = 2304,
        attention_bias: bool = True,
        sample_size: int | tuple[int, int] | None = None,
        sample_size_t: int | None = None,
        patch_size: int = 2,
        patch_size_t: int = 1,
        activation_fn: str = "gelu-approximate",
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        interpolation_scale_h: float = 1.0,
        interpolation_scale_w: float = 1.0,
        interpolation_scale_t: float = 1.0,
        sparse1d: bool = True,
        sparse_n: int = 4,
    ) -> None:
        super().__init__()
        if only_cross_attention or double_self_attention or upcast_attention or patch_size_t != 1:
            raise ValueError(
                "OpenSoraT2V_v1_3 was asked for with only_cross_attention, double_self_attention, upcast_attention or "
                "patch_size_t other than 1; no published checkpoint has them."
            )
        if attention_head_dim % 6:
            raise ValueError(
                f"attention_head_dim={attention_head_dim} was asked for; the rotary embedding turns pairs of channels in three "
                "equal parts, so it must be a multiple of 6."
            )
        width = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels
        self.pos_embed = _PatchEmbedding(patch_size, in_channels, width)
        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=width)
        self.adaln_single = AdaLayerNormSingle(width)
        self.transformer_blocks = nn.ModuleList(OpenSoraBlock(self.config, width) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size**2 * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **unread: Any,
    ) -> Any:
        """Predict for a noisy latent video.

        Args:
            hidden_states: latents [B, c, F, H, W]; H and W are multiples of the patch size.
            timestep: [B].
            encoder_hidden_states: text states [B, T, caption_channels], or [B, 1, T, caption_channels] as published.
            attention_mask: [B, F, H, W], 1 where there is video; a token is there if any place of its patch is.
            encoder_attention_mask: [B, T] or [B, 1, T], 1 where there is text.
            return_dict: whether to return a ``Transformer2DModelOutput`` and not a tuple.
            unread: what the published pipeline passes to all versions (``motion_score``, ``pooled_projections``).

        Returns:
            [B, out_channels, F, H, W].
        """
        batch, _, frames, height, width = hidden_states.shape
        patch = self.config.patch_size
        grid = (frames, height // patch, width // patch)
        x = self.pos_embed(hidden_states.to(self.dtype))
        factors, embedded = self.adaln_single(timestep, {"resolution": None, "aspect_ratio": None}, batch, x.dtype)
        text = self.caption_projection(encoder_hidden_states.flatten(1, -2))
        if attention_mask is not None:
            attention_mask = F.max_pool2d(attention_mask.to(x.dtype), patch)
        biases = {"token_bias": _as_bias(attention_mask, x.dtype), "text_bias": _as_bias(encoder_attention_mask, x.dtype)}
        scales = (self.config.interpolation_scale_t, self.config.interpolation_scale_h, self.config.interpolation_scale_w)
        tables = rotary_tables(grid, scales, self.config.attention_head_dim, x.dtype, x.device)
        rotary = tuple(table.expand(batch, -1, -1) for table in tables)
        groups = self._groups(x)
        for index, block in enumerate(self.transformer_blocks):
            x = block(x, factors, text, rotary, *groups[skip_of_block(index, self.config.sparse1d)], **biases)
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        video = _unpatch(x, grid, patch, self.out_channels)
        return Transformer2DModelOutput(sample=video) if return_dict else (video,)

    def _groups(self, x: Tensor) -> dict[Skip, tuple[Tensor | None, int]]:
        """For each kind of block: the group [B, N] of each token, and the number of groups if they have one size."""
        batch, tokens, _ = x.shape
        sparse_n = self.config.sparse_n
        groups: dict[Skip, tuple[Tensor | None, int]] = {"none": (None, 0)}
        kinds: tuple[Skip, Skip] = ("single", "group")
        for skip in kinds:
            group = skiparse_group(tokens, sparse_n, skip, x.device).expand(batch, -1)
            groups[skip] = (group, equal_groups(tokens, sparse_n, skip))
        return groups


def _as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """1 = there, 0 = not, as the published bias on scores: [B, …] → [B, n]."""
    return None if mask is None else (1 - mask.flatten(1).bool().to(dtype)) * MASKED


def _unpatch(x: Tensor, grid: tuple[int, int, int], patch: int, channels: int) -> Tensor:
    """[B, F·h·w, p·p·c] → [B, c, F, h·p, w·p]."""
    tiles: Tensor = x.unflatten(1, grid).unflatten(-1, (patch, patch, channels))  # [B, F, h, w, p, p, c]
    return tiles.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
