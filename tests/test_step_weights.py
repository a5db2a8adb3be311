"""Step weights: a forecast listed step by step, in every engine and granularity, when it holds and when not; and its fit to whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import build, call_of, conditions, ddim, run, same_bits, sample, sampler, transformed
from torch import Tensor, nn

import tokencache_compile as tc
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.errors import ConfigError, InputError
from tokencache_compile.fingerprint import fingerprint
from tokencache_compile.learn.step_weights import fit_step_weights, polynomial
from tokencache_compile.metrics import psnr
from tokencache_compile.sampling import Conditions
from tokencache_compile.sampling import sample as draw

STEPS = 9
PLAIN = tc.CacheConfig(ratio=1.0, schedule=tc.Schedule(3))
KINDS = {
    "nothing recomputed": PLAIN,
    "a tenth recomputed": replace(PLAIN, ratio=0.9),
    "modules": replace(PLAIN, granularity="module", forecast=1),
}


def weighted(config: tc.CacheConfig, table: Tensor) -> tc.CacheConfig:
    return replace(config, step_weights=tuple(map(tuple, table.tolist())))


def assert_close(first: list[Tensor], second: list[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_polynomials_own_weights_give_its_run(name: str) -> None:
    config = KINDS[name]
    own = run(transformed(build("dit"), config=weighted(config, polynomial(config, 1, STEPS))), "dit", STEPS)
    assert_close(own, run(transformed(build("dit"), config=replace(config, forecast=1)), "dit", STEPS))


class Skip(nn.Module):
    """In the place of all blocks of a DiT: adds ``update``. The model's last layer asks it for its first block's norm."""

    def __init__(self, norm1: nn.Module, update: Tensor) -> None:
        super().__init__()
        self.norm1, self.update = norm1, update

    def forward(self, stream: Tensor, **_: Any) -> Tensor:
        return stream + self.update


def test_a_p_step_adds_the_weighted_updates_of_the_last_i_steps() -> None:
    """At step 5 by hand: what all blocks added at I-steps 3 and 0, weighted; before them there is none."""
    table = polynomial(PLAIN, 0, STEPS)
    table[5] = torch.tensor([0.7, 0.6, 5.0])
    net, given = build("dit"), conditions("dit")
    fast = transformed(net, config=weighted(PLAIN, table))
    entered: list[Tensor] = []
    updates: list[Tensor] = []
    handles = [
        net.transformer_blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0])),
        net.transformer_blocks[-1].register_forward_hook(lambda _, args, output: updates.append(output - entered[-1])),
    ]
    noises = [sample(seed=step) for step in range(6)]
    timesteps = [torch.full((len(noises[0]),), 900 - 100 * step) for step in range(6)]
    for step in (0, 3):
        call_of(net, given)(step, noises[step], timesteps[step])
    for handle in handles:
        handle.remove()
    outputs = [call_of(fast, given)(step, noises[step], timesteps[step]) for step in range(6)]
    net.transformer_blocks = nn.ModuleList([Skip(net.transformer_blocks[0].norm1, 0.7 * updates[1] + 0.6 * updates[0])])
    assert_close(outputs[5:], [call_of(net, given)(5, noises[5], timesteps[5])])


def test_a_branch_that_begins_late_is_extrapolated_by_step_numbers() -> None:
    """Its I-steps are not those that the weights are for: with and without them it is the same."""
    wild = torch.full((STEPS, 3), 3.0)
    given, x, timesteps = conditions("dit"), sample(), sampler(STEPS).timesteps

    def late(config: tc.CacheConfig) -> list[Tensor]:
        fast, found = transformed(build("dit"), config=config), []
        for step, t in enumerate(timesteps):
            call_of(fast, given)(step, x, t.expand(len(x)))
            if step >= 4:
                with fast.cache_context("late"):
                    found.append(call_of(fast, given)(step, x / (step + 1), t.expand(len(x))))
        return found

    assert same_bits(late(weighted(PLAIN, wild)), late(PLAIN))


def test_onnxruntime_runs_them() -> None:
    table = polynomial(PLAIN, 1, STEPS) + torch.linspace(0, 0.1, STEPS)[:, None]
    config = weighted(replace(PLAIN, ratio=0.5), table)
    eager = run(transformed(build("dit"), config=config), "dit", STEPS)
    exported = run(transformed(build("dit"), config=config, backend="onnxruntime"), "dit", STEPS)
    for one, other in zip(exported, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_an_artefact_keeps_them(tmp_path: Path) -> None:
    net, config = build("dit"), weighted(PLAIN, polynomial(PLAIN, 2, STEPS))
    CacheArtefact(config=config, base=fingerprint(net), steps=STEPS).save_pretrained(tmp_path / "plan")
    fast = tc.transform(net, tmp_path / "plan", backend="eager")
    assert fast.cache_config == config
    run(fast, "dit", STEPS)
    assert "fitted for 9 steps" in str(fast.plan)


def test_runs_of_other_lengths_are_refused() -> None:
    config = weighted(PLAIN, polynomial(PLAIN, 2, STEPS))
    with pytest.raises(InputError, match=r"step 10 was asked for, and this plan's step_weights are fitted for runs of 9 steps"):
        run(transformed(build("dit"), config=config), "dit", STEPS + 1)
    scheduler = sampler(STEPS + 1)
    fast = transformed(build("dit"), config=config, scheduler=scheduler)
    scheduler.set_timesteps(STEPS + 1)
    with pytest.raises(InputError, match=r"a run of 10 steps was asked for.*fitted for runs of 9 steps"):
        ddim(call_of(fast, conditions("dit")), sample(), STEPS + 1, scheduler)
    scheduler.set_timesteps(STEPS)
    ddim(call_of(fast, conditions("dit")), sample(), STEPS, scheduler)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(forecast=0), "need forecast=1 or 2"),
        (dict(history="computed", context="kept"), 'history="full_steps"'),
        (dict(forecast=1), r"of \[3\] values a step were given; forecast=1 needs 2 finite"),
        (dict(step_weights=((1.0, float("nan"), 0.0),)), "finite"),
    ],
)
def test_weights_that_do_not_fit_the_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(weighted(PLAIN, polynomial(PLAIN, 2, STEPS)), **settings)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, clip_sample=False, prediction_type="v_prediction")


def pairs(count: int, seed: int) -> tuple[Tensor, Conditions]:
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return noise, Conditions.of_labels(torch.arange(count) % 10, 10, 2.0)


def test_a_fit_comes_closer_on_noises_that_it_did_not_see() -> None:
    net = build("dit", std=0.05)
    before = [parameter.clone() for parameter in net.parameters()]
    noise, given = pairs(8, 0)
    runs: list[int] = []
    found = fit_step_weights(net, scheduler(), noise, given, STEPS, PLAIN, iterations=1, on_run=lambda: runs.append(1))
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), before, strict=True))
    assert found.fitted_db > found.polynomial_db + 0.4
    assert len(found.config.step_weights) == STEPS and found.config.schedule == tc.Schedule(3, (0, 3, 6))
    assert {found.config.step_weights[step] for step in (0, 3, 6)} == {(1.0, 0.0, 0.0)}

    weights = 1 * 2 + 2 * 2 + 3 * 2  # two P-steps after each of three I-steps
    assert len(runs) == 2 + 3 + weights + 6  # uncached and the first, three orders, and an iteration with its dampings
    noise, given = pairs(4, 1)
    uncached = draw(net, scheduler(), noise, STEPS, given)

    def closeness(config: tc.CacheConfig) -> float:
        solver = scheduler()
        return psnr(draw(tc.transform(net, config, backend="eager", scheduler=solver), solver, noise, STEPS, given), uncached)

    assert closeness(found.config) > max(closeness(replace(PLAIN, forecast=order)) for order in range(3)) + 0.2


@pytest.mark.parametrize("overflowing", [3, 6])
def test_steps_that_end_in_nan_are_left_aside(overflowing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of an iteration's six dampings overflow, or all of them do: the dispatcher refuses NaN, and the fit goes on without."""
    before, count = 2 + 3 + 2, 0  # runs: uncached and the first, three orders, two weights

    def overflows(*given: Any) -> Tensor:
        nonlocal count
        count += 1
        if before < count <= before + overflowing:
            raise InputError("NaN was found")
        return draw(*given)

    monkeypatch.setattr("tokencache_compile.learn.step_weights.sample", overflows)
    noise, given = pairs(4, 0)
    found = fit_step_weights(build("dit", std=0.05), scheduler(), noise, given, 3, PLAIN, iterations=1)
    assert count == before + 6 and found.fitted_db >= found.polynomial_db
    assert overflowing == 3 or found.fitted_db == found.polynomial_db


def test_what_cannot_be_fitted_is_refused() -> None:
    noise, given = pairs(3, 0)
    with pytest.raises(ConfigError, match="3 noises and 6 P-steps were given"):
        fit_step_weights(build("dit"), scheduler(), noise, given, STEPS, PLAIN)
    noise, given = pairs(4, 0)
    with pytest.raises(ConfigError, match="4 noises and 0 P-steps were given"):
        fit_step_weights(build("dit"), scheduler(), noise, given, STEPS, replace(PLAIN, schedule=tc.Schedule(1)))
    with pytest.raises(ConfigError, match="need forecast=1 or 2"):
        fit_step_weights(build("dit"), scheduler(), noise, given, STEPS, replace(PLAIN, forecast=0))
