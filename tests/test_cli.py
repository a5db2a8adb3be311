"""The command line, with the sampler, metrics and explanations behind it; on tiny models, with eager graphs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import tokencache_compile
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.cli import app
from tokencache_compile.demo import (
    DEFAULT_MODEL,
    DEFAULT_REFINED,
    SCHEDULER_CONFIG,
    DemoResult,
    DemoSettings,
    Run,
    amplification,
    draw_grid,
    load_reference,
    sparkline,
    steps_for_macs,
)
from tokencache_compile.errors import ConfigError, UnsupportedModelError
from tokencache_compile.explain import cost_of, example_inputs, load_config, name_blocks, run_macs
from tokencache_compile.fingerprint import fingerprint
from tokencache_compile.metrics import deviation_per_step, mean_abs_deviation, psnr
from tokencache_compile.passes.pipeline import build_steps
from tokencache_compile.plan import CacheConfig, Context
from tokencache_compile.runtime import Summary
from tokencache_compile.sampling import Conditions, sample

STEPS, SAMPLES, GUIDANCE, RATIO, SEED = 9, 1, 2.5, 0.8, 3
LEFT, TOP, CELL = 200, 40, 64 + 6  # of the picture of 16 x 16 images


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomised(model: Any) -> Any:
    """diffusers' own initialisation leaves the gates too small to matter."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def make_dit(**changes: Any) -> Any:
    config = dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=6, sample_size=16, patch_size=4,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return randomised(DiTTransformer2DModel(**(config | changes)))


def make_pixart(**changes: Any) -> Any:
    config = dict(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=6, sample_size=16, patch_size=4,
        cross_attention_dim=48, caption_channels=20,
    )  # fmt: skip
    return randomised(PixArtTransformer2DModel(**(config | changes)))


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """The message of a command that is refused: exit code 1, on stderr, without a traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)  # not an error of ours that passed through
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    return result.stderr


@dataclass(frozen=True)
class Demo:
    folder: Path
    result: Result
    figures: dict[str, Any]
    picture: Image.Image

    def pixels(self, row: int) -> Tensor:
        """Row ``row`` of the picture, without its label and the gap to the next."""
        box = (LEFT, TOP + row * CELL, self.picture.width, TOP + row * CELL + 64)
        cut = self.picture.crop(box)
        return torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).reshape(64, -1, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_dit().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def demo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = invoke(
        "demo", "--model", str(folder), "--out", str(out), "--backend", "eager", "--steps", str(STEPS), "--samples", str(SAMPLES),
        "--guidance", str(GUIDANCE), "--ratio", str(RATIO), "--seed", str(SEED), "--repeats", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return Demo(out, result, json.loads((out / "demo.json").read_text()), Image.open(out / "demo.png"))


@pytest.fixture(scope="module")
def explained(folder: Path) -> str:
    result = invoke("explain", str(folder), "--ratio", "0.5", "--last-k", "1", "--steps", "9")
    assert result.exit_code == 0, result.output
    return result.output


def explained_number(text: str, name: str) -> float:
    """The first number of the line called ``name``."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.removeprefix(name).split()[0])


# -- demo -------------------------------------------------------------------------------------------------------------


def test_demo_picture_shows_three_different_runs(demo: Demo) -> None:
    assert demo.picture.size == (LEFT + 10 * CELL + 6, TOP + 5 * CELL)
    uncached, cached, difference, fewer, fewer_difference = (demo.pixels(row) for row in range(5))
    assert not torch.equal(uncached, cached)
    assert not torch.equal(uncached, fewer)
    assert not torch.equal(cached, fewer)
    for row in (difference, fewer_difference):
        inside = row[:, :64]  # the first column, no white gaps
        assert int(inside.max()) > 0
        assert float(inside.float().mean()) < float(uncached[:, :64].float().mean())


def test_demo_figures_agree_with_each_other(demo: Demo) -> None:
    figures, runs = demo.figures, demo.figures["runs"]
    assert figures["images"] == 10 * SAMPLES
    assert figures["settings"]["ratio"] == RATIO
    assert figures["settings"]["scheduler"]["beta_end"] == 0.02
    assert figures["machine"]["torch"] == torch.__version__
    assert figures["machine"]["threads"] == 1
    assert figures["classes"][9] == "ankle boot"
    uncached, cached, fewer = runs["uncached"], runs["cached"], runs["fewer_steps"]
    assert (uncached["steps"], uncached["kinds"]) == (STEPS, "I" * STEPS)
    assert (cached["full_steps"], cached["cached_steps"], cached["kinds"]) == (5, 4, "IPIPIPIPI")
    assert fewer["kinds"] == "I" * fewer["steps"]
    per_step = uncached["macs"] // STEPS
    assert fewer["macs"] == fewer["steps"] * per_step
    assert fewer["macs"] - per_step < cached["macs"] <= fewer["macs"] < uncached["macs"]
    for run in runs.values():
        assert len(run["latency_seconds_each"]) == 2
        assert run["latency_seconds"] == pytest.approx(sum(run["latency_seconds_each"]) / 2)
        assert run["speed_up"] == pytest.approx(uncached["latency_seconds"] / run["latency_seconds"])
    assert uncached["psnr_db"] is None
    assert figures["margin_db"] == pytest.approx(cached["psnr_db"] - fewer["psnr_db"])
    assert set(runs) == {"uncached", "cached", "fewer_steps"}  # no adapter was asked for
    deviation = figures["deviation_pred_x0"]
    assert len(deviation["per_step"]) == STEPS
    assert deviation["per_step"][0] == 0.0  # the first step is an I-step on the same noise
    assert min(deviation["per_step"][1:]) > 0.0
    assert deviation["max"] == max(deviation["per_step"])
    assert deviation["mean"] == cached["mean_deviation_pred_x0"] == pytest.approx(sum(deviation["per_step"]) / STEPS)


def test_demo_figures_are_those_of_the_model_itself(demo: Demo, folder: Path) -> None:
    """PSNR, deviation and MACs once more, from the eager model and a dispatcher of the test's own."""
    model = DiTTransformer2DModel.from_pretrained(folder).eval()
    noise = torch.randn(10, 1, 16, 16, generator=torch.Generator().manual_seed(SEED))
    labels = torch.arange(10)
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    dispatcher = tokencache_compile.transform(model, RATIO, backend="eager", scheduler=scheduler)
    steps: dict[str, list[Tensor]] = {"eager": [], "cached": []}
    conditions = Conditions.of_labels(labels, 10, GUIDANCE)
    reference = sample(model, DDIMScheduler(**SCHEDULER_CONFIG), noise, STEPS, conditions, lambda _, x: steps["eager"].append(x))
    images = sample(dispatcher, scheduler, noise, STEPS, conditions, lambda _, x: steps["cached"].append(x))
    cached = demo.figures["runs"]["cached"]
    error = (images.clamp(-1, 1) - reference.clamp(-1, 1)).double().square().mean()
    assert cached["psnr_db"] == pytest.approx(float(10 * torch.log10(4 / error)), abs=1e-3)
    expected = [float((a - b).abs().mean()) for a, b in zip(steps["cached"], steps["eager"], strict=True)]
    assert demo.figures["deviation_pred_x0"]["per_step"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (cached["macs"], cached["cache_bytes"]) == (dispatcher.summary().macs, dispatcher.summary().cache_bytes)


def test_demo_prints_the_figures_and_where_they_are(demo: Demo) -> None:
    text = demo.result.output
    runs = demo.figures["runs"]
    assert "5 I + 4 P" in text
    assert f"{runs['cached']['psnr_db']:.1f} dB" in text
    assert f"{demo.figures['deviation_pred_x0']['mean']:.4f}" in text
    assert f"a run of {runs['fewer_steps']['steps']} steps" in text
    assert "I·I·I·I·I" in text
    assert "eager graphs on both sides" in text
    assert str(demo.folder / "demo.png") in text.replace("\n", "")


def run_of(value: float, psnr_db: float = 30.0) -> Run:
    images = torch.full((10, 1, 8, 8), value)
    return Run(images, (images,), "I", Summary(1, 0, (), 0, 0, 10**9, 10**9), (1.0,), psnr_db)


def test_grid_shows_each_run_and_its_amplified_difference() -> None:
    names = tuple(f"class {index}" for index in range(10))
    result = DemoResult(DemoSettings(), names, "", run_of(0.0), run_of(0.1), run_of(-0.2))
    picture = draw_grid(result, zoom=8)
    centres = [picture.getpixel((LEFT + 32, TOP + row * CELL + 32)) for row in range(5)]
    # in [0, 1] the differences are 0.05 and 0.1; 8 is the largest power of two that keeps them below 1
    expected = [round(255 * value) for value in (0.5, 0.55, 0.05 * 8, 0.4, 0.1 * 8)]
    for pixel, value in zip(centres, expected, strict=True):
        assert pixel == pytest.approx((value, value, value), abs=1)


def test_grid_shows_the_refined_run_below_the_cached_one() -> None:
    result = DemoResult(DemoSettings(), ("a",), "", run_of(0.0), run_of(0.1), run_of(-0.2), run_of(0.06), refined_blocks=3)
    picture = draw_grid(result, zoom=8)
    assert picture.height == TOP + 7 * CELL
    centres = [picture.getpixel((LEFT + 32, TOP + row * CELL + 32)) for row in range(7)]
    expected = [round(255 * value) for value in (0.5, 0.55, 0.05 * 8, 0.53, 0.03 * 8, 0.4, 0.1 * 8)]
    for pixel, value in zip(centres, expected, strict=True):
        assert pixel == pytest.approx((value, value, value), abs=1)


@pytest.mark.parametrize(("top", "factor"), [(1.0, 1), (0.6, 1), (0.4, 2), (0.1, 8), (1e-4, 64), (0.0, 64)])
def test_amplification_keeps_below_white(top: float, factor: int) -> None:
    assert amplification([torch.full((2, 1, 4, 4), top), torch.zeros(2, 1, 4, 4)]) == factor


@pytest.mark.parametrize(("macs", "steps"), [(1, 1), (9, 3), (10, 4), (11, 4), (12, 4)])
def test_steps_for_macs_rounds_up(macs: int, steps: int) -> None:
    assert steps_for_macs(macs, 3) == steps


def test_sparkline_goes_from_nought_to_the_largest() -> None:
    assert sparkline([0.0, 1.0, 4.0, 8.0]) == "▁▂▅█"
    assert sparkline([0.0, 0.0]) == "▁▁"


def test_demo_without_caching_has_no_margin(folder: Path, tmp_path: Path) -> None:
    result = invoke(
        "demo", "--model", str(folder), "--out", str(tmp_path), "--backend", "eager", "--steps", "2", "--samples", "1", "--ratio", "0",
        "--repeats", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["margin_db"] is None
    assert figures["runs"]["fewer_steps"]["steps"] == 2
    assert figures["deviation_pred_x0"]["per_step"] == [0.0, 0.0]
    assert "No margin" in result.output


def test_demo_runs_an_artefact(folder: Path, tmp_path: Path) -> None:
    """Its plan and its ratio, unless another ratio is asked for."""
    model = DiTTransformer2DModel.from_pretrained(folder).eval()
    config = tokencache_compile.CacheConfig(ratio=1.0, last_k=0, schedule=tokencache_compile.Schedule(every=2))
    CacheArtefact(config=config, base=fingerprint(model)).save_pretrained(tmp_path / "plan")
    common = ("demo", "--model", str(folder), "--plan", str(tmp_path / "plan"), "--backend", "eager", "--steps", "4")
    common += ("--samples", "1", "--repeats", "1")
    for given, ratio in (((), 1.0), (("--ratio", "0.5"), 0.5)):
        assert invoke(*common, "--out", str(tmp_path / "out"), *given).exit_code == 0
        figures = json.loads((tmp_path / "out" / "demo.json").read_text())
        assert figures["settings"]["ratio"] == ratio and figures["settings"]["plan"] == str(tmp_path / "plan")
        assert f"ratio {ratio}" in figures["plan"]
    assert "no artefact" in refused("demo", "--model", str(folder), "--plan", str(tmp_path / "none"))


def test_demo_of_the_shipped_model_runs_its_lora(tmp_path: Path) -> None:
    """Its row stands in the table, the picture and the figures, and is that of the shipped artefact."""
    common = ("--backend", "eager", "--steps", "5", "--samples", "1", "--repeats", "1")
    result = invoke("demo", "--out", str(tmp_path), *common)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "demo.json").read_text())
    runs = figures["runs"]
    assert list(runs) == ["uncached", "cached", "refined", "fewer_steps"]
    refined, cached = runs["refined"], runs["cached"]
    (row,) = [line for line in result.output.splitlines() if line.strip().startswith("cached, LoRA ")]
    assert refined["title"] == "cached, last 3 blocks refined by LoRA" and f"cached, LoRA: {refined['title']}." in result.output
    assert f"{refined['macs'] / 1e9:.1f}" in row
    assert f"{refined['mean_deviation_pred_x0']:.4f}" in row and f"{refined['psnr_db']:.1f} dB" in row
    assert Image.open(tmp_path / "demo.png").height == TOP + 7 * (128 + 6)

    model = load_reference(DEFAULT_MODEL)
    noise = torch.randn(10, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    dispatcher = tokencache_compile.transform(model, DEFAULT_REFINED, backend="eager", scheduler=scheduler)
    conditions = Conditions.of_labels(torch.arange(10), 10, 2.5)
    reference = sample(model, DDIMScheduler(**SCHEDULER_CONFIG), noise, 5, conditions).clamp(-1, 1)
    assert refined["psnr_db"] == pytest.approx(psnr(sample(dispatcher, scheduler, noise, 5, conditions).clamp(-1, 1), reference), abs=1e-3)
    assert refined["macs"] == dispatcher.summary().macs > cached["macs"]
    assert refined["kinds"] == cached["kinds"] == "IPPPI"


def test_demo_refuses_with_one_message(folder: Path, tmp_path: Path) -> None:
    assert "ratio=1.5 was asked for" in refused("demo", "--ratio", "1.5")
    assert "[0, 1]" in refused("demo", "--ratio", "1.5")  # not taken for markup
    assert "steps=0" in refused("demo", "--steps", "0")
    assert str(tmp_path / "none") in refused("demo", "--model", str(tmp_path / "none"))
    make_dit(in_channels=4, num_layers=1).save_config(tmp_path)
    assert "cannot be loaded" in refused("demo", "--model", str(tmp_path))  # a configuration without weights
    make_dit(in_channels=4, num_layers=1).save_pretrained(tmp_path)
    assert "4 channels" in refused("demo", "--model", str(tmp_path))
    assert not (tmp_path / "demo.png").exists()


# -- sampling and metrics ---------------------------------------------------------------------------------------------


def test_sample_is_guided_ddim() -> None:
    """Against the formula of DDIM written out, with a predictor whose answer depends on labels, timestep and sample."""
    calls: list[int] = []

    def predict(rows: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        calls.append(len(rows))
        value = rows * 0.3 + class_labels.view(-1, 1, 1, 1) * 0.1 - timestep.view(-1, 1, 1, 1) / 5000
        variance = torch.full_like(value, math.nan)  # must be left aside
        return (torch.cat([value, variance], dim=1),)

    noise, labels = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2])
    seen: list[tuple[int, Tensor]] = []
    conditions = Conditions.of_labels(labels, 10, 3.0)
    images = sample(predict, DDIMScheduler(**SCHEDULER_CONFIG), noise, 5, conditions, lambda index, x: seen.append((index, x)))

    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    x, predictions = noise.double(), []
    for t in (800, 600, 400, 200, 0):
        conditional = x * 0.3 + labels.view(-1, 1, 1, 1) * 0.1 - t / 5000
        unconditional = x * 0.3 + 10 * 0.1 - t / 5000
        epsilon = unconditional + 3.0 * (conditional - unconditional)
        now, then = alpha[t], alpha[t - 200] if t else torch.tensor(1.0)
        clean = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * epsilon
        predictions.append(clean)
    assert calls == [6] * 5
    assert [index for index, _ in seen] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(images.double(), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack([x for _, x in seen]).double(), torch.stack(predictions), rtol=1e-4, atol=1e-3)


def test_metrics_on_known_differences() -> None:
    zeros, ones = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    assert psnr(zeros + 0.2, zeros) == pytest.approx(20.0)
    assert psnr(zeros + 0.1, zeros, data_range=1.0) == pytest.approx(20.0)
    assert psnr(zeros, zeros) == math.inf
    half = torch.cat([zeros[:1], ones[:1]])  # errors are averaged over images before the logarithm
    assert psnr(half, zeros) == pytest.approx(10 * math.log10(4 / 0.5))
    assert mean_abs_deviation(half, -ones) == pytest.approx(1.5)
    assert deviation_per_step([zeros, ones], [zeros, -ones]) == [0.0, 2.0]
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\) and \(1, 1, 4, 4\)"):
        psnr(zeros, zeros[:1])
    with pytest.raises(ValueError):
        deviation_per_step([zeros], [zeros, zeros])


# -- explain ----------------------------------------------------------------------------------------------------------


def test_explain_prints_what_was_found(folder: Path) -> None:
    result = invoke("explain", str(folder), "--last-k", "2", "--forecast", "1", "--context", "reuse", "--history", "computed")
    assert result.exit_code == 0, result.output
    text = result.output
    for expected in (
        "DiTTransformer2DModel",
        "6 of 1 structure",
        "transformer_blocks.0 … transformer_blocks.5",
        "[2, 16, 32] (batch, tokens, channels), float32",
        "1 self-attention",
        "nothing but the stream",
        "one per sample",
        "4 of 6 blocks cached, 16 tokens, ratio 0.9",
        "forecast order 1 from computed",
        "reuse (chosen)",
    ):
        assert expected in text
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == list(get_args(Context))


def test_explained_costs_are_those_of_a_run(folder: Path, explained: str) -> None:
    """Printed MACs and cache bytes against a dispatcher that ran with the same batch and steps."""
    model = DiTTransformer2DModel.from_pretrained(folder).eval()
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    dispatcher = tokencache_compile.transform(model, 0.5, last_k=1, backend="eager", scheduler=scheduler)
    sample(dispatcher, scheduler, torch.zeros(1, 1, 16, 16), 9, Conditions.of_labels(torch.tensor([3]), 10, 2.0))
    summary, steps = dispatcher.summary(), dispatcher.steps
    assert run_macs(dispatcher.plan, steps.macs_full, steps.macs_cached, 9) == summary.macs
    assert run_macs(dispatcher.plan, steps.macs_full, (), 9) == summary.macs_uncached
    assert explained_number(explained, "9 steps") == pytest.approx(summary.macs / 1e9, rel=1e-3)
    assert explained_number(explained, "I-step") == pytest.approx(summary.macs_uncached / 9e9, rel=1e-3)
    assert f"GMACs uncached ({summary.macs_saved:.1%} saved)" in explained
    assert f"{summary.cache_bytes / 2**20:.2f} MiB at batch 2" in explained


def test_costs_of_other_contexts_are_those_of_their_own_plans() -> None:
    model = make_dit(num_layers=2)
    inputs = example_inputs(model)
    built = build_steps(model, inputs, CacheConfig(0.7, last_k=1, context="kept"), None)
    found = set()
    for context in get_args(Context):
        cost = cost_of(built, context, list(inputs.values()), None, 9)
        own = built if context == "kept" else build_steps(model, inputs, CacheConfig(0.7, last_k=1, context=context), None)
        assert cost.macs_cached == own.macs_cached
        assert cost.cache_bytes == sum(spec.nbytes for spec in own.full.caches)
        assert cost.macs_run == 5 * own.macs_full + 4 * own.macs_cached[0]
        found.add((cost.macs_cached, cost.cache_bytes))
    assert len(found) == 4


@pytest.mark.parametrize("conditions", [False, True])
def test_explain_takes_a_pixart_configuration(conditions: bool, tmp_path: Path) -> None:
    model = make_pixart(use_additional_conditions=conditions)
    inputs = example_inputs(model, batch=3)
    assert ("added_cond_kwargs" in inputs) == conditions
    assert model(**inputs).sample.shape == (3, 8, 16, 16)
    model.save_config(tmp_path / "transformer")  # the layout of a pipeline
    for target in (tmp_path, tmp_path / "transformer" / "config.json"):
        assert load_config(str(target))["use_additional_conditions"] == conditions
    if not conditions:
        return
    text = invoke("explain", str(tmp_path)).output
    assert "PixArtTransformer2DModel" in text
    assert "[2, 16, 48]" in text
    assert "1 self-attention" in text  # cross-attention is none


def test_explain_counts_the_predictor(folder: Path, explained: str) -> None:
    with_predictor = invoke("explain", str(folder), "--ratio", "0.5", "--last-k", "1", "--scorer", "predictor").output
    one_block = explained_number(explained, "I-step") / 6  # nearly: patch embedding and output are small
    more = explained_number(with_predictor, "P-step") - explained_number(explained, "P-step")
    assert more == pytest.approx(one_block, rel=0.1)


def test_explain_leaves_the_callers_random_state_alone(folder: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert invoke("explain", str(folder), "--ratio", "0").exit_code == 0
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_explain_refuses_with_reason_and_remedy(tmp_path: Path, folder: Path) -> None:
    make_pixart(num_layers=0).save_config(tmp_path)
    message = refused("explain", str(tmp_path))
    assert "PixArtTransformer2DModel is refused" in message
    assert "no repeated block" in message
    assert "remedy: TokenCache needs a stack" in message
    assert "it has no blocks" in refused("explain", str(tmp_path), "--scorer", "predictor")
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert "Use the Python API" in refused("explain", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "_class_name" in refused("explain", str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel", "norm_type": "none"}')
    assert "diffusers cannot build" in refused("explain", str(tmp_path))
    assert "no configuration was found" in refused("explain", str(tmp_path / "none"))
    assert "last_k=6 was asked for" in refused("explain", str(folder), "--last-k", "6")
    assert "ratio=-0.1 was asked for" in refused("explain", str(folder), "--ratio", "-0.1")
    assert "full='0,x' was asked for" in refused("explain", str(folder), "--full", "0,x")
    assert "full=(1, 4) was asked for" in refused("explain", str(folder), "--full", "1,4")
    assert "every=0 was asked for" in refused("explain", str(folder), "--every", "0", "--full", "0,4")
    assert "steps=0 was asked for" in refused("explain", str(folder), "--steps", "0")


def test_example_inputs_are_made_for_known_classes_only() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear: .* Use the Python API"):
        example_inputs(nn.Linear(2, 2))


def test_load_config_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not a valid JSON file"):
        load_config(str(tmp_path))


def test_name_blocks_puts_runs_together() -> None:
    assert name_blocks(["a.0", "a.1", "a.2", "b.0", "c.5", "c.7"]) == "a.0 … a.2, b.0, c.5, c.7"


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output.split()) == (0, ["tokencache", version("tokencache-compile")])


def test_a_wrong_choice_is_a_usage_error() -> None:
    result = invoke("demo", "--backend", "jax")
    assert result.exit_code == 2
    assert "inductor" in result.output
