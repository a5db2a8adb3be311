"""Schedule strategies against hand-worked examples, and the dynamic program against every schedule there is."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tokencache_compile import ConfigError, Schedule
from tokencache_compile.learn.schedules import by_mass, optimal, remap, reverse


def full_of(schedule: Schedule, steps: int) -> tuple[int, ...]:
    return tuple(step for step in range(steps) if schedule.is_full(step))


def alphas(*weights: float) -> list[float]:
    """ᾱ for which Eq. 13 at β = −1 has these weights (up to their scale)."""
    return [0.5 - math.log(weight) for weight in weights]


# --- Eq. 13 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full_steps", "accumulated", "expected"),
    [
        # weights 2 2 3 4 1: cumulative 2 4 7 11 12, levels 6, or 3 6 9
        (2, False, (0, 2)),
        (4, False, (0, 1, 2, 3)),
        # once more: 2 6 13 24 36, levels 18, or 9 18 27
        (2, True, (0, 3)),
        (4, True, (0, 2, 3, 4)),
    ],
)
def test_by_mass_by_hand(full_steps: int, accumulated: bool, expected: tuple[int, ...]) -> None:
    schedule = by_mass(alphas(2, 2, 3, 4, 1), full_steps, -1.0, accumulated=accumulated)
    assert schedule.full == expected == full_of(schedule, 5)


def test_duplicates_split_the_heaviest_interval_at_its_mass_midpoint() -> None:
    # cumulative 10 11 12 14 17; levels 4.25 and 8.5 fall into step 0, 12.75 into step 3. Interval 0-2 (mass 12) has its middle
    # in step 0, so it splits at 1; then 3-4 (mass 5, against 2 of 1-2) has its middle in step 4.
    assert by_mass(alphas(10, 1, 1, 2, 3), 4, -1.0).full == (0, 1, 3, 4)
    # cumulative 20 21 22 26 27 of 27: level 13.5 falls into step 0. The middle of the one interval does too.
    assert by_mass(alphas(20, 1, 1, 4, 1), 2, -1.0).full == (0, 1)
    # cumulative 40 41 42 43 53 54: levels 18, 36 fall into step 0; split 0-5 at 1, then 1-5 (mass 14, middle 47) at 4
    assert by_mass(alphas(40, 1, 1, 1, 10, 1), 3, -1.0).full == (0, 1, 4)


def test_an_even_alpha_gives_an_even_spacing() -> None:
    assert by_mass([0.37] * 20, 5, -4000.0).full == (0, 4, 8, 12, 16)


def test_the_sign_of_beta_chooses_the_side() -> None:
    rising = [k / 10 for k in range(10)]
    early, even, late = (full_of(by_mass(rising, 4, beta), 10) for beta in (-2.0, 0.0, 2.0))
    assert even == (0, 2, 5, 7)
    assert sum(early) < sum(even) < sum(late)


def test_the_papers_betas_do_not_underflow() -> None:
    """exp(−8000 · 0.5) is 0 in double precision; shifted, only differences of ᾱ matter."""
    slope = [1e-4 * k for k in range(10)]
    schedule = by_mass([0.5 + a for a in slope], 4, -8000.0)
    assert schedule.full == by_mass(slope, 4, -8000.0).full
    assert schedule.full != by_mass([0.5] * 10, 4, -8000.0).full


def test_steps_without_mass_are_split_by_length() -> None:
    """Of 17 steps, 16 have weight exp(−1e6) = 0."""
    assert by_mass([0.0] + [1.0] * 16, 4, -1e6).full == (0, 1, 5, 9)


def test_relative_beta_is_in_standard_deviations() -> None:
    alpha = [0.1, 0.3, 0.1, 0.3, 0.3, 0.1]  # standard deviation 0.1
    assert by_mass(alpha, 3, -0.7, relative=True) == by_mass(alpha, 3, -7.0)
    assert by_mass(alpha, 3, -0.7, relative=True) != by_mass(alpha, 3, -0.7)


@pytest.mark.parametrize("accumulated", [False, True])
def test_every_count_of_i_steps_is_met(accumulated: bool) -> None:
    draw = random.Random(0)
    for steps in (1, 2, 7, 20):
        alpha = [draw.random() for _ in range(steps)]
        for full_steps in range(1, steps + 1):
            for beta in (-100.0, -3.0, 0.0, 3.0, 100.0):
                schedule = by_mass(alpha, full_steps, beta, accumulated=accumulated)
                assert len(full_of(schedule, steps)) == full_steps


# --- carried over ---------------------------------------------------------------------------------------------------


def test_reverse_by_hand() -> None:
    # intervals 1 1 4 2 become 2 4 1 1
    schedule = reverse(Schedule(every=9, full=(0, 1, 2, 6)), 8)
    assert schedule.full == (0, 2, 6, 7) == full_of(schedule, 8)
    assert reverse(schedule, 8).full == (0, 1, 2, 6)
    assert full_of(reverse(Schedule(every=4), 10), 10) == (0, 2, 6)
    assert full_of(reverse(Schedule(every=9), 5), 5) == (0,)


@pytest.mark.parametrize(
    ("new_steps", "expected"),
    [
        (8, (0, 2, 6)),
        (16, (0, 2, 4, 8, 12, 14)),  # 6 I-steps: every second is half-way between old ones
        (4, (0, 2)),  # round(1.5) = 2 I-steps: the second half-way between old I-steps 2 and 6
        (1, (0,)),
    ],
)
def test_remap_by_hand(new_steps: int, expected: tuple[int, ...]) -> None:
    schedule = remap(Schedule(every=9, full=(0, 2, 6)), 8, new_steps)
    assert schedule.full == expected == full_of(schedule, new_steps)


def test_remap_of_an_even_spacing_is_even() -> None:
    assert remap(Schedule.uniform(50, 10), 50, 250).full == tuple(range(0, 250, 5))
    assert remap(Schedule.uniform(250, 50), 250, 50).full == tuple(range(0, 50, 5))


def test_remap_has_proportionally_many_i_steps() -> None:
    draw = random.Random(1)
    for _ in range(300):
        steps, new_steps = draw.randint(1, 40), draw.randint(1, 40)
        full = (0, *sorted(draw.sample(range(1, steps), draw.randint(0, steps - 1))))
        found = full_of(remap(Schedule(every=99, full=full), steps, new_steps), new_steps)
        assert len(found) == max(1, round(len(full) * new_steps / steps)) and found[0] == 0


# --- the dynamic program --------------------------------------------------------------------------------------------


def total(costs: Tensor, full: tuple[int, ...], steps: int) -> float:
    """The sum of a schedule's errors, read off the definition of ``costs``."""
    found = 0.0
    for step in range(steps):
        newest = max(i for i in full if i <= step)
        earlier = [i for i in full if i < newest]
        if step > newest:
            gap = newest - earlier[-1] if earlier else 0
            found += float(costs[newest, gap, step - newest])
    return found


def every_schedule(steps: int, full_steps: int, gaps: int) -> list[tuple[int, ...]]:
    found = [(0, *rest) for rest in itertools.combinations(range(1, steps), full_steps - 1)]
    return [full for full in found if all(b - a <= gaps for a, b in itertools.pairwise([*full, steps]))]


def random_costs(steps: int, gaps: int, seed: int) -> Tensor:
    """Random where a run of ``steps`` has such a step, infinite elsewhere; what stands at distance 0 must not count."""
    costs = torch.full((steps, gaps + 1, gaps), torch.inf, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    for i in range(steps):
        for gap in range(min(gaps, i) + 1):
            reach = min(gaps, steps - i)
            costs[i, gap, :reach] = torch.rand(reach, generator=draw, dtype=torch.float64)
    return costs


@pytest.mark.parametrize(("steps", "gaps"), [(1, 1), (2, 5), (6, 6), (7, 3), (9, 4), (10, 2)])
def test_optimal_is_the_best_of_all_schedules(steps: int, gaps: int) -> None:
    for seed in range(3):
        costs = random_costs(steps, gaps, seed)
        for full_steps in range(1, steps + 1):
            all_of_them = every_schedule(steps, full_steps, gaps)
            if not all_of_them:
                with pytest.raises(ConfigError, match="I-steps"):
                    optimal(costs, steps, full_steps)
                continue
            found = optimal(costs, steps, full_steps)
            best = min(all_of_them, key=lambda full: total(costs, full, steps))
            assert found.full == best == full_of(found, steps)


def test_optimal_leaves_the_costs_as_they_are() -> None:
    costs = random_costs(6, 3, 0)
    before = costs.clone()
    optimal(costs, 6, 3)
    assert torch.equal(costs, before)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_steps", [0, 4, True, 2.0])
def test_counts_of_i_steps(full_steps: Any) -> None:
    with pytest.raises(ConfigError, match="I-steps"):
        by_mass([0.1, 0.2, 0.3], full_steps, -1.0)
    with pytest.raises(ConfigError, match="I-steps"):
        optimal(random_costs(3, 3, 0), 3, full_steps)


@pytest.mark.parametrize(
    ("alpha", "beta"), [([0.1, math.nan], -1.0), ([0.1, math.inf], -1.0), ([0.1, 0.2], math.nan), ([0.1, 0.2], -math.inf)]
)
def test_by_mass_of_what_is_not_finite(alpha: list[float], beta: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        by_mass(alpha, 1, beta)


def test_relative_beta_of_an_alpha_that_does_not_vary() -> None:
    with pytest.raises(ConfigError, match="relative"):
        by_mass([0.5, 0.5], 1, -1.0, relative=True)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_runs_without_steps(steps: Any) -> None:
    with pytest.raises(ConfigError, match="I-steps"):
        reverse(Schedule(), steps)
    with pytest.raises(ConfigError, match="I-steps"):
        remap(Schedule(), steps, 5)
    with pytest.raises(ConfigError, match="I-steps"):
        remap(Schedule(), 5, steps)


@pytest.mark.parametrize("shape", [(3, 3, 3), (4, 4, 3), (3, 3), (3, 1, 0)])
def test_costs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="costs of shape"):
        optimal(torch.zeros(shape), 3, 1)


def test_costs_with_nan() -> None:
    costs = random_costs(3, 3, 0)
    costs[1, 0, 1] = torch.nan
    with pytest.raises(ConfigError, match="without NaN"):
        optimal(costs, 3, 1)
