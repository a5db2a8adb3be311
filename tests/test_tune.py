"""Tuning: the space, the Pareto front, the choice, resuming, and a search on a tiny model measured once more by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from tiny import LAYERS, build, draw_weights
from torch import Tensor

import tokencache_compile as tc
from tokencache_compile import CacheConfig, CachePredictor, ConfigError, Schedule
from tokencache_compile.learn import tune as tuning
from tokencache_compile.learn.tune import Candidate, Goal, choose, pareto_front, search_space, tune
from tokencache_compile.metrics import psnr
from tokencache_compile.sampling import Conditions, sample

STEPS = 8
SCHEDULER = dict(num_train_timesteps=1000, clip_sample=False, prediction_type="v_prediction")


def candidate(speed: float, fidelity: float, clock: float | None = None) -> Candidate:
    return Candidate(CacheConfig(ratio=min(speed / 100, 1.0)), fidelity, speed, clock)


def noise_and_conditions() -> tuple[Tensor, Conditions]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([3, 7])
    return torch.randn(2, 4, 8, 8, generator=draw), Conditions.of_labels(labels, 1000, 2.0)


def search(tmp_path: Path, goal: Goal, **changes: Any) -> tuning.TuneResult:
    noise, conditions = noise_and_conditions()
    model = build("dit")
    return tune(model, DDIMScheduler(**SCHEDULER), noise, conditions, STEPS, goal, tmp_path / "tune.json", **changes)


SPACE = [
    CacheConfig(ratio=ratio, last_k=last_k, schedule=Schedule(every=every))
    for ratio, last_k, every in ((1.0, 0, 4), (1.0, 0, 2), (0.5, 1, 2), (0.5, 1, 4))
]


def test_a_sampler_that_adds_noise_is_compared_on_the_same_noise(tmp_path: Path) -> None:
    """Whatever torch's generator is at, and it goes on as if nothing had been drawn; held updates are where the search begins."""
    noise, conditions = noise_and_conditions()
    model, found = build("dit"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before, scheduler = torch.get_rng_state(), EulerAncestralDiscreteScheduler()
        result = tune(model, scheduler, noise, conditions, STEPS, Goal(psnr=-100.0), tmp_path / f"{seed}.json", budget=2)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(result)
    assert found[0] == found[1] and found[0].candidates[0].config == CacheConfig(forecast=0)
    assert found[0].candidates[0].psnr > 20


def test_front_and_choice() -> None:
    slow, middle, beaten, fast = candidate(1.5, 50.0), candidate(2.0, 45.0), candidate(1.9, 40.0), candidate(4.0, 30.0)
    measured = [beaten, slow, fast, middle]
    assert pareto_front(measured) == (fast, middle, slow)
    assert choose(measured, Goal(speedup=1.8)) is middle
    assert choose(measured, Goal(speedup=4.0)) is fast
    assert choose(measured, Goal(psnr=42.0)) is middle
    assert choose(measured, Goal(psnr=30.0)) is fast
    timed = candidate(9.0, 20.0, clock=1.1)
    assert choose([timed, middle], Goal(speedup=1.5)) is middle, "the clock counts where it was measured"


@pytest.mark.parametrize("goal", [Goal(speedup=5.0), Goal(psnr=60.0)])
def test_a_goal_out_of_reach(goal: Goal) -> None:
    with pytest.raises(ConfigError, match=r"the nearest of 2 settings reaches"):
        choose([candidate(4.0, 30.0), candidate(1.0, 50.0)], goal)


@pytest.mark.parametrize("given", [{}, {"speedup": 2.0, "psnr": 30.0}, {"speedup": 0.5}])
def test_goals_that_are_none(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="asked for"):
        Goal(**given)


def test_space_holds_what_the_search_is_about() -> None:
    base = CacheConfig(forecast=1)
    space = search_space(base, STEPS)
    assert space[0] == base and len(set(space)) == len(space)
    assert {config.ratio for config in space} == {1.0, 0.9, 0.7}
    assert {config.forecast for config in space} == {0, 1, 2}
    assert {config.last_k for config in space} == {0, 2}
    assert {config.context for config in space if config.ratio < 1.0} == {"reuse", "full"}
    assert {config.schedule.every for config in space if config.schedule is not None} >= {2, 3, 4, 5}
    last = [Schedule.with_last(STEPS, every) for every in (2, 3, 4)]
    assert {*last, *(Schedule.denser_late(STEPS, len(one.full or ())) for one in last)} <= {config.schedule for config in space}


def test_every_candidate_is_measured_as_it_runs(tmp_path: Path) -> None:
    result = search(tmp_path, Goal(psnr=0.0), space=SPACE)
    noise, conditions = noise_and_conditions()
    model, scheduler = build("dit"), DDIMScheduler(**SCHEDULER)
    reference = sample(model, scheduler, noise, STEPS, conditions)
    for row in result.candidates:
        cached = tc.transform(model, config=row.config, backend="eager", scheduler=scheduler)
        images = sample(cached, scheduler, noise, STEPS, conditions)
        assert row.psnr == pytest.approx(psnr(images, reference, 2 * float(reference.abs().max())), abs=1e-6)
        assert row.speedup == pytest.approx(1 / (1 - cached.summary().macs_saved))
        assert row.latency_speedup is None
    assert [row.config for row in result.candidates] == SPACE
    assert result.best.speedup == max(row.speedup for row in result.candidates)
    assert result.best in result.front


def test_a_stopped_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is not measured again, and the result is that of one search."""
    measured: list[CacheConfig] = []
    measure = tuning._Runner.measure

    def counting(self: Any, config: CacheConfig) -> Candidate:
        measured.append(config)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(self, config)

    monkeypatch.setattr(tuning._Runner, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, Goal(psnr=0.0), space=SPACE)
    resumed = search(tmp_path, Goal(psnr=0.0), space=SPACE)
    assert measured == [*SPACE[:3], *SPACE[2:]]
    monkeypatch.undo()
    assert resumed == search(tmp_path / "anew", Goal(psnr=0.0), space=SPACE)


def test_budget(tmp_path: Path) -> None:
    assert len(search(tmp_path, Goal(psnr=0.0), space=SPACE, budget=2).candidates) == 2
    assert len(search(tmp_path, Goal(psnr=0.0), space=SPACE, budget=3).candidates) == 3


def test_measurements_of_another_search_are_refused(tmp_path: Path) -> None:
    search(tmp_path, Goal(psnr=0.0), space=SPACE[:1])
    file = tmp_path / "tune.json"
    saved = json.loads(file.read_text())
    saved["settings"]["steps"] = 99
    file.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"tune.json holds measurements of .*99.*Name another file"):
        search(tmp_path, Goal(psnr=0.0), space=SPACE[:1])


def test_a_predictor_scores_the_candidates(tmp_path: Path) -> None:
    """Another predictor chooses other tokens, and gives other images."""
    found = []
    for seed in (0, 1):
        predictor = CachePredictor(build("dit").transformer_blocks[0], 32, LAYERS)
        torch.manual_seed(seed)
        draw_weights(predictor, 0.2)
        result = search(tmp_path / str(seed), Goal(psnr=0.0), predictor=predictor, base=replace(SPACE[2]), budget=1)
        assert result.best.config.scorer == "predictor"
        found.append(result.best.psnr)
    assert found[0] != found[1]
