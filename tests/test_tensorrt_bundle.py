"""Bundles with real TensorRT-RTX engines of the reference DiT and a small PixArt, built without a GPU; and models with several streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from families import FAMILIES
from tiny import build, inputs, transformed

import tokencache_compile as tc
from tokencache_compile.demo import DEFAULT_MODEL, DEFAULT_PLAN
from tokencache_compile.export.manifest import Manifest, engine_file, read_manifest
from tokencache_compile.runtime import Dispatcher

GPUS = ("SM80", "SM89")


def reference() -> Dispatcher:
    call = {"hidden_states": torch.randn(2, 1, 32, 32), "timestep": torch.full((2,), 500), "class_labels": torch.tensor([3, 10])}
    model = DiTTransformer2DModel.from_pretrained(DEFAULT_MODEL).eval()
    net: Dispatcher = tc.transform(model, DEFAULT_PLAN, backend="eager", example_inputs=call)
    return net


def pixart() -> Dispatcher:
    net: Dispatcher = transformed(build("pixart_masked", layers=2), example_inputs=inputs("pixart_masked"))
    return net


@pytest.mark.parametrize("make", [reference, pixart])
def test_engines_for_gpus_that_are_not_here(make: Callable[[], Dispatcher], tmp_path: Path) -> None:
    """Every graph has an engine of the size the manifest says, whose inputs and outputs are the manifest's: building compares them."""
    settings = tc.TensorRTSettings("tensorrt_rtx", GPUS)
    folder = tc.export_tensorrt(make(), tmp_path / "bundle", settings=settings)
    manifest: Manifest = read_manifest(folder)
    (entry,) = manifest.engines
    assert (entry.target.flavour, entry.target.compute_capabilities, entry.refittable) == ("tensorrt_rtx", GPUS, False)
    assert [graph.name for graph in manifest.graphs] == ["full", "cached_0"]
    for graph in manifest.graphs:
        name = engine_file(graph.name, "tensorrt_rtx")
        assert (folder / name).stat().st_size == manifest.files[name].nbytes > manifest.files["weights.safetensors"].nbytes / 2


@pytest.mark.parametrize("key", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_models_with_text_beside_the_image_export(key: str, tmp_path: Path) -> None:
    model, call = FAMILIES[key].build()
    net = tc.transform(model, ratio=0.8, context="reuse", backend="eager", example_inputs=call)
    bundle = tc.load(tc.export_onnx(net, tmp_path / "bundle"))
    later = {name: value - 1 if name == "timestep" else value for name, value in call.items()}
    with torch.no_grad():
        for given in (call, later):  # an I-step and a P-step
            expected, got = net(**given, return_dict=False)[0], bundle(**given, return_dict=False)[0]
            assert float((got - expected).abs().max()) < 1e-4
    assert net.summary() == bundle.summary() and net.summary().cached_steps == 1


def test_shapes_that_depend_on_values_are_refused(tmp_path: Path) -> None:
    """Mochi attends to as many text tokens as its mask has ones."""
    model, call = FAMILIES["MochiTransformer3DModel"].build()
    net = tc.transform(model, ratio=0.8, context="kept", backend="eager", example_inputs=call)
    with pytest.raises(tc.ExportError, match=r"shapes in the I-step depend on the values of its inputs, at aten\.nonzero"):
        tc.export_onnx(net, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
