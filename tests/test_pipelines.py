"""diffusers' own pipelines, end to end: DiT with DDIM, PixArt-α with DPM-Solver++ and text masks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from pipes import KINDS, Pipeline, images, pipeline
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PixArtAlphaPipeline
from PIL import Image
from tiny import build, transformed
from torch import Tensor

from tokencache_compile import ConfigError, Dispatcher, Schedule, StepReport

FULL, CACHED = [0, 2, 4, 6, 7], [1, 3, 5]  # of 8 steps


def reports_of(pipe: Pipeline) -> list[StepReport]:
    reports: list[StepReport] = []
    pipe.transformer.step_callback = reports.append
    return reports


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_images(kind: str, guidance_scale: float) -> None:
    """With and without guidance: images, steps as planned, the same again, and not those of the untouched pipeline."""
    own: Tensor = images(pipeline(kind), guidance_scale=guidance_scale)
    pipe = pipeline(kind)
    scheduler, model = pipe.scheduler, pipe.transformer
    assert transformed(pipe) is pipe and isinstance(pipe.transformer, Dispatcher) and pipe.transformer.model is model
    assert pipe.scheduler is scheduler and type(scheduler) is type(pipeline(kind).scheduler)
    assert pipe.transformer.config is model.config and pipe.transformer.dtype == pipe.dtype == torch.float32
    assert pipe.device == pipe.transformer.device == torch.device("cpu")
    for _ in range(2):
        reports = reports_of(pipe)
        got: Tensor = images(pipe, guidance_scale=guidance_scale)
        assert got.shape == (2, 3, 16, 16) and bool(got.isfinite().all())
        assert [r.step for r in reports if r.kind == "I"] == FULL and [r.step for r in reports if r.kind == "P"] == CACHED
        summary = pipe.transformer.summary()
        assert (summary.full_steps, summary.cached_steps) == (5, 3)
        assert summary.tokens_recomputed == (6, 6, 6) and 0.15 < summary.macs_saved < 0.3
        assert pipe.transformer._tracker.current is None, "the pipeline's end frees the caches"
        assert torch.equal(got, images(pipe, guidance_scale=guidance_scale))
    assert not torch.equal(got, own)
    assert float((got - own).abs().mean()) < float((own.flip(0) - own).abs().mean()), "no better than another image"


@pytest.mark.parametrize("setting", [{"ratio": 0.0}, {"schedule": Schedule(every=1)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_without_caching_the_images_are_bit_identical(kind: str, dtype: torch.dtype, setting: dict[str, Any]) -> None:
    pipe = pipeline(kind).to(dtype)
    own = images(pipe)
    assert torch.equal(images(transformed(pipe, **setting)), own)
    assert pipe.transformer.summary().full_steps == 8 and pipe.transformer.summary().cached_steps == 0
    pipe.transformer.disable()
    assert torch.equal(images(pipe), own)


@pytest.mark.parametrize("kind", KINDS)
def test_output_types(kind: str) -> None:
    pipe = transformed(pipeline(kind))
    tensor = images(pipe)
    array = images(pipe, output_type="np")
    assert isinstance(array, np.ndarray) and np.allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pictures = images(pipe, output_type="pil")
    assert len(pictures) == 2 and all(isinstance(picture, Image.Image) and picture.size == (16, 16) for picture in pictures)
    plain = images(pipe, return_dict=False)
    assert torch.equal(plain if isinstance(plain, Tensor) else plain[0], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_transforming_twice(kind: str) -> None:
    """The second set of settings holds, on the original model: nothing is wrapped twice."""
    expected = images(transformed(pipeline(kind), ratio=0.5, context="full"))
    pipe = transformed(pipeline(kind))
    first, model = pipe.transformer, pipe.transformer.model
    images(pipe)
    assert transformed(pipe, ratio=0.5, context="full") is pipe
    assert pipe.transformer is not first and pipe.transformer.model is model and not isinstance(model, Dispatcher)
    assert torch.equal(images(pipe), expected)
    assert pipe.transformer.cache_config.ratio == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading(kind: str, tmp_path: Path) -> None:
    """What is saved is the original pipeline, its model's own class named; loaded and transformed, it makes the same images."""
    pipe = transformed(pipeline(kind))
    cached = images(pipe)
    dispatcher = pipe.transformer
    pipe.save_pretrained(tmp_path)
    assert pipe.transformer is dispatcher and torch.equal(images(pipe), cached)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", type(dispatcher.model).__name__]
    assert (tmp_path / "transformer" / "config.json").exists()
    loaded = type(pipe).from_pretrained(tmp_path, **({} if kind == "dit" else {"text_encoder": None, "tokenizer": None}))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is type(dispatcher.model)
    assert torch.equal(images(loaded), images(pipeline(kind)))
    assert torch.equal(images(transformed(loaded)), cached)


def test_other_runs_on_one_pipeline() -> None:
    """More images, more steps, no guidance, and the first run again."""
    pipe = transformed(pipeline("dit"))
    expected = images(pipe)
    for options in ({"class_labels": [1, 2, 3]}, {"num_inference_steps": 5}, {"guidance_scale": 1.0}, {"class_labels": [5]}):
        assert torch.equal(images(pipe, **options), images(transformed(pipeline("dit")), **options))
    assert torch.equal(images(pipe), expected)


@pytest.mark.parametrize("stop_at", [0, 3])
def test_an_aborted_run(stop_at: int) -> None:
    """The pipeline stopped by its own callback, between two steps: the next run, on the same noise, is as ever."""
    pipe = transformed(pipeline("pixart"))
    expected = images(pipe)

    def stop(step: int, *_: Any) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images(pipe, callback=stop)
    reports = reports_of(pipe)
    assert torch.equal(images(pipe), expected)
    assert [r.step for r in reports] == list(range(8))


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDPMScheduler])
def test_another_scheduler_after_the_transform(scheduler: Any) -> None:
    """As diffusers' documentation shows it; its timesteps are read from the calls; nothing is made ahead, and so rounds otherwise."""
    expected_pipe = pipeline("dit")
    expected_pipe.scheduler = scheduler.from_config(expected_pipe.scheduler.config)
    expected = images(transformed(expected_pipe, schedule=Schedule(4)), steps=10)
    pipe = transformed(pipeline("dit"), schedule=Schedule(4))
    images(pipe, steps=10)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    reports = reports_of(pipe)
    torch.testing.assert_close(images(pipe, steps=10), expected, atol=1e-4, rtol=0)
    assert [(r.kind, r.step) for r in reports] == [("P" if step % 4 else "I", step) for step in range(10)]


def test_two_pipelines_share_a_transformer() -> None:
    """Made with ``from_pipe`` or by hand: one dispatcher serves both, each run by itself."""
    first = transformed(pipeline("dit"))
    expected = images(first)
    second = DiTPipeline(transformer=first.transformer, vae=first.vae, scheduler=copy.deepcopy(first.scheduler))
    second.set_progress_bar_config(disable=True)
    assert torch.equal(images(second), expected) and torch.equal(images(first), expected)


def test_a_pipeline_without_a_transformer() -> None:
    with pytest.raises(ConfigError, match=r"diffusers pipeline with a \.transformer"):
        transformed(PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=pipeline("dit").vae, transformer=None, scheduler=None))


def test_transforming_the_model_by_hand() -> None:
    """The dispatcher put in the transformer's place, without the pipeline being known: timesteps alone tell the steps."""
    expected = images(transformed(pipeline("dit"), schedule=Schedule(4)))
    pipe = pipeline("dit")
    pipe.transformer = transformed(build("dit"))
    reports = reports_of(pipe)
    first = images(pipe)
    assert torch.equal(images(pipe), first), "a second run is the first"
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=0)
    assert [r.step for r in reports] == [*range(8), *range(8)]
