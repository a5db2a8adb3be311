"""diffusers' pipelines from a prompt to its images, with tiny random components, on a transformed transformer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from pipelines_tiny import PIPELINES, Given, Pipeline, build, run, wan_2_2
from torch import Tensor, nn

import tokencache_compile
from tokencache_compile import CacheConfig, ConfigError, Dispatcher, Schedule, StepReport
from tokencache_compile.export.inductor import compile_step
from tokencache_compile.passes import pipeline as passes

STEPS = (("I", 0), ("P", 1), ("I", 2), ("P", 3), ("I", 4), ("I", 5))  # of six, by the default schedule
# The guidance branches: one call of both halves, or a call for each; some pipelines name them with cache_context.
BRANCHES: dict[str, tuple[str, ...]] = dict.fromkeys(PIPELINES, ("branch 0",))
BRANCHES |= dict.fromkeys(("CogVideoX", "LTX"), ("cond_uncond",))
BRANCHES |= dict.fromkeys(("FLUX", "Wan", "HunyuanVideo", "Qwen-Image"), ("cond", "uncond"))
BRANCHES["FLUX, inpainting"] = ("branch 0", "branch 1")
# Where a run begins in the middle of the schedule: its own steps, or counted, as FLUX's timesteps are scaled.
LATE = {"SD3, image to image": (("I", 1), ("I", 2), ("P", 3), ("I", 4), ("I", 5)), "FLUX, inpainting": STEPS[:5]}


@pytest.fixture(autouse=True)
def analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on no setting is done once for each model and form of call: half of the time here."""
    known: dict[Hashable, Any] = {}
    analysed = passes.analysed

    def remember(model: nn.Module, kwargs: Mapping[str, Any]) -> Any:
        key = (model, Dispatcher._signature_of(dict(kwargs))[0])
        if key not in known:
            known[key] = analysed(model, kwargs)
        return known[key]

    monkeypatch.setattr(passes, "analysed", remember)


def transform(pipe: Pipeline, *args: Any, **settings: Any) -> None:
    assert tokencache_compile.transform(pipe, *args, backend="eager", **settings) is pipe


def reports_of(transformer: Any) -> list[StepReport]:
    """The reports of the calls from now on."""
    reports: list[StepReport] = []
    transformer.step_callback = reports.append
    return reports


def near(got: Tensor, expected: Tensor, other: Tensor) -> bool:
    """Whether an image is finite, not the expected one, and five times nearer to it than the image of another noise is."""
    return bool(got.isfinite().all()) and 0 < float((got - expected).abs().mean()) < 0.2 * float((other - expected).abs().mean())


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name: str) -> None:
    """Ratio 0: the untouched pipeline's images, bit for bit. 0.9: each guidance branch by the schedule, and the same again."""
    pipe, given = build(name)
    expected, other = run(pipe, given), run(pipe, given, seed=1)
    branches, steps = BRANCHES[name], LATE.get(name, STEPS)
    transform(pipe, 0.0)
    assert torch.equal(run(pipe, given), expected)
    assert (pipe.transformer.summary().full_steps, pipe.transformer.summary().cached_steps) == (len(steps) * len(branches), 0)

    transform(pipe, 0.9)
    reports = reports_of(pipe.transformer)
    got = run(pipe, given)
    assert [(r.kind, r.step, r.branch) for r in reports] == [(*step, branch) for step in steps for branch in branches]
    (time,) = (leaf.spec for leaf in pipe.transformer.captured().call.leaves if leaf.path in ("timestep", "t"))
    assert time is not None and time.shape == (2 if len(branches) == 1 else 1,), "both halves of guidance, or a call for each"
    plan, summary = pipe.transformer.plan, pipe.transformer.summary()
    assert {kept for r in reports if r.kind == "P" for kept in r.kept} == {round(0.1 * plan.tokens)}
    cached = sum(kind == "P" for kind, _ in steps)
    assert (summary.full_steps, summary.cached_steps) == ((len(steps) - cached) * len(branches), cached * len(branches))
    assert 0.1 < summary.macs_saved < 0.4
    assert near(got, expected, other) and torch.equal(run(pipe, given), got)


def test_controlnet_in_cached_steps() -> None:
    """The residuals matter, and P-steps that keep all tokens add those of the current step."""
    pipe, given = build("SD3, ControlNet")
    expected = run(pipe, given)
    assert not torch.allclose(run(pipe, given, controlnet_conditioning_scale=0.0), expected, atol=0.01)
    transform(pipe, keep=((24,) * 4,), context="kept", schedule=Schedule(4))
    assert torch.allclose(run(pipe, given), expected, atol=1e-5)
    assert pipe.transformer.plan.tokens == 24 and pipe.transformer.summary().cached_steps == 4


def test_bfloat16() -> None:
    pipe, given = build("FLUX")
    pipe.to(torch.bfloat16)
    expected, other = run(pipe, given), run(pipe, given, seed=1)
    transform(pipe, 0.0)
    assert pipe.transformer.dtype == torch.bfloat16 and torch.equal(run(pipe, given), expected)
    transform(pipe, 0.9, schedule=Schedule(4))
    assert near(run(pipe, given), expected, other) and pipe.transformer.summary().cached_steps == 8


def test_a_compiled_cached_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The P-step by inductor, I-steps left eager."""
    pipe, given = build("SD3")
    untouched = run(pipe, given)
    transform(pipe, 0.9, schedule=Schedule(4))
    expected = run(pipe, given)
    (engine,) = pipe.transformer.captured().cached
    monkeypatch.setattr(engine, "run", compile_step(engine.run))
    assert torch.allclose(run(pipe, given), expected, atol=1e-4) and not torch.allclose(untouched, expected, atol=1e-2)
    assert pipe.transformer.summary().cached_steps == 4


# --- two transformers -----------------------------------------------------------------------------------------------------


def test_two_transformers() -> None:
    """Each by its own plan, from an I-step on, and just as it would run by itself."""
    pipe, given = wan_2_2()
    models = pipe.transformer, pipe.transformer_2
    expected, other = run(pipe, given), run(pipe, given, seed=1)
    transform(pipe, 0.0)
    assert torch.equal(run(pipe, given), expected)
    assert [d.summary().full_steps for d in (pipe.transformer, pipe.transformer_2)] == [6, 6], "three steps of two branches, each"

    low = CacheConfig(ratio=0.5, schedule=Schedule(full=(0, 5)))
    transform(pipe, {"transformer": 0.9, "transformer_2": low})
    assert (pipe.transformer.model, pipe.transformer_2.model) == models
    assert pipe.transformer.cache_config == CacheConfig(ratio=0.9) and pipe.transformer_2.cache_config == low
    first, second, calls = reports_of(pipe.transformer), reports_of(pipe.transformer_2), []
    hook = pipe.transformer_2.register_forward_hook(lambda _, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True)
    got = run(pipe, given)
    hook.remove()
    assert [(r.kind, r.step, r.branch) for r in first] == [(*step, branch) for step in STEPS[:3] for branch in ("cond", "uncond")]
    assert [(r.kind, r.step) for r in second] == [(*step,) for step in (("I", 3), ("P", 4), ("I", 5)) for _ in range(2)]
    assert {r.kept for r in first if r.kind == "P"} == {(4, 4, 4)} and {r.kept for r in second if r.kind == "P"} == {(20, 20, 20)}
    assert near(got, expected, other) and torch.equal(run(pipe, given), got)

    alone = tokencache_compile.transform(models[1], low, scheduler=pipe.scheduler, backend="eager")
    pipe.scheduler.set_timesteps(6)
    with torch.no_grad():
        assert all(torch.equal(alone(**kwargs)[0], out) for kwargs, out in calls) and len(calls) == 6


def test_one_of_two_transformers(tmp_path: Path) -> None:
    """What the plans leave out stays as it is; saving writes the models."""
    pipe, _ = wan_2_2()
    first = pipe.transformer
    transform(pipe, {"transformer_2": 0.5})
    assert pipe.transformer is first and pipe.transformer_2.cache_config.ratio == 0.5
    low = pipe.transformer_2
    transform(pipe, {"transformer": 0.9}, last_k=1)
    assert pipe.transformer.model is first and pipe.transformer.cache_config.last_k == 1 and pipe.transformer_2 is low
    pipe.save_pretrained(tmp_path)
    assert isinstance(pipe.transformer, Dispatcher) and pipe.transformer_2 is low
    loaded = WanPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None)
    assert type(loaded.transformer) is type(first) and type(loaded.transformer_2) is type(first)
    assert torch.equal(loaded.transformer_2.proj_out.weight, low.model.proj_out.weight)


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        ({"unet": 0.9}, {}, "plans of unet were given; the transformers of this WanPipeline are transformer, transformer_2"),
        ({}, {}, "plans of no component"),
        ({"transformer": 0.9}, {"ratio": 0.5}, "two ratios"),
        ("a/directory", {}, "belong to one transformer, and this WanPipeline has transformer and transformer_2"),
        (None, {"example_inputs": {}}, "belong to one transformer"),
    ],
)
def test_plans_that_are_refused(plan: Any, settings: Given, message: str) -> None:
    pipe, _ = wan_2_2()
    models = pipe.transformer, pipe.transformer_2
    with pytest.raises(ConfigError, match=message):
        transform(pipe, plan, **settings)
    assert (pipe.transformer, pipe.transformer_2) == models, "nothing is half done"
    with pytest.raises(ConfigError, match="components are a pipeline's"):
        tokencache_compile.transform(pipe.transformer, {"transformer": 0.9})
