"""The learning commands from end to end on a tiny model: each writes what the next reads, and bad input is one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from tiny import LAYERS, build
from torch import Tensor
from typer.testing import CliRunner, Result

import tokencache_compile as tc
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.cli import app
from tokencache_compile.learn.inputs import TensorData, load_model, load_scheduler
from tokencache_compile.sampling import sample

STEPS, ROWS = 8, 6


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder as far as the commands read it, and a data file."""
    path = tmp_path_factory.mktemp("pipeline")
    build("dit").save_pretrained(path / "transformer")
    DDIMScheduler(clip_sample=False, prediction_type="v_prediction").save_pretrained(path / "scheduler")
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "sample": torch.randn(ROWS, 4, 8, 8, generator=draw),
        "class_labels": torch.randint(0, 1000, (ROWS,), generator=draw),
        "null.class_labels": torch.tensor([1000]),
    }
    save_file(tensors, path / "data.safetensors")
    return path


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    options = ("--steps", STEPS, "--train-steps", 3, "--batch", 2, "--lr", 1e-2, "--last-k", 1, "--ratio", 0.5)
    result = invoke("train", folder, "--data", folder / "data.safetensors", "--out", out, *options)
    assert result.exit_code == 0, result.output
    return out / "artefact"


@pytest.fixture(scope="module")
def calibrated(folder: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "artefact"
    options = ("--steps", STEPS, "--guidance", 2.0, "--full-steps", 3, "--samples", 4, "--batch", 2, "--strategy", "uniform", "--groups", 2)
    result = invoke("calibrate", folder, trained, "--data", folder / "data.safetensors", "--out", out, *options)
    assert result.exit_code == 0, result.output
    return out


def test_training_writes_an_artefact_of_a_trained_predictor(folder: Path, trained: Path) -> None:
    artefact = CacheArtefact.from_pretrained(trained, load_model(folder))
    assert artefact.predictor is not None and float(artefact.predictor.head.weight.norm().detach()) > 0
    assert (artefact.config.ratio, artefact.config.last_k, artefact.config.scorer, artefact.steps) == (0.5, 1, "predictor", STEPS)
    assert artefact.provenance["training"]["steps"] == 3
    rows = [json.loads(line) for line in (trained.parent / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_calibration_fixes_counts_and_schedule_and_runs(folder: Path, calibrated: Path) -> None:
    model = load_model(folder)
    config = CacheArtefact.from_pretrained(calibrated, model).config
    assert config.schedule.full == tc.Schedule.uniform(STEPS, 3).full
    assert config.keep is not None and 1 <= len(config.keep) <= 2
    assert all(sum(keep) == round(0.5 * 16 * (LAYERS - 1)) for keep in config.keep)
    scheduler = load_scheduler(folder)
    net = tc.transform(model, calibrated, backend="eager", scheduler=scheduler)
    noise, conditions = TensorData(folder / "data.safetensors").batch(0, 2, 2.0, 0)
    images: Tensor = sample(net, scheduler, noise, STEPS, conditions)
    assert images.isfinite().all()
    assert (net.summary().full_steps, net.summary().cached_steps) == (3, STEPS - 3)


@pytest.mark.parametrize("strategy", ["every", "mass", "accumulated", "reverse", "optimal"])
def test_strategies(folder: Path, trained: Path, tmp_path: Path, strategy: str) -> None:
    options = ("--steps", STEPS, "--full-steps", 3, "--samples", 2, "--batch", 2, "--strategy", strategy)
    result = invoke("calibrate", folder, trained, "--data", folder / "data.safetensors", "--out", tmp_path / "a", *options)
    assert result.exit_code == 0, result.output
    schedule = CacheArtefact.from_pretrained(tmp_path / "a", load_model(folder)).config.schedule
    assert sum(schedule.is_full(step) for step in range(STEPS)) == 3


def test_pictures(calibrated: Path, tmp_path: Path) -> None:
    """The tiny model makes latents of 4 channels, which are no picture: refused by name before anything is written."""
    result = invoke("plot", calibrated, "--out", tmp_path / "plots")
    assert result.exit_code == 1 and "images" in result.stderr
    assert not (tmp_path / "plots").exists() or not list((tmp_path / "plots").iterdir())


def test_tuning_writes_the_plan_it_chose(folder: Path, tmp_path: Path) -> None:
    options = ("--steps", STEPS, "--guidance", 2.0, "--samples", 2, "--budget", 3, "--speedup", 1.1)
    result = invoke("tune", folder, "--data", folder / "data.safetensors", "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "Pareto front" in result.output
    artefact = CacheArtefact.from_pretrained(tmp_path / "artefact", load_model(folder))
    assert artefact.provenance["tune"]["candidates"] == 3 and artefact.provenance["tune"]["speedup"] >= 1.1
    assert len(json.loads((tmp_path / "tune.json").read_text())["rows"]) == 3


def test_tuning_fits_the_plan_it_chose(folder: Path, tmp_path: Path) -> None:
    options = ("--steps", STEPS, "--guidance", 2.0, "--samples", 4, "--budget", 2, "--speedup", 1.1, "--fit")
    result = invoke("tune", folder, "--data", folder / "data.safetensors", "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "on held-out noises" in result.output
    artefact = CacheArtefact.from_pretrained(tmp_path / "artefact", load_model(folder))
    notes = artefact.provenance["tune"]
    assert len(artefact.config.step_weights) == (STEPS if notes["fitted_db"] > notes["polynomial_db"] else 0)


def test_batches_wrap_around_and_carry_their_conditions(folder: Path) -> None:
    data = TensorData(folder / "data.safetensors")
    noise, conditions = data.batch(ROWS - 1, 3, 2.0, 5)
    assert torch.equal(conditions.given["class_labels"], data.conditions["class_labels"][[ROWS - 1, 0, 1]])
    assert noise.shape == (3, 4, 8, 8) and conditions.guidance == 2.0
    assert data.null_row is not None and data.null_row["class_labels"].shape == ()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.zeros(2)}, "'sample'"),
        ({"sample": torch.zeros(2, 1), "class_labels": torch.zeros(3)}, "one row a sample"),
        ({"sample": torch.zeros(2, 1), "class_labels": torch.zeros(2), "null.other": torch.zeros(1)}, "all or none"),
    ],
)
def test_data_that_does_not_belong_together(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "data.safetensors")
    with pytest.raises(tc.ConfigError, match=message):
        TensorData(tmp_path / "data.safetensors")


def test_what_is_not_there(folder: Path, trained: Path, tmp_path: Path) -> None:
    """One message on stderr and exit code 1, no traceback."""
    data = folder / "data.safetensors"
    for arguments, message in (
        (("train", tmp_path, "--data", data, "--out", tmp_path), "no config.json"),
        (("train", folder, "--data", tmp_path / "none", "--out", tmp_path), "cannot be read"),
        (("train", folder / "transformer", "--data", data, "--out", tmp_path), "no scheduler_config.json"),
        (("tune", folder, "--data", data, "--out", tmp_path), "exactly one"),
        (("plot", trained, "--out", tmp_path), "no calibration.safetensors"),
        (("calibrate", folder, tmp_path / "none", "--data", data, "--out", tmp_path / "b"), "none"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert message in result.stderr and "Traceback" not in result.stderr
