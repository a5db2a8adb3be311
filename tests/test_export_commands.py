"""``tokencache export`` and ``tokencache engines`` on a saved model: what they write is loaded, run and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny import build, run
from typer.testing import CliRunner

import tokencache_compile as tc
from tokencache_compile.cli import app
from tokencache_compile.export.manifest import engine_file, read_manifest

LAYERS = 3


def tokencache(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DiT in diffusers' own layout."""
    folder = tmp_path_factory.mktemp("model")
    build("dit", layers=LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engines(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines for two GPUs that are not here."""
    out = tmp_path_factory.mktemp("bundles") / "engines"
    command = ("export", saved, "--out", out, "--to", "tensorrt-rtx", "--capability", "SM80", "--capability", "SM89", "--batch", 4)
    result = tokencache(*command)
    assert result.exit_code == 0, result.output
    return out


def test_the_bundle_gives_what_the_model_gives(saved: Path, engines: Path) -> None:
    net = tc.transform(build("dit", layers=LAYERS), backend="eager")
    expected, got = run(net, "dit"), run(tc.load(engines), "dit")
    assert max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True)) < 2e-3 * float(expected[-1].abs().max())


def test_engines_are_there_as_the_manifest_says(engines: Path) -> None:
    manifest = read_manifest(engines)
    (entry,) = manifest.engines
    assert entry.target.flavour == "tensorrt_rtx" and entry.target.compute_capabilities == ("SM80", "SM89")
    weights = manifest.files["weights.safetensors"].nbytes
    for graph in manifest.graphs:
        name = engine_file(graph.name, "tensorrt_rtx")
        assert (engines / name).stat().st_size == manifest.files[name].nbytes > weights / 2
        model = onnx.load(engines / f"{graph.name}.onnx", load_external_data=False)
        for values, specs in ((model.graph.input, graph.io.inputs), (model.graph.output, graph.io.outputs)):
            shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
            assert shapes == {spec.name: spec.shape for spec in specs}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_engines_are_refused_without_their_gpu(engines: Path) -> None:
    with pytest.raises(tc.ExportError, match="no CUDA device"):
        tc.load(engines, runtime="tensorrt_rtx")


def test_a_gpu_for_onnx_files_is_refused(saved: Path, tmp_path: Path) -> None:
    result = tokencache("export", saved, "--out", tmp_path / "bundle", "--capability", "SM80")
    assert result.exit_code == 1 and "which run anywhere" in result.output
    assert not (tmp_path / "bundle").exists()


def test_engines_are_timed(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines.json"
    result = tokencache("engines", saved, "--out", out, "--rounds", 3, "--backend", "eager", "--backend", "onnxruntime")
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert list(figures["backends"]) == ["eager", "onnxruntime"]
    for row in figures["backends"].values():
        assert 0 < row["P"]["seconds"] <= row["P"]["p90"] and row["I_over_P"] > 0
    assert figures["gmacs"]["P"] < figures["gmacs"]["I"]


def test_engines_of_what_is_not_there(saved: Path, tmp_path: Path) -> None:
    nothing = tokencache("engines", saved, "--out", tmp_path / "a.json", "--ratio", 0)
    assert nothing.exit_code == 1 and "there is no P-step to time" in nothing.output
    unknown = tokencache("engines", saved, "--out", tmp_path / "a.json", "--backend", "jax")
    assert unknown.exit_code == 1 and "backend='jax' was asked for" in unknown.output
