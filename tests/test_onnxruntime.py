"""ONNX Runtime on the CPU in the model's place: whole runs against eager, and sessions that copy and overwrite nothing.

In a run, selections may differ where two tokens' scores are equal but for rounding: "ties". What follows is measured without them,
and each tie is shown to be one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pipes import images, pipeline
from typing import Any

import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler
from tiny import build, transformed
from torch import Tensor
from toy import ToyModel, toy_inputs

import tokencache_compile
from tokencache_compile import BundleDispatcher, BundleError, ConfigError, ExportError, Schedule, export_onnx, load
from tokencache_compile.demo import DEFAULT_MODEL, DEFAULT_PLAN, SCHEDULER_CONFIG, DemoSettings, load_reference
from tokencache_compile.export.onnxruntime import OnnxSession
from tokencache_compile.export.session import SessionEngine
from tokencache_compile.passes.engine_graph import engine_graphs
from tokencache_compile.sampling import Conditions, sample

CPU = torch.device("cpu")
DEMO = DemoSettings()
PICTURES = 10  # of the demo's 20: one a class, those it shows
TIE = 1e-4  # of a score: rounding moves logits of 20 by about 1e-4, and 1 − α by that share of itself


def reference(plan: Any, backend: str = "eager", blocks: int = 12) -> tuple[Any, Any]:
    """The demo's dispatcher and scheduler; of the model's blocks the first ``blocks``."""
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    model = load_reference(DEFAULT_MODEL)
    model.transformer_blocks = model.transformer_blocks[:blocks]
    return tokencache_compile.transform(model, plan, ratio=DEMO.ratio, backend=backend, scheduler=scheduler), scheduler


def demo_images(dispatcher: Any, scheduler: Any, rows: slice = slice(PICTURES)) -> Tensor:
    """The demo's pictures: its noise, labels, guidance and number of steps."""
    labels = torch.arange(10).repeat(DEMO.samples)
    noise = torch.randn((len(labels), 1, 32, 32), generator=torch.Generator().manual_seed(DEMO.seed))
    conditions = Conditions.of_labels(labels[rows], 10, DEMO.guidance)
    return sample(dispatcher, scheduler, noise[rows], DEMO.steps, conditions)


class Recorded(SessionEngine):
    """A P-step in ONNX Runtime that notes the scores it selects by, and those that torch gives for the same values."""

    def __init__(self, engine: SessionEngine, scores_in_torch: Any) -> None:
        super().__init__(engine.io, engine.session, engine.scores)
        self.in_torch = scores_in_torch
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []

    def _selected(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.scores is not None
        chosen, graph = super()._selected(named), self.in_torch
        with torch.no_grad():
            wanted = graph.module(*(named[spec.name] for spec in graph.io.inputs))
        here = self.scores.run(named)
        self.steps.append((chosen, here, dict(zip(here, wanted, strict=True))))
        return chosen


def check_ties(recorded: Recorded, batch: int) -> int:
    """The indices of both are equal but for tokens whose scores are equal. Returns how many rows had such."""
    ties = 0
    for chosen, here, there in recorded.steps:
        for block, kept in recorded.io.selects:
            a, b = here[f"scores_{block:02d}"], there[f"scores_{block:02d}"]
            assert bool(((a - b).abs() <= TIE * b.abs()).all()), (block, a, b)
            wanted = torch.topk(b, kept, dim=1).indices.expand(batch, -1)
            for row, (x, y) in enumerate(zip(chosen[f"index_{block:02d}"].expand(batch, -1).tolist(), wanted.tolist(), strict=True)):
                if different := sorted(set(x) ^ set(y)):
                    scores = b.expand(batch, -1)[row][different]
                    assert float(scores.max() - scores.min()) <= TIE * float(scores.abs().max()), (block, row, scores)
                    ties += 1
    return ties


def test_the_demo_run_of_the_reference_model(tmp_path: Path) -> None:
    """50 guided DDIM steps with the demo's plan (predictor, pairs), the host selecting, on the ten pictures the demo shows.

    The indices are equal but for ties, and the final images within 1e-3.
    """
    dispatcher, scheduler = reference(DEFAULT_PLAN)
    eager = demo_images(dispatcher, scheduler)
    export_onnx(dispatcher, tmp_path / "bundle", selection="host")
    graphs = engine_graphs(dispatcher.steps, ["sample"], "host")
    assert dispatcher.plan.config.scorer == "predictor" and dispatcher.plan.config.selection == "pair"
    bundle = load(tmp_path / "bundle", scheduler=scheduler)
    recorded = Recorded(bundle._compiled.cached[0], graphs[1].scores)  # type: ignore[arg-type]
    bundle._compiled = replace(bundle._compiled, cached=(recorded,))
    got = demo_images(bundle, scheduler)
    assert (bundle.summary().full_steps, bundle.summary().cached_steps) == (13, 37)
    assert bundle.summary() == dispatcher.summary()
    check_ties(recorded, 2 * PICTURES)
    assert float((got - eager).abs().max()) < 1e-3


def test_the_default_settings() -> None:
    """``backend="onnxruntime"``, the graph selecting, over 50 guided steps: random scores are the same everywhere, so there is no tie.

    Final images within 1e-3 of their largest value. The first 4 of the reference's 12 blocks, for time.
    """
    pictures = slice(4)
    eager, scheduler = reference(None, blocks=4)
    expected = demo_images(eager, scheduler, pictures)
    exported, own_scheduler = reference(None, "onnxruntime", blocks=4)
    got = demo_images(exported, own_scheduler, pictures)
    assert exported.summary() == eager.summary() and exported.summary().cached_steps == 36
    scale = max(1.0, float(expected.abs().max()))
    assert float((got - expected).abs().max()) < 1e-3 * scale
    eager.disable()
    assert float((demo_images(eager, scheduler, pictures) - expected).abs().max()) > 1e-2 * scale, "caching changed nothing"


# --- pipelines ------------------------------------------------------------------------------------------------------

STEPS = 12


def test_a_pixart_pipeline(tmp_path: Path) -> None:
    """The bundle as the pipeline's transformer: the images of the transformed pipeline, within 1e-4, and its counts.

    With text masks, DPM-Solver++, reused attention and random scores. (A DiT in its pipeline: see ``test_bundle.py``.)
    """
    settings: dict[str, Any] = {"schedule": Schedule(every=3), "context": "reuse", "scorer": "random", "last_k": 0, "forecast": 0}
    pipe = transformed(pipeline("pixart", build("pixart", layers=2, std=0.2)), **settings)
    expected = images(pipe, STEPS)
    summary = pipe.transformer.summary()
    export_onnx(pipe, tmp_path / "bundle")
    own = images(pipeline("pixart", build("pixart", layers=2, std=0.2)), STEPS)
    other = pipeline("pixart", build("pixart", layers=2, std=0.01))
    other.transformer = load(tmp_path / "bundle", scheduler=other.scheduler)
    for _ in range(2):
        assert float((images(other, STEPS) - expected).abs().max()) < 1e-4
        assert other.transformer.summary() == summary and summary.cached_steps == 8
    assert float((own - expected).abs().max()) > 1e-2, "caching changed nothing: the model itself would pass"
    assert other.transformer.dtype == torch.float32 and other.transformer.config.sample_size == 8


# --- sessions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleDispatcher:
    target = tmp_path_factory.mktemp("sessions") / "bundle"
    export_onnx(transformed(ToyModel(layers=2), history="computed", last_k=0, ratio=0.75, example_inputs=toy_inputs()), target)
    return load(target)


def test_outputs_are_what_onnxruntime_wrote_and_inputs_are_left_alone(bundle: BundleDispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the addresses that were bound: the caches of the next step are that memory, those that only move are the caller's own."""
    compiled = bundle._compiled
    steps, bound = compiled.steps, dict[str, int]()
    bind = OnnxSession._bind

    def noting(self: OnnxSession, binder: Any, spec: Any, tensor: Tensor) -> None:
        bound[spec.name] = tensor.data_ptr()
        bind(self, binder, spec, tensor)

    monkeypatch.setattr(OnnxSession, "_bind", noting)
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 16, 8, generator=draw), torch.tensor([500, 500])]
    caches = steps.initial_caches(CPU)
    for step, engine in enumerate((compiled.full, compiled.cached[0], compiled.full, compiled.cached[0])):
        extras = steps.step_inputs(step, CPU)
        given = [*inputs, *extras, *caches]
        before, places = [t.clone() for t in given], {name: t for name, t in zip(engine.io.arguments, given, strict=True)}  # type: ignore[attr-defined]
        outputs, after = engine(inputs, extras, caches)
        io = engine.io  # type: ignore[attr-defined]
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an input was written to"
        assert all(bound[spec.name] == places[spec.name].data_ptr() for spec in io.inputs), "an input was copied"
        for name, cache in zip(io.next_caches, after, strict=True):
            assert cache.data_ptr() == (bound[name] if name.startswith("next_") else places[name].data_ptr())
        assert outputs[0].data_ptr() == bound["output"]
        fresh = [bound[spec.name] for spec in io.outputs]
        assert len({*fresh, *(t.data_ptr() for t in given)}) == len(fresh) + len({t.data_ptr() for t in given}), "outputs overlap inputs"
        caches = after


def test_results_stay_when_the_session_runs_again(bundle: BundleDispatcher) -> None:
    session = bundle._compiled.full.session  # type: ignore[attr-defined]
    values = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in session.io.inputs}
    first = session.run(values)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    second = session.run(values | {"x": torch.ones_like(values["x"])})
    assert all(torch.equal(first[name], kept[name]) for name in first)
    assert not torch.equal(first["output"], second["output"])


def test_a_tensor_of_another_shape_is_never_bound(bundle: BundleDispatcher) -> None:
    session = bundle._compiled.full.session  # type: ignore[attr-defined]
    values = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in session.io.inputs}
    for wrong in (torch.zeros(1, 16, 8), torch.zeros(2, 16, 8, dtype=torch.float64)):
        with pytest.raises(ExportError, match=r"x is \(.*the graph takes \(2, 16, 8\) torch\.float32"):
            session.run(values | {"x": wrong})


@pytest.mark.parametrize("change", [{"shape": (2, 16, 4)}, {"shape": (2, 16, 16)}, {"dtype": torch.float16}, {"name": "z"}])
@pytest.mark.parametrize("which", ["inputs", "outputs"])
def test_a_table_that_is_not_the_files(bundle: BundleDispatcher, which: str, change: dict[str, Any]) -> None:
    """Memory is bound by address: a wrong shape would be read or written beyond its end."""
    session = bundle._compiled.full.session  # type: ignore[attr-defined]
    specs = getattr(session.io, which)
    io = replace(session.io, **{which: (replace(specs[0], **change), *specs[1:])})
    with pytest.raises(BundleError, match=r"full\.onnx has \w+ as .*, where .* was to be"):
        OnnxSession(Path(session.path), io)


def test_providers(bundle: BundleDispatcher) -> None:
    session = bundle._compiled.full.session  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"provider='rocm' was asked for; it is one of 'cpu', 'cuda', 'tensorrt'"):
        OnnxSession(session.path, session.io, "rocm")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        for provider in ("cuda", "tensorrt"):
            match = rf"provider='{provider}' was asked for, and this ONNX Runtime .* has .*CPUExecutionProvider.*onnxruntime-gpu"
            with pytest.raises(ExportError, match=match):
                OnnxSession(session.path, session.io, provider)


def test_products_of_float32_are_rounded_as_torchs(bundle: BundleDispatcher) -> None:
    session: OnnxSession = bundle._compiled.full.session  # type: ignore[attr-defined]
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert session._options("CUDAExecutionProvider")["use_tf32"] == int(allowed)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert session._options("CPUExecutionProvider") == {}


def test_a_file_onnxruntime_cannot_read(bundle: BundleDispatcher, tmp_path: Path) -> None:
    session = bundle._compiled.full.session  # type: ignore[attr-defined]
    (tmp_path / "full.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"ONNX Runtime \S+ refuses full\.onnx"):
        OnnxSession(tmp_path / "full.onnx", session.io)


def test_onnxruntime_is_not_installed(bundle: BundleDispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    session = bundle._compiled.full.session  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match=r"pip install onnxruntime, or onnxruntime-gpu"):
        OnnxSession(session.path, session.io)
