"""``tokencache bench``: figures against plain loops, failures, a run that is stopped, and what is concluded from the rows."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from rich.console import Console
from tiny import LAYERS, build
from torch import Tensor, nn

import tokencache_compile as tc
from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.compare import METRICS, Metric, best_at, failures, front, margin, points, warnings
from tokencache_compile.evidence.latency import Clock
from tokencache_compile.evidence.methods import FEWER, OURS, RANDOM, Method, cached, fewer_steps, standard_methods
from tokencache_compile.evidence.runs import BenchSettings, run_bench
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.evidence.subjects import drawn_from
from tokencache_compile.metrics import ssim
from tokencache_compile.sampling import Conditions

STEPS, SAMPLES, CHUNK, GUIDANCE, CLASSES = 6, 5, 2, 2.0, 10
PSNR, DEVIATION = METRICS[0], METRICS[2]
SETTINGS = BenchSettings(SAMPLES, CHUNK, 2, 2, "eager")
SCHEDULER: dict[str, Any] = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def load() -> nn.Module:
    """A tiny DiT of pixels; the same weights at every call."""
    net: nn.Module = build("dit", std=0.05, in_channels=1, out_channels=1, num_embeds_ada_norm=CLASSES)
    return net


def noise_and_labels() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(SAMPLES, 1, 8, 8, generator=draw), torch.randint(0, CLASSES, (SAMPLES,), generator=draw)


def subject() -> Subject:
    noise, labels = noise_and_labels()
    conditions = Conditions.of_labels(labels, CLASSES, GUIDANCE)
    return Subject("tiny", load, lambda: DDIMScheduler(**SCHEDULER), drawn_from(noise, conditions, "cpu"), STEPS, settings={"seed": 5})


class Louder(nn.Module):
    """A method that errs by a known factor."""

    def __init__(self, net: nn.Module, factor: float = 1.05) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        output: Tensor = self.net(*args, **kwargs)[0]
        return (self.factor * output,)


def broken(net: nn.Module, scheduler: Any, backend: str) -> Any:
    raise RuntimeError("this method takes no such model\nand more")


def methods(last: Callable[..., Any] = broken) -> list[Method]:
    everything = dict(backends=("eager",))
    return [
        Method("fewer steps: 3", FEWER, None, 3, **everything),
        replace(cached("random tokens", tc.CacheConfig(0.5, schedule=tc.Schedule(2)), family=RANDOM), **everything),
        Method("the model itself", "same", lambda net, *_: net, **everything),
        Method("louder", "louder", lambda net, *_: Louder(net), **everything),
        Method("broken", "broken", last, **everything),
    ]


def plain_run(net: nn.Module, steps: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Images and pred_x0 [steps, n, C, H, W] by the equations of DDIM (η = 0), one sample at a time."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    noise, labels = noise_and_labels()
    finished, predicted = [], []
    for x, label in zip(noise, labels, strict=True):
        seen = []
        for step in range(steps):
            t = (steps - 1 - step) * (1000 // steps)
            before = t - 1000 // steps
            rows, classes = torch.stack([x, x]), torch.stack([label, torch.tensor(CLASSES)])
            with torch.no_grad():
                given, null = net(rows, timestep=torch.full((2,), t), class_labels=classes, return_dict=False)[0].mul(factor)
            epsilon = null + GUIDANCE * (given - null)
            now = float(kept[t])
            then = float(kept[before]) if before >= 0 else float(kept[0])
            x0 = (x - math.sqrt(1 - now) * epsilon) / math.sqrt(now)
            seen.append(x0)
            x = math.sqrt(then) * x0 + math.sqrt(1 - then) * epsilon
        finished.append(x)
        predicted.append(torch.stack(seen))
    return torch.stack(finished).clamp(-1, 1), torch.stack(predicted, dim=1).clamp(-1, 1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """All methods in both phases: the result, its folder, and what was printed."""
    out, printed = tmp_path_factory.mktemp("bench"), io.StringIO()
    console = Console(file=printed, width=200)
    result = run_bench(subject(), methods(), out, ("quality",), SETTINGS, console)
    assert all(row["latency"] == {} for row in result["rows"].values())
    result = run_bench(subject(), methods(), out, ("latency",), SETTINGS, console)
    return result, out, printed.getvalue()


def test_figures_are_those_of_a_plain_loop(bench: tuple[dict[str, Any], Path, str]) -> None:
    rows, net = bench[0]["rows"], load()
    images, predictions = plain_run(net, STEPS)
    for name, steps, factor in (("fewer steps: 3", 3, 1.0), ("louder", STEPS, 1.05)):
        own, own_predictions = plain_run(net, steps, factor)
        error = sum(float((a - b) ** 2) for a, b in zip(own.flatten(), images.flatten(), strict=True)) / images.numel()
        assert rows[name]["quality"]["psnr_db"] == pytest.approx(10 * math.log10(4 / error), abs=0.02)
        if steps < STEPS:
            assert "deviation" not in rows[name]["quality"]
            continue
        for step in range(STEPS):
            each = [float((own_predictions[step, n] - predictions[step, n]).abs().mean()) for n in range(SAMPLES)]
            mean = sum(each) / SAMPLES
            spread = math.sqrt(sum((value - mean) ** 2 for value in each) / SAMPLES)
            assert rows[name]["quality"]["deviation"]["mean"][step] == pytest.approx(mean, rel=1e-3)
            assert rows[name]["quality"]["deviation"]["std"][step] == pytest.approx(spread, rel=1e-2)


def test_the_model_itself_is_exact_and_costs_itself(bench: tuple[dict[str, Any], Path, str]) -> None:
    quality = bench[0]["rows"]["the model itself"]["quality"]
    assert quality["psnr_db"] is None and quality["macs_share"] == 1.0 and set(quality["deviation"]["mean"]) == {0.0}
    assert bench[0]["rows"]["fewer steps: 3"]["quality"]["macs_share"] == pytest.approx(3 / STEPS)
    tokens, width, guided_rows = 16, 32, 2
    norms = guided_rows * STEPS * (2 * LAYERS + 1) * tokens * width
    assert quality["paper_macs"] - quality["macs"] == 4 * norms  # two norms a block and the last, all without weights


def test_latency_is_of_whole_runs_beside_the_uncached_one(bench: tuple[dict[str, Any], Path, str]) -> None:
    for name, row in bench[0]["rows"].items():
        if name == "broken":
            continue
        timed = row["latency"]["eager"]
        assert len(timed["each"]) == len(timed["uncached_each"]) == SETTINGS.rounds
        ratios = sorted(other / one for other, one in zip(timed["uncached_each"], timed["each"], strict=True))
        assert timed["speed_up"] == pytest.approx(sum(ratios) / 2)  # the median of two
        assert timed["seconds"] == pytest.approx(sum(timed["each"]) / 2) and timed["p90"] in timed["each"]
        assert timed["compile_seconds"] >= 0.0


def test_each_method_compiles_its_own_code() -> None:
    """Past torch.compile's limit of versions of one piece of code, a method would run eager under the name of compiled."""
    compiled: list[float] = []

    def start(factor: float) -> Callable[..., Any]:
        def begin(net: nn.Module, *_: Any) -> nn.Module:
            louder = Louder(net, factor)

            def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
                compiled.append(factor)
                return graph.forward

            louder.compile(backend=backend)
            return louder

        return begin

    with torch._dynamo.config.patch(recompile_limit=1):
        clock = Clock(replace(subject(), steps=2), batch=1, rounds=1, backend="eager")
        for factor in (1.5, 2.5):
            clock.measure(Method(str(factor), "louder", start(factor)), "inductor")
    assert set(compiled) == {1.5, 2.5}


def test_a_failed_method_is_a_row_and_stops_nothing(bench: tuple[dict[str, Any], Path, str]) -> None:
    result, out, printed = bench
    rows = json.loads((out / "bench.json").read_text())["rows"]
    assert rows["broken"]["quality"] == {"failed": "RuntimeError: this method takes no such model"}
    assert rows["broken"]["latency"]["eager"] == {"failed": "RuntimeError: this method takes no such model"}
    assert "failed: broken: RuntimeError: this method takes no such model" in printed
    assert set(failures(result)) == {"broken (quality)", "broken (latency, eager)"}
    assert {point.name for point in points(result) if point.quality} == {m.name for m in methods()} - {"broken"}


def test_a_stopped_bench_goes_on(tmp_path: Path) -> None:
    started: list[str] = []

    def counted(name: str, start: Callable[..., Any] | None) -> Callable[..., Any]:
        def begin(net: nn.Module, scheduler: Any, backend: str) -> Any:
            started.append(name)
            return net if start is None else start(net, scheduler, backend)

        return begin

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    def all_of(last: Callable[..., Any]) -> list[Method]:
        return [replace(m, start=counted(m.name, m.start)) for m in methods(last)]

    console = Console(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        run_bench(subject(), all_of(killed), tmp_path, ("quality",), SETTINGS, console)
    kept = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [name for name, row in kept.items() if row["quality"] is not None] == [m.name for m in methods()[:-1]]
    assert not list(tmp_path.glob("*.partial"))

    started.clear()
    result = run_bench(subject(), all_of(lambda net, *_: net), tmp_path, ("quality",), SETTINGS, console)
    assert started == ["broken"] and result["rows"]["broken"]["quality"]["macs_share"] == 1.0
    assert {name: row for name, row in result["rows"].items() if name != "broken"} == {n: r for n, r in kept.items() if n != "broken"}

    with pytest.raises(ConfigError, match=r"holds figures of .*'samples': 5.*and asked for is .*'samples': 4"):
        run_bench(subject(), methods(), tmp_path, ("quality",), replace(SETTINGS, samples=4), console)
    with pytest.raises(ConfigError, match=r"'seed': 5.*'seed': 6"):
        run_bench(replace(subject(), settings={"seed": 6}), methods(), tmp_path, ("quality",), SETTINGS, console)


def test_judges_see_what_is_best_at_some_speed(tmp_path: Path) -> None:
    """Their figure is that of the samples in 8 bits; who fails then is a row too; a stopped run goes on with the samples in files."""
    begun: list[str] = []

    def begin(net: nn.Module, *_: Any) -> nn.Module:
        begun.append("fickle")
        if len(begun) == 2:
            raise RuntimeError("only once")
        return Louder(net, 1.2)

    def spread(images: Tensor) -> float:
        assert images.shape == (SAMPLES, 1, 8, 8)
        return float(images.std())

    def interrupted(images: Tensor) -> float:
        raise KeyboardInterrupt

    every = [*methods()[:-1], Method("fickle", "fickle", begin, backends=("eager",))]
    console, settings = Console(file=io.StringIO()), replace(SETTINGS, judged=SAMPLES)
    run_bench(subject(), every, tmp_path, ("quality",), settings, console)
    content = json.loads((tmp_path / "bench.json").read_text())
    for name, speed in (("fewer steps: 3", 2.0), ("random tokens", 1.0), ("the model itself", 1.0), ("louder", 3.0), ("fickle", 1.6)):
        content["rows"][name]["latency"]["eager"] = {"speed_up": speed}
    (tmp_path / "bench.json").write_text(json.dumps(content))

    with pytest.raises(KeyboardInterrupt):
        run_bench(replace(subject(), judges={"frechet": interrupted}), every, tmp_path, ("judges",), settings, console)
    drawn = sorted((tmp_path / "drawn" / "uncached").glob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in drawn]
    result = run_bench(
        replace(subject(), judges={"frechet": spread}, floors={"frechet": 0.25}), every, tmp_path, ("judges",), settings, console
    )
    assert [path.stat().st_mtime_ns for path in drawn] == times and len(drawn) == math.ceil(SAMPLES / CHUNK)

    expected = {
        "uncached": plain_run(load(), STEPS)[0],
        "fewer steps: 3": plain_run(load(), 3)[0],
        "louder": plain_run(load(), STEPS, 1.05)[0],
    }
    found = {name: row["judges"]["frechet"] for name, row in result["rows"].items() if row["judges"].keys() == {"frechet"}}
    found["uncached"] = result["uncached"]["frechet"]
    assert found == {name: pytest.approx(float(images.std()), abs=2e-3) for name, images in expected.items()}
    assert result["floors"] == {"frechet": 0.25} and failures(result) == {"fickle (judges)": "RuntimeError: only once"}
    judged = {point.name: point.value(METRICS[3]) for point in points(result)}
    assert judged == {name: found.get(name) for name in judged} and "fickle" in judged
    again = run_bench(replace(subject(), judges={"frechet": interrupted}), every, tmp_path, ("judges",), settings, console)
    assert again["rows"] == result["rows"] and len(begun) == 2


def test_fewer_steps_and_random_tokens_cannot_be_left_out(tmp_path: Path) -> None:
    for missing in (FEWER, RANDOM):
        some = [method for method in methods() if method.family != missing]
        with pytest.raises(ConfigError, match=missing):
            run_bench(subject(), some, tmp_path, ("quality",), SETTINGS, Console(file=io.StringIO()))
    with pytest.raises(ConfigError, match="a name of its own"):
        run_bench(subject(), [*methods(), methods()[0]], tmp_path, ("quality",), SETTINGS, Console(file=io.StringIO()))
    assert {FEWER, RANDOM, OURS} <= {method.family for method in standard_methods(subject(), guided=True)}
    assert all(method.steps is not None and method.steps < 50 for method in fewer_steps(50))


def row(family: str, speed: float, psnr: float, deviation: float | None = None) -> dict[str, Any]:
    quality = {"psnr_db": psnr, "macs_share": 0.5} | ({} if deviation is None else {"pred_x0_mae": deviation})
    return {"family": family, "steps": 50, "note": "", "quality": quality, "latency": {"inductor": {"speed_up": speed}}}


HAND = {
    "rows": {
        "f25": row(FEWER, 2.0, 36.0),
        "f12": row(FEWER, 4.0, 30.0),
        "good": row(OURS, 3.0, 40.0, 0.02),
        "poor": row(OURS, 2.5, 33.0, 0.05),
        "fast": row(OURS, 5.0, 20.0, 0.3),
        "close": row("peer", 2.5, 39.0, 0.01),
    }
}


def test_margins_are_over_fewer_steps_of_the_same_speed() -> None:
    found = {point.name: point for point in points(HAND)}
    everything = list(found.values())
    assert margin(found["good"], everything, PSNR) == pytest.approx(40.0 - 33.0)  # half-way from 36 at 2 to 30 at 4
    assert margin(found["poor"], everything, PSNR) == pytest.approx(33.0 - 34.5)
    assert margin(found["fast"], everything, PSNR) is None and margin(found["f25"], everything, PSNR) is None
    assert [line.split(" loses")[0] for line in warnings(everything)] == ["poor"] and "1.5 dB at 2.50×" in warnings(everything)[0]


def test_fronts_hold_what_nothing_beats() -> None:
    def beaten(point: Any, other: Any, metric: Metric) -> bool:
        own, its = point.value(metric), other.value(metric)
        return its is not None and other is not point and other.speed_up >= point.speed_up and metric.better(its, own)

    everything = points(HAND)
    for metric in (PSNR, DEVIATION):
        known = [point for point in everything if point.value(metric) is not None]
        expected = {point.name for point in known if not any(beaten(point, other, metric) for other in known)}
        assert {point.name for point in front(everything, metric)} == expected
    assert best_at(everything, PSNR, 2.5) is not None and best_at(everything, PSNR, 9.0) is None
    chosen = {speed: best_at(everything, DEVIATION, speed) for speed in (2.5, 3.0, 4.0)}
    assert {speed: point.name for speed, point in chosen.items() if point} == {2.5: "close", 3.0: "good", 4.0: "fast"}


def test_macs_stand_in_for_a_clock_that_was_not_read() -> None:
    rows = {name: row | {"latency": {}} for name, row in HAND["rows"].items()}
    assert {(point.speed_up, point.backend) for point in points({"rows": rows})} == {(2.0, None)}
    rows["good"] = HAND["rows"]["good"]
    assert [point.name for point in points({"rows": rows})] == ["good"]  # two clocks are not compared


def test_ssim_is_the_mean_over_windows() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.rand(2, 1, 13, 12, generator=draw, dtype=torch.float64) * 2 - 1 for _ in range(2))
    weight = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    total = sum(map(sum, weight))
    found = []
    for a, b in zip(one[:, 0].tolist(), other[:, 0].tolist(), strict=True):
        for top in range(3):
            for left in range(2):
                cells = [(weight[i][j] / total, a[top + i][left + j], b[top + i][left + j]) for i in range(11) for j in range(11)]
                mean_a, mean_b = sum(w * x for w, x, _ in cells), sum(w * y for w, _, y in cells)
                var_a, var_b = sum(w * (x - mean_a) ** 2 for w, x, _ in cells), sum(w * (y - mean_b) ** 2 for w, _, y in cells)
                covariance = sum(w * (x - mean_a) * (y - mean_b) for w, x, y in cells)
                c1, c2 = 0.02**2, 0.06**2
                luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
                found.append(luminance * (2 * covariance + c2) / (var_a + var_b + c2))
    assert ssim(one, other) == pytest.approx(sum(found) / len(found), abs=1e-9)
    assert ssim(one, one) == pytest.approx(1.0)
