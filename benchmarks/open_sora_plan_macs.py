"""MACs of Open-Sora-Plan v1.3 (``OpenSoraT2V_v1_3-2B/122``), term by term, beside what the model and its compiled steps count.

    python benchmarks/open_sora_plan_macs.py                                  # 93 frames of 256×256, 512 text tokens, 50 steps
    python benchmarks/open_sora_plan_macs.py --frames 29 --size 480 --steps 25

Two forwards a step (guidance). Counted: linears, convolutions and both products of every attention, Skiparse ones at their
sparse cost. The paper's figures (Table V) add 4 an element for every LayerNorm without weights, as fvcore does. Needs no memory to speak
of: the model is on the meta device.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

import tokencache_compile as tc
from tokencache_compile.macs import MacCounter
from tokencache_compile.models.open_sora_plan import OpenSoraT2V_v1_3, equal_groups, skip_of_block
from tokencache_compile.passes.pipeline import StepPrograms, build_steps

VAE_FRAMES, VAE_SIZE = 4, 8  # the video autoencoder's strides; the first frame stands alone
GUIDANCE = 2
TIME_CHANNELS = 256  # sinusoids of the timestep


def latent_grid(frames: int, size: int) -> tuple[int, int, int]:
    """Frames, rows and columns of the latent video."""
    return (frames - 1) // VAE_FRAMES + 1, size // VAE_SIZE, size // VAE_SIZE


def terms(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, int]:
    """MACs of one forward of one sample, by formula."""
    width = config.num_attention_heads * config.attention_head_dim
    frames, rows, columns = grid
    tokens = frames * (rows // config.patch_size) * (columns // config.patch_size)
    patch, blocks = config.patch_size**2, config.num_layers
    dense = sparse = 0
    for index in range(blocks):
        skip = skip_of_block(index, config.sparse1d)
        if skip == "none":
            dense += 2 * tokens**2 * width
        else:
            sparse += 2 * tokens**2 * width // (equal_groups(tokens, config.sparse_n, skip) or 1)
    return {
        "patches → tokens": tokens * patch * config.in_channels * width,
        "text → width": text * (config.caption_channels * width + width**2),
        "timestep, adaLN-single": TIME_CHANNELS * width + width**2 + 6 * width**2,
        "self-attention, projections": blocks * 4 * tokens * width**2,
        "self-attention, products, dense blocks": dense,
        "self-attention, products, sparse blocks": sparse,
        "cross-attention, projections": blocks * (2 * tokens * width**2 + 2 * text * (config.cross_attention_dim or width) * width),
        "cross-attention, products": blocks * 2 * tokens * text * width,
        "MLP": blocks * 8 * tokens * width**2,
        "tokens → patches": tokens * width * patch * (config.out_channels or config.in_channels),
    }


def norm_operations(config: Any, grid: tuple[int, int, int]) -> int:
    """4 an element for each LayerNorm: two a block and the last."""
    tokens = grid[0] * (grid[1] // config.patch_size) * (grid[2] // config.patch_size)
    return 4 * tokens * config.num_attention_heads * config.attention_head_dim * (2 * config.num_layers + 1)


def meta_call(grid: tuple[int, int, int], text: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model on the meta device, and one call of one sample."""
    with torch.device("meta"):
        model: Any = OpenSoraT2V_v1_3().eval()
        call = {
            "hidden_states": torch.empty(1, model.config.in_channels, *grid),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, text, model.config.caption_channels),
        }
    return model, call


def counted(model: Any, call: dict[str, torch.Tensor]) -> int:
    """MACs of the eager model, operator by operator."""
    with torch.no_grad(), MacCounter() as counter:
        model(**call)
    return counter.macs


def compiled(model: Any, call: dict[str, torch.Tensor], **settings: Any) -> StepPrograms:
    """The model's step graphs."""
    return build_steps(model, call, tc.CacheConfig(**settings), None)


def main(
    frames: Annotated[int, typer.Option(help="Frames of the video.")] = 93,
    size: Annotated[int, typer.Option(help="Height and width of the video.")] = 256,
    text: Annotated[int, typer.Option(help="Text tokens.")] = 512,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
) -> None:
    grid = latent_grid(frames, size)
    model, call = meta_call(grid, text)
    by_formula, norms = terms(model.config, grid, text), norm_operations(model.config, grid)
    print(f"{frames}×{size}×{size}, latents {'×'.join(map(str, grid))}, {text} text tokens; one forward of one sample, GMACs:")
    for name, macs in by_formula.items():
        print(f"  {name:42}{macs / 1e9:12.3f}")
    forward = sum(by_formula.values())
    print(f"  {'sum':42}{forward / 1e9:12.3f}")
    print(f"  {'the eager model counts':42}{counted(model, call) / 1e9:12.3f}")
    print(f"  {'LayerNorms, 4 an element':42}{norms / 1e9:12.3f}")
    total, with_norms = (GUIDANCE * steps * macs / 1e12 for macs in (forward, forward + norms))
    print(f"{steps} guided steps, TMACs: {total:.2f}, with the norms {with_norms:.2f}")
    for context in ("kept", "cached", "full", "reuse"):
        programs = compiled(model, call, ratio=0.9, last_k=4, context=context)
        full, cached = programs.macs_full / 1e9, programs.macs_cached[0] / 1e9
        gigabytes = sum(spec.nbytes for spec in programs.full.caches) / 1e9
        print(f"ratio 0.9, K = 4, {context:7} I-step {full:.3f} GMACs, P-step {cached:.3f}, caches {gigabytes:.2f} GB")


if __name__ == "__main__":
    typer.run(main)
