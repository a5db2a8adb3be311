"""Independent reference of token caching: plain loops over the eager diffusers modules, no graphs.

It shares no code with `tokencache_compile`, so the two can only agree by both being right. Speed is no concern here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor

Block = Any  # a BasicTransformerBlock, whose submodules are not typed
CONTEXTS = ("kept", "full", "cached", "reuse")
SCORERS = ("change", "norm", "external")
SELECTIONS = ("sample", "batch", "pair")


@dataclass
class BlockState:
    """What one cached block remembers between steps."""

    history: list[Tensor]  # forecast + 1 updates [B, N, C], newest first, in the stream's dtype
    stamps: Tensor  # [B, N, forecast + 1] fp32: the step each history entry was computed at, -1 = never
    score: Tensor  # [B, N] fp32; stays 0 for the scorer "external"
    key: Tensor | None = None  # [B, heads, N, head_dim], context "cached"
    value: Tensor | None = None  # [B, heads, N, head_dim], context "cached"
    attention: list[Tensor] | None = None  # outputs of attn1 [B, N, C] before the gate, newest first, context "reuse"


@dataclass
class Conditioning:
    """What a block sees besides the stream. All of it is a row's, none a token's, but for `self_mask`."""

    timestep: Tensor  # DiT: [B] raw timesteps. PixArt: [B, 6C] from adaln_single
    class_labels: Tensor | None = None  # DiT
    embedded_timestep: Tensor | None = None  # PixArt, epilogue only
    text: Tensor | None = None  # PixArt
    text_mask: Tensor | None = None  # PixArt, bias [B, 1, text tokens]
    self_mask: Tensor | None = None  # PixArt, bias [B, 1, N] over the keys of self-attention


@dataclass
class Modulation:
    """adaLN of one block at one step: the normed input of attn1 and the [B, 1, C] factors that come later."""

    normed: Tensor
    gate_msa: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Row-wise `tokens[b, index[b]]` for tokens [B, N, ...] and index [B, n]."""
    return torch.stack([row[places] for row, places in zip(tokens, index, strict=True)])


def put(tokens: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of tokens [B, N, ...] with `[b, index[b]]` replaced by values [B, n, ...]."""
    out = tokens.clone()
    for b in range(tokens.shape[0]):
        out[b, index[b]] = values[b]
    return out


def forecast_update(history: Sequence[Tensor], stamps: Tensor, step: int) -> Tensor:
    """Polynomial extrapolation of each token's update to `step`, in fp32, through its valid entries. [B, N, C].

    The highest degree whose Lagrange weights do not add up to more than 7 in absolute value; one list of stamps at a time.
    """
    u = torch.stack([entry.float() for entry in history])
    result = u[0].clone()
    for times in stamps.flatten(0, 1).unique(dim=0).tolist():
        nodes = [t for t in times if t >= 0] if len(times) > 1 else times[:1]
        tokens = (stamps == torch.tensor(times, device=stamps.device)).all(-1)
        for count in range(len(nodes), 0, -1):
            weights = [
                prod((step - other) / (node - other) for other in nodes[:count] if other != node) for node in nodes[:count]
            ]
            if sum(map(abs, weights)) <= 7:
                result[tokens] = sum(w * entry[tokens] for w, entry in zip(weights, u, strict=False))
                break
    return result


def choose(scores: Tensor, count: int, selection: str) -> Tensor:
    """Indices [B, count], ascending, of the tokens with the largest scores [B, N]."""
    scores = scores.float()
    rows = scores.shape[0]
    if selection == "batch":
        scores = scores.mean(dim=0, keepdim=True).expand(rows, -1)
    elif selection == "pair":
        if rows % 2:
            raise ValueError(f"selection 'pair' needs an even batch, got {rows}")
        scores = ((scores[: rows // 2] + scores[rows // 2 :]) / 2).repeat(2, 1)
    # a stable sort fixes ties (the lower index wins), which topk would not
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
    return best.sort(dim=1).values


class PlainLoop:
    """I-steps and P-steps of a cached DiT or PixArt, written out block by block."""

    def __init__(
        self,
        model: DiTTransformer2DModel | PixArtTransformer2DModel,
        keep: Sequence[int],
        last_k: int,
        context: str,
        forecast: int,
        scorer: str,
        selection: str = "sample",
        history: str = "full_steps",
    ) -> None:
        if not isinstance(model, (DiTTransformer2DModel, PixArtTransformer2DModel)):
            raise TypeError(f"no reference for {type(model).__name__}")
        if model.training:
            raise ValueError("call model.eval() first: in training mode DiT drops class labels at random")
        if context not in CONTEXTS or scorer not in SCORERS or selection not in SELECTIONS or forecast not in (0, 1, 2):
            raise ValueError(f"unknown option in {context=}, {forecast=}, {scorer=}, {selection=}")
        depth = len(model.transformer_blocks)
        if not 0 <= last_k <= depth or len(keep) != depth - last_k or min(keep, default=0) < 0:
            raise ValueError(f"keep needs {depth - last_k} counts >= 0, got {list(keep)}")
        for block in model.transformer_blocks:
            check_block(block)
        self.model: Any = model  # diffusers' modules type their submodules too loosely to check against
        self.keep = list(keep)
        self.last_k = last_k
        self.context = context
        self.forecast = forecast
        self.scorer = scorer
        self.selection = selection
        if history not in ("full_steps", "computed"):
            raise ValueError(f"unknown {history=}")
        self.history = history  # "computed": what a P-step recomputes enters the history; "full_steps": it does not
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: list[BlockState] = []  # one a cached block; filled by the first I-step
        self.chosen: list[Tensor] = []  # [B, n_l] of each cached block at the last P-step

    @torch.no_grad()
    def step(self, step: int, full: bool, scores: Tensor | None = None, **model_kwargs: Any) -> Tensor:
        """One model evaluation; `step` counts 0, 1, 2 ... in sampling order. `scores` is not read on an I-step."""
        sample: Tensor = model_kwargs.pop("hidden_states")
        x, cond = self._prologue(sample, **model_kwargs)
        if not self.state:
            if not full:
                raise RuntimeError("the first step must be an I-step: there is nothing cached yet")
            self.state = [self._empty_state(x) for _ in self.keep]

        if not full:
            self.chosen = self._select(scores)
        blocks = self.model.transformer_blocks
        cached_depth = len(self.keep)
        for layer in range(cached_depth):
            if full:
                x = self._full_block(blocks[layer], x, cond, self.state[layer], step)
            else:
                x = self._partial_block(blocks[layer], x, cond, self.state[layer], step, self.chosen[layer])
        for layer in range(cached_depth, len(blocks)):
            x, _, _, _ = run_full(blocks[layer], x, cond)
        return self._epilogue(x, cond, sample)

    # --- the two kinds of block -------------------------------------------------------------------------------------

    def _full_block(self, block: Block, x: Tensor, cond: Conditioning, state: BlockState, step: int) -> Tensor:
        """An I-step's block: every token is computed and everything cached is replaced."""
        x_out, key, value, attention = run_full(block, x, cond)
        update = x_out - x
        if self.scorer != "external":
            state.score = self._score(update, state.history[0])
        state.history = [update, *state.history[:-1]]
        now = torch.full_like(state.stamps[..., :1], float(step))
        state.stamps = torch.cat([now, state.stamps[..., :-1]], dim=-1)
        if self.context == "cached":
            state.key, state.value = key, value
        if self.context == "reuse":
            state.attention = [attention, *(state.attention or [torch.zeros_like(attention)] * (self.forecast + 1))[:-1]]
        return x_out

    def _partial_block(self, block: Block, x: Tensor, cond: Conditioning, state: BlockState, step: int, index: Tensor) -> Tensor:
        """A P-step's cached block: the tokens at `index` are computed, every other one adds its forecast."""
        # from the state as it stood before this step; what it says of the kept tokens is overwritten below
        moved = x + forecast_update(state.history, state.stamps, step).to(x.dtype)
        if index.shape[1] == 0:
            return moved

        x_kept = take(x, index)
        mod = modulate(block, x_kept, cond)
        if self.context == "kept":
            key, value = keys_and_values(block, mod.normed)
            mask = cond.self_mask
            if mask is not None:
                mask = take(mask.transpose(1, 2), index).transpose(1, 2)
            attention = attend(block, mod.normed, key, value, mask)
        elif self.context == "full":
            key, value = keys_and_values(block, modulate(block, x, cond).normed)
            attention = attend(block, mod.normed, key, value, cond.self_mask)
        elif self.context == "cached":
            assert state.key is not None and state.value is not None
            key, value = keys_and_values(block, mod.normed)
            # take and put want the tokens in dimension 1
            state.key = put(state.key.transpose(1, 2), index, key.transpose(1, 2)).transpose(1, 2)
            state.value = put(state.value.transpose(1, 2), index, value.transpose(1, 2)).transpose(1, 2)
            attention = attend(block, mod.normed, state.key, state.value, cond.self_mask)
        else:
            assert state.attention is not None
            attention = state.attention[0]
            if self.history == "full_steps":  # the stamps are those of the I-steps, which the attention was computed at too
                attention = forecast_update(state.attention, state.stamps, step).to(x.dtype)
            attention = take(attention, index)
        out_kept = after_attention(block, x_kept, attention, mod, cond)
        if self.history == "full_steps":
            return put(moved, index, out_kept)

        update = out_kept - x_kept
        old = [take(entry, index) for entry in state.history]
        old_stamps = take(state.stamps, index)
        if self.scorer != "external":
            state.score = put(state.score, index, self._score(update, old[0]))
        state.history = [put(entry, index, new) for entry, new in zip(state.history, [update, *old[:-1]], strict=True)]
        now = torch.full_like(old_stamps[..., :1], float(step))
        state.stamps = put(state.stamps, index, torch.cat([now, old_stamps[..., :-1]], dim=-1))
        return put(moved, index, out_kept)

    # --- selection --------------------------------------------------------------------------------------------------

    def _select(self, scores: Tensor | None) -> list[Tensor]:
        """The index set of every cached block, all fixed before the first block runs."""
        if self.scorer == "external":
            if scores is None:
                raise ValueError("scorer 'external' needs scores [B, L_cached, N] on a P-step")
            per_block = list(scores.unbind(dim=1))
        else:
            if scores is not None:
                raise ValueError(f"scores given, but the scorer is {self.scorer!r}")
            per_block = [state.score for state in self.state]
        chosen = []
        for block_scores, state, count in zip(per_block, self.state, self.keep, strict=True):
            if block_scores.shape != state.score.shape or count > state.score.shape[1]:
                raise ValueError(f"scores {tuple(block_scores.shape)}, {count} to keep, state {tuple(state.score.shape)}")
            chosen.append(choose(block_scores, count, self.selection))
        return chosen

    def _score(self, update: Tensor, previous: Tensor) -> Tensor:
        difference = update.float() - previous.float() if self.scorer == "change" else update.float()
        return difference.square().sum(dim=-1).sqrt()

    def _empty_state(self, x: Tensor) -> BlockState:
        rows, tokens, _ = x.shape
        return BlockState(
            history=[torch.zeros_like(x) for _ in range(self.forecast + 1)],
            stamps=torch.full((rows, tokens, self.forecast + 1), -1.0, device=x.device),
            score=torch.zeros(rows, tokens, device=x.device),
        )

    # --- what the model does before and after its blocks ------------------------------------------------------------

    def _prologue(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,  # accepted so that the model's own kwargs can be passed on as they are
    ) -> tuple[Tensor, Conditioning]:
        if cross_attention_kwargs:
            raise ValueError(f"the plain loop takes no cross_attention_kwargs, and was given {sorted(cross_attention_kwargs)}")
        x = self.model.pos_embed(sample)
        if isinstance(self.model, DiTTransformer2DModel):
            if any(given is not None for given in (encoder_hidden_states, added_cond_kwargs, attention_mask, encoder_attention_mask)):
                raise TypeError("DiT takes hidden_states, timestep and class_labels only")
            return x, Conditioning(timestep=timestep, class_labels=class_labels)

        if class_labels is not None:
            raise TypeError("PixArt takes no class_labels")
        if encoder_hidden_states is None:
            # diffusers would let cross-attention turn into self-attention; among which tokens is not defined here
            raise ValueError("PixArt needs encoder_hidden_states")
        if self.model.use_additional_conditions and added_cond_kwargs is None:
            raise ValueError("this PixArt needs added_cond_kwargs")
        rows = sample.shape[0]
        six, embedded = self.model.adaln_single(timestep, added_cond_kwargs, batch_size=rows, hidden_dtype=x.dtype)
        text = encoder_hidden_states
        if self.model.caption_projection is not None:
            text = self.model.caption_projection(text).view(rows, -1, x.shape[-1])
        self_mask = as_bias(attention_mask, sample.dtype)
        if self_mask is not None and self_mask.shape != (rows, 1, x.shape[1]):
            raise ValueError(f"attention_mask must be [B, N] or [B, 1, N], got {tuple(self_mask.shape)} after conversion")
        return x, Conditioning(
            timestep=six,
            embedded_timestep=embedded,
            text=text,
            text_mask=as_bias(encoder_attention_mask, sample.dtype),
            self_mask=self_mask,
        )

    def _epilogue(self, x: Tensor, cond: Conditioning, sample: Tensor) -> Tensor:
        model = self.model
        if isinstance(model, DiTTransformer2DModel):
            embedding = model.transformer_blocks[0].norm1.emb(cond.timestep, cond.class_labels, hidden_dtype=x.dtype)
            shift, scale = model.proj_out_1(F.silu(embedding)).chunk(2, dim=1)
            x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        else:
            assert cond.embedded_timestep is not None
            shift, scale = (model.scale_shift_table[None] + cond.embedded_timestep[:, None]).chunk(2, dim=1)
            x = model.proj_out(model.norm_out(x) * (1 + scale) + shift)
        patch, channels = model.config.patch_size, model.out_channels
        rows, height, width = sample.shape[0], sample.shape[-2] // patch, sample.shape[-1] // patch
        # [B, N, p·p·c] -> [B, c, H, W]
        x = x.reshape(rows, height, width, patch, patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(rows, channels, height * patch, width * patch)


# --- one block, cut where the caches are --------------------------------------------------------------------------------


def check_block(block: Block) -> None:
    """Refuse what the functions below leave out, rather than get it wrong in silence."""
    attn = block.attn1
    known = (
        block.norm_type in ("ada_norm_zero", "ada_norm_single")
        and block.pos_embed is None
        and not hasattr(block, "fuser")
        and not block.only_cross_attention
        and attn.norm_q is None
        and attn.norm_k is None
        and attn.group_norm is None
        and attn.spatial_norm is None
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and not attn.fused_projections
    )
    if not known:
        raise ValueError("the plain loop knows the blocks of DiT and PixArt; this BasicTransformerBlock has other options")


def as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """diffusers' rule: a 2-d mask (1 = keep) becomes an additive bias [B, 1, keys], anything else already is one."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def modulate(block: Block, x: Tensor, cond: Conditioning) -> Modulation:
    """adaLN for the tokens x, however many they are: norm and modulation act on each token alone."""
    if block.norm_type == "ada_norm_zero":
        normed, *factors = block.norm1(x, cond.timestep, cond.class_labels, hidden_dtype=x.dtype)
        gate_msa, shift_mlp, scale_mlp, gate_mlp = (factor[:, None] for factor in factors)
    else:
        six = block.scale_shift_table[None] + cond.timestep.reshape(x.shape[0], 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = six.chunk(6, dim=1)
        normed = block.norm1(x) * (1 + scale_msa) + shift_msa
    return Modulation(normed, gate_msa, shift_mlp, scale_mlp, gate_mlp)


def split_heads(block: Block, tokens: Tensor) -> Tensor:
    """[B, n, C] -> [B, heads, n, head_dim]."""
    return tokens.view(tokens.shape[0], tokens.shape[1], block.attn1.heads, -1).transpose(1, 2)


def keys_and_values(block: Block, normed: Tensor) -> tuple[Tensor, Tensor]:
    """What enters scaled_dot_product_attention, of the given tokens."""
    return split_heads(block, block.attn1.to_k(normed)), split_heads(block, block.attn1.to_v(normed))


def attend(block: Block, normed: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The self-attention module's output (after to_out, before the gate) for queries from `normed`."""
    attn = block.attn1
    query = split_heads(block, attn.to_q(normed))
    if mask is not None:
        mask = mask[:, None].expand(-1, attn.heads, -1, -1)  # [B, heads, 1, keys]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    result: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
    return result


def after_attention(block: Block, x: Tensor, attention: Tensor, mod: Modulation, cond: Conditioning) -> Tensor:
    """The rest of the block, token by token: gate, residual, cross-attention (PixArt), MLP."""
    x = mod.gate_msa * attention + x
    if block.attn2 is not None:
        # PixArt has no norm before cross-attention; its norm2 belongs to the MLP
        x = block.attn2(x, encoder_hidden_states=cond.text, attention_mask=cond.text_mask) + x
    norm = block.norm3 if block.norm_type == "ada_norm_zero" else block.norm2
    normed = norm(x) * (1 + mod.scale_mlp) + mod.shift_mlp
    result: Tensor = mod.gate_mlp * block.ff(normed) + x
    return result


def run_full(block: Block, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole block on all tokens: its output, key, value and ungated attention output."""
    mod = modulate(block, x, cond)
    key, value = keys_and_values(block, mod.normed)
    attention = attend(block, mod.normed, key, value, cond.self_mask)
    return after_attention(block, x, attention, mod, cond), key, value, attention
