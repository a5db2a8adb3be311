"""ONNX Runtime's CUDA provider in the model's place; skipped without a CUDA device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_run import assert_close
from tiny import build, call_of, conditions, ddim, inputs, same_bits, sample, transformed
from torch import Tensor

from tokencache_compile import ExportError, export_onnx, load
from tokencache_compile.export.session import SessionEngine

DEVICE = os.environ.get("TOKENCACHE_TEST_DEVICE", "cuda")  # "cpu" tries the tests themselves
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]
RANDOM: dict[str, Any] = {"scorer": "random", "context": "reuse"}


@pytest.fixture(autouse=True)
def provider() -> str:
    """The provider of ``DEVICE``."""
    import onnxruntime

    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[DEVICE]
    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {name}: pip install onnxruntime-gpu")
    return DEVICE


def run(model: Any, kind: str, dtype: torch.dtype = torch.float32, seed: int = 2) -> list[Tensor]:
    given = {name: value.to(DEVICE) for name, value in conditions(kind, dtype=dtype).items()}
    call = call_of(model, given)
    return ddim(lambda step, x, t: call(step, x, t.to(DEVICE)), sample(seed=seed, dtype=dtype).to(DEVICE), steps=10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 3e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("kind", ["dit", "pixart_masked"])
def test_whole_runs(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """As eager steps of the same plan, at every step; the second run as the first, bit for bit."""
    model = build(kind).to(DEVICE, dtype)
    dispatcher = transformed(model, backend="onnxruntime", **RANDOM)
    first = run(dispatcher, kind, dtype)
    assert isinstance(dispatcher.captured().full, SessionEngine) and first[0].device.type == DEVICE
    assert_close(first, run(transformed(model, **RANDOM), kind, dtype), tolerance=tolerance)
    assert same_bits(run(dispatcher, kind, dtype), first)
    assert (dispatcher.summary().full_steps, dispatcher.summary().cached_steps) == (3, 7)


@pytest.mark.parametrize("selection", ["graph", "host"])
def test_a_bundle(selection: Any, provider: str, tmp_path: Path) -> None:
    """Exported from the CPU and run on the device, by scores that depend on the run."""
    plan = {"scorer": "change", "context": "cached", "history": "computed"}
    model = build("dit")
    export_onnx(transformed(model, example_inputs=inputs("dit"), **plan), tmp_path / "bundle", selection=selection)
    bundle = load(tmp_path / "bundle", provider=provider)
    assert_close(run(bundle, "dit"), run(transformed(model.to(DEVICE), **plan), "dit"), tolerance=1e-3)


def test_tensors_elsewhere_are_refused(tmp_path: Path) -> None:
    """And the next good call works."""
    given = {name: value.to(DEVICE) for name, value in inputs("dit").items()}
    dispatcher = transformed(build("dit").to(DEVICE), backend="onnxruntime", example_inputs=given)
    session = dispatcher.captured().full.session
    values = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype, device=DEVICE) for spec in session.io.inputs}
    if DEVICE != "cpu":
        with pytest.raises(ExportError, match=r"on cpu; the graph takes .* on cuda"):
            session.run(values | {"hidden_states": values["hidden_states"].cpu()})
    assert all(bool(result.isfinite().all()) for result in session.run(values).values() if result.is_floating_point())
