"""DiT-XL/2 and PixArt-α XL/2 at 256², with random weights, through their pipelines: 2.7 and 2.4 GB in float32."""

from __future__ import annotations

import fcntl
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pipes import Pipeline, images, pipeline, prompt, vae
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from by_hand import dit_macs
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from plain_loop import PlainLoop
from plain_run import assert_close, drawn_scores
from tiny import Model, transformed
from torch import Tensor, nn

from tokencache_compile import Dispatcher, Schedule

COMMON: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
}
BLOCKS, LAST_K, TOKENS, KEPT = 28, 4, 256, 26
STEPS, FULL = 3, (0, 1)


@pytest.fixture(autouse=True)
def one_at_a_time() -> Iterator[None]:
    """The models are large and pytest-xdist runs tests side by side."""
    with (Path(tempfile.gettempdir()) / f"tokencache-full-size-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()


def made(model_class: Any, **config: Any) -> Model:
    """The model with every weight drawn once, and none initialised before."""
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = model_class(**COMMON | config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(nn.init.normal_(torch.empty(parameter.shape), std=0.02)))
    return model.eval()


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def record(pipe: Pipeline, **options: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """A run of the pipeline: what its transformer was called with at every step, and what it gave."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(("hidden_states",), args, strict=False)) | kwargs
        calls.append(({name: value for name, value in given.items() if name != "return_dict"}, output[0]))

    handle = pipe.transformer.register_forward_hook(hook, with_kwargs=True)
    made = images(pipe, STEPS, guidance_scale=1.0, **options)
    handle.remove()
    assert bool(made.isfinite().all())
    return calls


def check(model: Model, options: dict[str, Any]) -> Dispatcher:
    """I-steps are the model's bit for bit, P-steps the plain loop's, and the weights are there once."""
    parameters = list(model.parameters())
    pipe = pipeline("dit" if isinstance(model, DiTTransformer2DModel) else "pixart", model, vae())
    before = resident_bytes()
    calls = record(transformed(pipe, scorer="random", last_k=LAST_K, schedule=Schedule(full=FULL)), **options)
    dispatcher: Dispatcher = pipe.transformer
    assert resident_bytes() - before < 0.25 * sum(p.numel() * p.element_size() for p in parameters)
    assert all(own is now for own, now in zip(parameters, dispatcher.model.parameters(), strict=True))
    read = {id(p) for step in (dispatcher.steps.full, *dispatcher.steps.cached) for p in step.module.parameters()}
    assert read <= {id(p) for p in parameters}

    assert dispatcher.plan.profiles == ((KEPT,) * (BLOCKS - LAST_K),) and dispatcher.plan.tokens == TOKENS
    assert (dispatcher.summary().full_steps, dispatcher.summary().cached_steps) == (len(FULL), STEPS - len(FULL))
    loop = PlainLoop(model, dispatcher.plan.profiles[0], LAST_K, "cached", 2, "external")
    expected = []
    for step, (given, _) in enumerate(calls):
        scores = drawn_scores(step, BLOCKS - LAST_K, TOKENS).expand(len(given["hidden_states"]), -1, -1)
        plain = {name: value for name, value in given.items() if name != "added_cond_kwargs"}  # PixArt's, unused below 1024²
        expected.append(loop.step(step, step in FULL, None if step in FULL else scores, **plain))
    assert_close([output for _, output in calls], expected)
    with torch.no_grad():
        for step, (given, output) in enumerate(calls):
            own = model(**given, return_dict=False)[0]
            assert torch.equal(output, own) == (step in FULL)
    return dispatcher


def test_dit_xl_2() -> None:
    model = made(DiTTransformer2DModel, num_embeds_ada_norm=1000)
    assert sum(p.numel() for p in model.parameters()) > 670e6
    dispatcher = check(model, {"class_labels": [207]})
    steps = dispatcher.steps
    assert steps.macs_full == dit_macs(model.config, [None] * BLOCKS)
    # the published count has 4 operations an element for each of the 57 norms besides
    norms = 4 * (2 * BLOCKS + 1) * TOKENS * 1152
    assert steps.macs_full + norms == pytest.approx(118.6887e9, rel=1e-3)
    assert steps.macs_full == pytest.approx(118.69e9, rel=0.01)
    assert steps.macs_cached == (dit_macs(model.config, [KEPT] * (BLOCKS - LAST_K) + [None] * LAST_K, "cached"),)


def test_pixart_alpha_xl_2() -> None:
    model = made(PixArtTransformer2DModel, norm_type="ada_norm_single", caption_channels=4096, cross_attention_dim=1152)
    assert sum(p.numel() for p in model.parameters()) > 600e6
    dispatcher = check(model, {**prompt(rows=1, width=4096, tokens=120)})
    assert dispatcher.steps.program.bodies[0].known_roles.side_inputs == ()
    assert 0.5 < dispatcher.steps.macs_full / 140e9 < 1.5 and dispatcher.steps.macs_cached[0] < 0.35 * dispatcher.steps.macs_full
