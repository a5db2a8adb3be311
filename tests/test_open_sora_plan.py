"""Open-Sora-Plan v1.3: the published names and mathematics, its compiled steps, and the paper's MACs at full size.

Tolerance: 1e-5 of the output's largest value where that is above 1, else 1e-5.
"""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_open_sora import PlainOpenSora, groups_of
from plain_run import assert_close, drawn_scores
from tiny import Model, draw_weights
from torch import Tensor

import tokencache_compile
from tokencache_compile import Dispatcher, Schedule
from tokencache_compile.models.open_sora_plan import OpenSoraT2V_v1_3, equal_groups, skiparse_group
from tokencache_compile.passes.pipeline import StepPrograms

MACS = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "open_sora_plan_macs.py"))
LAYERS, LAST_K = 6, 1  # blocks 2 and 4 skip single tokens, 3 and 5 groups
WIDTH, TEXT, SPARSE_N = 24, 5, 2
SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "num_layers": LAYERS,
    "cross_attention_dim": WIDTH,
    "caption_channels": 10,
    "sparse_n": SPARSE_N,
}
# Parameter names of OpenSoraT2V_v1_3 in github.com/PKU-YuanGroup/Open-Sora-Plan: opensora_v1_3/modeling_opensora.py and modules.py,
# common.PatchEmbed2D, and diffusers' Attention, FeedForward, AdaLayerNormSingle and PixArtAlphaTextProjection, of which they are made.
ATTENTION = ("to_q.weight", "to_q.bias", "to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias", "to_out.0.weight", "to_out.0.bias")
FEED_FORWARD = ("net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias")
BLOCK = (
    "scale_shift_table",
    *(f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ATTENTION),
    *(f"ff.{name}" for name in FEED_FORWARD),
)
AROUND = (
    "scale_shift_table",
    *(f"pos_embed.proj.{part}" for part in ("weight", "bias")),
    *(f"caption_projection.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
    *(f"adaln_single.emb.timestep_embedder.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
    *(f"adaln_single.linear.{part}" for part in ("weight", "bias")),
    *(f"proj_out.{part}" for part in ("weight", "bias")),
)
# What the published training script registers for OpenSoraT2V_v1_3-2B/122.
PUBLISHED: dict[str, Any] = {
    "_class_name": "OpenSoraT2V_v1_3",
    "num_attention_heads": 24,
    "attention_head_dim": 96,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 32,
    "dropout": 0.0,
    "cross_attention_dim": 2304,
    "attention_bias": True,
    "sample_size": [44, 80],
    "sample_size_t": 24,
    "patch_size": 2,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "only_cross_attention": False,
    "double_self_attention": False,
    "upcast_attention": False,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
    "interpolation_scale_h": 1.0,
    "interpolation_scale_w": 1.0,
    "interpolation_scale_t": 1.0,
    "sparse1d": True,
    "sparse_n": 4,
}


def build(**changes: Any) -> Model:
    torch.manual_seed(0)
    model: Model = OpenSoraT2V_v1_3(**SMALL | changes)
    draw_weights(model, 0.15)
    return model.eval()


def inputs(grid: tuple[int, int, int] = (3, 8, 8), rows: int = 2, masks: bool = False, seed: int = 1) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {
        "hidden_states": torch.randn(rows, 4, *grid, generator=draw),
        "timestep": torch.tensor([500.0, 20.0, 900.0][:rows]),
        "encoder_hidden_states": torch.randn(rows, TEXT, 10, generator=draw),
    }
    if masks:
        given["attention_mask"] = (torch.rand(rows, *grid, generator=draw) > 0.6).float()
        given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])[:rows]
    return given


def forward(model: Model, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**given, return_dict=False)[0]
    return out


# --- the model --------------------------------------------------------------------------------------------------------------


def test_the_official_checkpoint_fits() -> None:
    """The published configuration makes a model with the published names and 2.7 billion parameters."""
    with torch.device("meta"):
        model = OpenSoraT2V_v1_3.from_config(PUBLISHED)
    names = [*AROUND, *(f"transformer_blocks.{block}.{name}" for block in range(32) for name in BLOCK)]
    state = model.state_dict()
    assert sorted(state) == sorted(names)
    assert round(sum(t.numel() for t in state.values()) / 1e9, 1) == 2.8  # "2.7B": 2.77
    width, inner = 2304, 4 * 2304
    shapes = {
        "pos_embed.proj.weight": (width, 8, 2, 2),
        "caption_projection.linear_1.weight": (width, 4096),
        "adaln_single.emb.timestep_embedder.linear_1.weight": (width, 256),
        "adaln_single.linear.weight": (6 * width, width),
        "transformer_blocks.31.scale_shift_table": (6, width),
        "transformer_blocks.31.attn2.to_k.weight": (width, width),
        "transformer_blocks.31.ff.net.0.proj.weight": (inner, width),
        "scale_shift_table": (2, width),
        "proj_out.weight": (32, width),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, given = build(), inputs()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "OpenSoraT2V_v1_3"
    assert torch.equal(forward(OpenSoraT2V_v1_3.from_pretrained(tmp_path), given), forward(model, given))


@pytest.mark.parametrize("change", [{"upcast_attention": True}, {"patch_size_t": 2}, {"attention_head_dim": 16}])
def test_refused_configurations(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"patch_size_t|multiple of 6"):
        OpenSoraT2V_v1_3(**SMALL | change)


@pytest.mark.parametrize(
    ("grid", "masks", "changes"),
    [
        ((3, 8, 8), False, {}),
        ((3, 8, 8), True, {}),
        ((3, 6, 10), True, {"sparse_n": 4, "interpolation_scale_t": 2.0, "interpolation_scale_h": 0.5}),  # 45 tokens: groups differ in size
        ((3, 8, 8), False, {"sparse1d": False}),
    ],
)
def test_the_model_is_the_published_one(grid: tuple[int, int, int], masks: bool, changes: dict[str, Any]) -> None:
    """Against plain mathematics, tokens first, from the state dict. One sample cannot reach another."""
    model, given = build(**changes), inputs(grid, masks=masks)
    got = forward(model, given)
    assert got.shape == given["hidden_states"].shape
    assert_close([got], [PlainOpenSora(model.state_dict(), model.config)(**given)])
    alone = {name: value[1:] for name, value in given.items()}
    assert_close([forward(model, alone)], [got[1:]])


def test_what_it_takes_and_returns() -> None:
    """The text with the published axis of length 1, with its mask; what the published pipeline passes beside; the output class."""
    model, given = build(), inputs(masks=True)
    published = {**given, **{name: given[name].unsqueeze(1) for name in ("encoder_hidden_states", "encoder_attention_mask")}}
    beside = {"motion_score": None, "pooled_projections": None}
    assert torch.equal(forward(model, published | beside), forward(model, given))
    with torch.no_grad():
        assert torch.equal(model(**given).sample, forward(model, given))
    unmasked = {**given, "attention_mask": torch.ones_like(given["attention_mask"]), "encoder_attention_mask": None}
    assert_close([forward(model, unmasked)], [forward(model, inputs())])
    assert float((forward(model, unmasked) - forward(model, given)).abs().max()) > 0.01


@pytest.mark.parametrize("sparse_n", [1, 2, 3, 4])
def test_groups(sparse_n: int) -> None:
    """The numbers of the tokens make the published lists, and are known to have one size exactly where they do."""
    for skip, block in (("single", 2), ("group", 3)):
        for tokens in range(1, 3 * sparse_n**2 + 2):
            numbers = skiparse_group(tokens, sparse_n, skip, torch.device("cpu")).tolist()  # type: ignore[arg-type]
            lists = [tokens_of for tokens_of in groups_of(tokens, sparse_n, block) if tokens_of]
            assert [[place for place, number in enumerate(numbers) if number == group] for group in sorted(set(numbers))] == lists
            sizes = Counter(numbers).values()
            assert equal_groups(tokens, sparse_n, skip) == (len(sizes) if len(set(sizes)) == 1 else 0)  # type: ignore[arg-type]


# --- its compiled steps -----------------------------------------------------------------------------------------------------


def transformed(model: Model, given: dict[str, Any], **settings: Any) -> Dispatcher:
    common: dict[str, Any] = {"ratio": 0.9, "last_k": LAST_K, "forecast": 0, "scorer": "random", "schedule": Schedule(full=(0, 3))}
    dispatcher: Dispatcher = tokencache_compile.transform(model, **common | settings, backend="eager", example_inputs=given)
    return dispatcher


@torch.no_grad()
def run_steps(steps: StepPrograms, given: dict[str, Any]) -> list[Tensor]:
    """An I-step, and a P-step after it."""
    full = steps.full.module(*given.values(), *steps.step_inputs(0, torch.device("cpu")), *steps.initial_caches(torch.device("cpu")))
    return [full[0], steps.cached[0].module(*given.values(), *steps.step_inputs(1, torch.device("cpu")), *full[1:])[0]]


@pytest.mark.parametrize(("grid", "masks", "groups"), [((2, 32, 32), True, SPARSE_N), ((3, 6, 10), False, None)])
def test_i_step(grid: tuple[int, int, int], masks: bool, groups: int | None) -> None:
    """The model's own bits, at so many tokens that dense and sparse attention round differently, and where groups differ in size."""
    model, given = build(), inputs(grid, masks=masks)
    dispatcher = transformed(model, given, context="cached", keep=((grid[0] * grid[1] * grid[2] // 4,) * (LAYERS - LAST_K),))
    program = dispatcher.steps.program
    dense, sparse = (program.bodies[body].known_roles for body in (program.blocks[0].body, program.blocks[2].body))
    assert len(program.bodies) == 2 or groups is None
    found = [attention.groups for attention in (*dense.attentions, *sparse.attentions)]
    assert [None if g is None else g.count for g in found] == [None, groups]
    assert len(sparse.side_inputs) == len(dense.side_inputs) + 1 and not sparse.needs_shared_index
    full, cached = run_steps(dispatcher.steps, given)
    assert torch.equal(full, forward(model, given))
    assert_close([cached], [full])  # all tokens kept


def test_p_step_of_all_tokens() -> None:
    """Among kept tokens that are all tokens, in whatever order."""
    given = inputs(masks=True)
    full, cached = run_steps(transformed(build(), given, context="kept", keep=((48,) * (LAYERS - LAST_K),)).steps, given)
    assert_close([cached], [full])


@pytest.mark.parametrize(
    ("context", "history", "masks"),
    [("kept", "computed", True), ("full", "full_steps", True), ("cached", "computed", False), ("reuse", "computed", False)],
)
def test_against_the_plain_loop(context: Any, history: Any, masks: bool) -> None:
    """Six steps at ratio 0.9, each output making the next input: 5 of 48 tokens a cached block, in groups of their own."""
    model, given = build(), inputs(masks=masks)
    dispatcher = transformed(model, given, context=context, history=history)
    plain = PlainOpenSora(model.state_dict(), model.config)
    got, expected, uncached = [], [], []
    x = y = z = given["hidden_states"]
    for step, t in enumerate((900.0, 700.0, 500.0, 300.0, 100.0, 50.0)):
        now = {**given, "timestep": torch.full((2,), t)}
        kept = None if step in (0, 3) else drawn_scores(step, LAYERS - LAST_K, 48).topk(5, dim=1).indices.tolist()
        with torch.no_grad():
            got.append(dispatcher(**now | {"hidden_states": x}, return_dict=False)[0])
        expected.append(plain(**now | {"hidden_states": y}, kept=kept, context=context, history=history))
        uncached.append(forward(model, now | {"hidden_states": z}))
        x, y, z = (0.9 * a + 0.3 * b[-1].tanh() for a, b in ((x, got), (y, expected), (z, uncached)))
    assert_close(got, expected)
    assert float((got[-1] - uncached[-1]).abs().max()) > 0.01, "caching changed nothing: the test would pass on anything"


# --- full size ----------------------------------------------------------------------------------------------------------------


def test_full_size() -> None:
    """MACs and shapes at 93×256×256 and 512 text tokens: formula, eager model and compiled steps agree, and the paper's figures follow."""
    grid = MACS["latent_grid"](93, 256)
    assert grid == (24, 32, 32)
    model, call = MACS["meta_call"](grid, 512)
    forward_macs, norms = sum(MACS["terms"](model.config, grid, 512).values()), MACS["norm_operations"](model.config, grid)
    assert MACS["counted"](model, call) == forward_macs
    assert [f"{2 * steps * (forward_macs + norms) / 1e12:.2f}" for steps in (50, 25)] == ["1717.49", "858.74"]  # Table V
    steps = MACS["compiled"](model, call, ratio=0.9, last_k=4, context="kept", forecast=0)
    assert steps.macs_full == forward_macs
    tokens, width, kept = 6144, 2304, 614
    assert (steps.program.known_stream.tokens, steps.plan.profiles) == (tokens, ((kept,) * 28,))
    assert {spec.shape for spec in steps.full.caches} == {(1, tokens, width)} and len(steps.full.caches) == 28
    terms = MACS["terms"](model.config, grid, 512)
    # In each of 28 blocks the kept tokens alone: 14 times the width's square in linears, keys and values of the text, both attentions.
    block = 14 * kept * width**2 + 2 * 512 * width**2 + 2 * kept * (kept + 512) * width
    whole = 14 * tokens * width**2 + 2 * 512 * width**2 + 2 * tokens * 512 * width
    around = sum(terms[name] for name in ("patches → tokens", "text → width", "timestep, adaLN-single", "tokens → patches"))
    assert steps.macs_cached == (28 * block + 4 * whole + 2 * 2 * tokens**2 * width + 2 * 2 * tokens**2 * width // 4 + around,)
