"""Calibration against plain loops over the eager model; keep counts by hand; files and refusals."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import LAYERS, TOKENS, Model, build, conditions, sample, transformed
from torch import Tensor, nn

from tokencache_compile import CacheConfig, CachePredictor, ConfigError, InputError, Schedule
from tokencache_compile.learn import calibration as calibration_module
from tokencache_compile.learn.calibration import Calibration, calibrate, to_config
from tokencache_compile.learn.interval_errors import interval_errors
from tokencache_compile.learn.keep_counts import group_profiles, keep_counts, marked_share
from tokencache_compile.learn.schedules import optimal
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.sampling import Conditions
from tokencache_compile.sampling import sample as sample_images

STEPS, CHANNELS = 6, 32


def trained(model: Model, kind: str = "dit") -> CachePredictor:
    """A predictor with a random head, so that its scores differ by block, token and step."""
    predictor = CachePredictor(model.transformer_blocks[0], CHANNELS, LAYERS)
    torch.manual_seed(5)
    for parameter in predictor.head.parameters():
        nn.init.normal_(parameter, std=0.05 if kind == "dit" else 0.02)
    return predictor


def ddim_scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, clip_sample=False, prediction_type="v_prediction")


def guided(labels: list[int], guidance: float = 2.5) -> Conditions:
    return Conditions.of_labels(torch.tensor(labels), 1000, guidance)


@pytest.fixture(scope="module")
def model() -> Model:
    return build("dit")


@pytest.fixture(scope="module")
def stack(model: Model) -> BlockStack:
    """For two images with guidance."""
    labels = torch.tensor([1, 2, 1000, 1000])
    return BlockStack(model, {"hidden_states": sample(4), "timestep": torch.full((4,), 500), "class_labels": labels})


# --- Eq. 12 ---------------------------------------------------------------------------------------------------------


def test_marked_share_by_hand() -> None:
    alpha = torch.tensor([[[0.9, 0.1, 0.2], [0.8, 0.3, 0.1]], [[0.7, 0.95, 0.4], [0.2, 0.1, 0.6]]])  # [2 samples, 2 blocks, 3 tokens]
    # of 12, the 6 largest: .95 .9 .7 .4 of block 0, .8 .6 of block 1
    assert marked_share(alpha, 0.5).tolist() == pytest.approx([4 / 6, 2 / 6])
    assert marked_share(alpha, 0.75).tolist() == pytest.approx([2 / 6, 1 / 6])
    assert marked_share(alpha, 1.0).tolist() == [0.0, 0.0]
    assert marked_share(alpha, 0.0).tolist() == [1.0, 1.0]


def test_marking_is_over_the_whole_batch_and_not_a_sample() -> None:
    """Every mark falls into the second sample, all of them into its block 1."""
    alpha = torch.zeros(2, 2, 4)
    alpha[1, 1] = 1.0
    assert marked_share(alpha, 0.75).tolist() == [0.0, 0.5]


def test_equal_scores_give_equal_shares() -> None:
    assert marked_share(torch.full((3, 4, 10), 0.5), 0.9).tolist() == pytest.approx([0.1] * 4)


@pytest.mark.parametrize("multiple", [1, 4])
def test_counts_of_marked_shares_meet_the_budget(multiple: int) -> None:
    for seed, ratio in itertools.product(range(5), (0.0, 0.3, 0.55, 0.9, 1.0)):
        draw = torch.Generator().manual_seed(seed)
        alpha = torch.rand(3, 5, 18, generator=draw) * torch.rand(1, 5, 1, generator=draw)
        counts = keep_counts(marked_share(alpha, ratio), 18, ratio, multiple)
        budget = round(round((1 - ratio) * 5 * 18) / multiple) * multiple
        assert sum(counts) == min(budget, 5 * (18 // multiple) * multiple)
        assert all(count % multiple == 0 and 0 <= count <= 18 for count in counts)
        ideal = marked_share(alpha, ratio) * 18
        assert all(abs(count - min(want, 18 // multiple * multiple)) < multiple for count, want in zip(counts, ideal.tolist(), strict=True))


def test_keep_counts_by_hand() -> None:
    # quotas 4.5 2.3 0.8 0.4 of 16 tokens a block, 8 in all: floors 4 2 0 0, then .8 and .5
    share = torch.tensor([4.5, 2.3, 0.8, 0.4]) / 16
    assert keep_counts(share, 16, 0.875) == (5, 2, 1, 0)
    # in fours 1.125 .575 .2 .1, two in all: floor 1, then .575
    assert keep_counts(share, 16, 0.875, multiple=4) == (4, 4, 0, 0)
    # a budget of 6 in fours is round(1.5) = 2 fours; three blocks of 5 tokens have room for one four each
    assert keep_counts(torch.tensor([1.0, 0.2, 0.0]), 5, 0.6, multiple=4) == (4, 4, 0)
    assert keep_counts(torch.tensor([1.0, 1.0, 1.0]), 5, 0.0, multiple=4) == (4, 4, 4)
    assert keep_counts(torch.tensor([0.0, 0.0]), 16, 1.0) == (0, 0)


def best_partition(rows: Tensor, groups: int) -> list[int]:
    """Bounds of the contiguous partition nearest to its means, by trying all of them."""

    def spread(bounds: list[int]) -> float:
        parts = [rows[a:b] for a, b in itertools.pairwise(bounds)]
        return sum(float((part - part.mean(0)).square().sum()) for part in parts)

    inner = itertools.combinations(range(1, len(rows)), groups - 1)
    return min(([0, *chosen, len(rows)] for chosen in inner), key=spread)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_groups_are_the_best_contiguous_partition(groups: int) -> None:
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        shares = 0.6 * torch.randn(11, 3, generator=draw, dtype=torch.float64).softmax(1)  # (1 − 0.8) · 3 blocks in all
        p_steps = [1, 2, 3, 5, 6, 7, 9, 10]
        profiles, group_of_step = group_profiles(shares, p_steps, 50, 0.8, groups)
        bounds = best_partition(shares[p_steps], groups)
        for a, b in itertools.pairwise(bounds):
            mean = shares[p_steps[a:b]].mean(0)
            for step in p_steps[a:b]:
                assert profiles[group_of_step[step]] == keep_counts(mean, 50, 0.8)
        assert len(group_of_step) == 11 and len(profiles) <= groups


def test_an_i_step_has_the_group_of_the_next_p_step() -> None:
    low, high = [0.2, 0.6], [0.6, 0.2]
    shares = torch.tensor([high, low, low, low, high, high, low, low])
    profiles, group_of_step = group_profiles(shares, [1, 2, 5], 10, 0.6, 2)
    assert profiles == ((2, 6), (6, 2))
    assert group_of_step == (0, 0, 0, 1, 1, 1, 1, 1)


def test_groups_with_equal_counts_share_a_profile() -> None:
    shares = torch.tensor([[0.4, 0.4], [0.41, 0.39], [0.7, 0.1], [0.4, 0.4]])
    profiles, group_of_step = group_profiles(shares, [0, 1, 2, 3], 10, 0.6, 4)
    assert profiles == ((4, 4), (7, 1))
    assert group_of_step == (0, 0, 1, 0)


@pytest.mark.parametrize("shape", [(4, 5), (0, 2, 3), (2, 3, 4, 5)])
def test_scores_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="scores of shape"):
        marked_share(torch.zeros(shape), 0.9)


def test_scores_with_nan() -> None:
    with pytest.raises(ConfigError, match="NaN"):
        marked_share(torch.full((1, 2, 3), torch.nan), 0.9)


@pytest.mark.parametrize("share", [[[0.1, 0.1]], [], [0.3, -0.1], [1.1, -0.9], [math.nan, 0.1]])
def test_what_is_no_share(share: Any) -> None:
    with pytest.raises(ConfigError, match="share="):
        keep_counts(torch.tensor(share), 100, 0.9)


@pytest.mark.parametrize("share", [[0.2, 0.2], [0.05, 0.05], [0.11, 0.111]])
def test_shares_of_another_ratio(share: list[float]) -> None:
    with pytest.raises(ConfigError, match="calibrated"):
        keep_counts(torch.tensor(share), 100, 0.9)


@pytest.mark.parametrize(("tokens", "multiple"), [(16, 0), (16, 17), (16, 2.0), (16, True), (0, 1), (16.0, 1)])
def test_multiples(tokens: Any, multiple: Any) -> None:
    with pytest.raises(ConfigError, match="multiple="):
        keep_counts(torch.tensor([0.1]), tokens, 0.9, multiple)


def test_ratios_of_keep_counts() -> None:
    for refused in (lambda: marked_share(torch.zeros(1, 1, 1), 1.5), lambda: keep_counts(torch.tensor([0.1]), 10, -0.1)):
        with pytest.raises(ConfigError, match="ratio="):
            refused()


@pytest.mark.parametrize("p_steps", [[], [2, 1], [1, 1], [-1, 0], [0, 3], [1.0]])
def test_p_steps_that_are_not_there(p_steps: Any) -> None:
    with pytest.raises(ConfigError, match="p_steps="):
        group_profiles(torch.full((3, 2), 0.1), p_steps, 10, 0.9, 1)


@pytest.mark.parametrize("groups", [0, -1, 1.0, True])
def test_groups(groups: Any) -> None:
    with pytest.raises(ConfigError, match="groups="):
        group_profiles(torch.full((3, 2), 0.1), [1, 2], 10, 0.9, groups)


def test_shares_without_steps() -> None:
    with pytest.raises(ConfigError, match="shares of shape"):
        group_profiles(torch.full((2,), 0.1), [1], 10, 0.9, 1)


# --- calibration ----------------------------------------------------------------------------------------------------


def plain_run(model: Model, predictor: CachePredictor, noise: Tensor, given: Conditions) -> tuple[Tensor, Tensor]:
    """α [T, rows, L, N] and the images of one run of the eager model: a hook hands block 0's arguments to the predictor."""
    scores: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scores.append(predictor(*args, **kwargs))

    handle = model.transformer_blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    images = sample_images(model, ddim_scheduler(), noise, STEPS, given)
    handle.remove()
    return torch.stack(scores).detach(), images


def text(rows: int, seed: int) -> Conditions:
    return Conditions(conditions("pixart", rows, seed))


@pytest.mark.parametrize(
    ("kind", "batches"),
    [
        ("dit", [(sample(2, seed=3), guided([4, 5])), (sample(2, seed=4), guided([600, 7])), (sample(1, seed=5), guided([8]))]),
        ("dit", [(sample(3, seed=3), Conditions({"class_labels": torch.tensor([1, 2, 3])}))]),
        ("pixart", [(sample(2, seed=3), text(2, 7)), (sample(2, seed=4), text(2, 8))]),
    ],
)
def test_calibration_is_what_a_plain_loop_finds(kind: str, batches: list[tuple[Tensor, Conditions]]) -> None:
    model = build(kind)
    predictor = trained(model, kind)
    seen: list[int] = []
    found = calibrate(model, predictor, ddim_scheduler(), iter(batches), STEPS, 0.75, 1, 3, seen.append)

    runs = [plain_run(model, predictor, noise, given) for noise, given in batches]
    rows = torch.cat([alpha for alpha, _ in runs], 1)
    sizes = [len(noise) for noise, _ in batches]
    assert float(rows.mean((1, 3)).std()) > 1e-3  # else the comparison would prove little
    torch.testing.assert_close(found.alpha, rows.double().mean((1, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.mean_alpha, rows[:, :, : LAYERS - 1].double().mean((1, 2, 3)), atol=1e-5, rtol=0)
    for step in range(STEPS):
        shares = [size * marked_share(alpha[step][:, : LAYERS - 1], 0.75) for size, (alpha, _) in zip(sizes, runs, strict=True)]
        # one token that changes sides in the rounding of two scores is 1 / (rows · N)
        torch.testing.assert_close(found.share[step], sum(shares) / sum(sizes), atol=1.01 / (len(rows[0]) * TOKENS), rtol=0)
    conditional = torch.cat([alpha[:, :size] for size, (alpha, _) in zip(sizes, runs, strict=True)], 1)
    torch.testing.assert_close(found.examples, conditional.transpose(0, 1)[:3].half(), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.images, torch.cat([images for _, images in runs])[:3], atol=1e-3, rtol=1e-3)
    assert (found.steps, found.samples, found.ratio, found.last_k) == (STEPS, sum(sizes), 0.75, 1)
    assert seen == list(range(len(batches) * STEPS))


def test_calibration_keeps_the_blocks_of_the_default_last_k(model: Model) -> None:
    found = calibrate(model, trained(model), ddim_scheduler(), [(sample(1), guided([1]))], 2, examples=0)
    assert found.last_k == transformed_last_k(model) == 0
    assert found.share.shape == (2, LAYERS) and found.examples.shape == (0, 2, LAYERS, TOKENS) and found.images.shape == (0, 4, 8, 8)


def transformed_last_k(model: Model) -> int:
    dispatcher = transformed(model, config=CacheConfig())
    dispatcher.prepare({"hidden_states": sample(1), "timestep": torch.tensor([1]), "class_labels": torch.tensor([1])})
    last_k: int = dispatcher.plan.last_k
    return last_k


def test_a_transformed_model_runs_what_was_calibrated(model: Model) -> None:
    predictor = trained(model)
    found = calibrate(model, predictor, ddim_scheduler(), [(sample(2), guided([1, 2]))], STEPS, 0.75, 1)
    schedule = Schedule(9, (0, 3))
    config = to_config(found, CacheConfig(ratio=0.75, last_k=1), schedule, TOKENS, groups=2)
    assert config.keep is not None and all(sum(profile) == round(0.25 * 3 * TOKENS) for profile in config.keep)
    assert (config.keep, config.groups) == group_profiles(found.share, [1, 2, 4, 5], TOKENS, 0.75, 2)
    assert (config.keep, config.groups) == found.keep(TOKENS, 2, p_steps=[1, 2, 4, 5])
    assert found.keep(TOKENS, 3, 4) == group_profiles(found.share, range(STEPS), TOKENS, 0.75, 3, 4)
    dispatcher = transformed(model, config=config, predictor=predictor)
    kept: list[tuple[int, ...]] = []
    dispatcher.step_callback = lambda report: kept.append(report.kept)
    sample_images(dispatcher, ddim_scheduler(), sample(2), STEPS, guided([1, 2]))
    expected = [() if schedule.is_full(step) else config.keep[config.groups[step]] for step in range(STEPS)]
    assert kept == expected


def test_calibration_without_batches(model: Model) -> None:
    with pytest.raises(ConfigError, match="without batches"):
        calibrate(model, trained(model), ddim_scheduler(), [], STEPS)


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"steps": 0}, "steps="), ({"steps": 2.0}, "steps="), ({"examples": -1}, "examples="), ({"ratio": 1.5}, "ratio="),
     ({"last_k": -1}, "last_k="), ({"last_k": LAYERS}, "last_k=")],
)  # fmt: skip
def test_settings_of_calibrate(model: Model, setting: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        calibrate(model, trained(model), ddim_scheduler(), [(sample(1), guided([1]))], **{"steps": 2} | setting)


def test_a_predictor_of_another_depth(model: Model) -> None:
    predictor = CachePredictor(model.transformer_blocks[0], CHANNELS, LAYERS + 1)
    with pytest.raises(ConfigError, match="does not fit"):
        calibrate(model, predictor, ddim_scheduler(), [(sample(1), guided([1]))], 2)


def test_a_model_in_training_mode(model: Model, stack: BlockStack) -> None:
    model.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            calibrate(model, trained(model), ddim_scheduler(), [(sample(2), guided([1, 2]))], 2)
        with pytest.raises(InputError, match="training mode"):
            interval_errors(stack, ddim_scheduler(), sample(2), guided([1, 2]), 2, 1, 1, 2)
    finally:
        model.eval()


def test_noise_and_conditions_of_different_rows(model: Model, stack: BlockStack) -> None:
    with pytest.raises(InputError, match="noise of 3 images"):
        calibrate(model, trained(model), ddim_scheduler(), [(sample(3), guided([1, 2]))], 2)
    with pytest.raises(InputError, match="noise of 3 images"):
        interval_errors(stack, ddim_scheduler(), sample(3), guided([1, 2]), 2, 1, 1, 2)


# --- interval errors ------------------------------------------------------------------------------------------------

PARTS = {  # (i, g, d): the steps an order-2 forecast is made from and their weights, by hand (Lagrange)
    (0, 0, 1): {0: 1.0},
    (3, 0, 2): {3: 1.0},
    (1, 1, 1): {1: 2.0, 0: -1.0},  # only two I-steps so far: a line
    (2, 1, 1): {2: 3.0, 1: -3.0, 0: 1.0},
    (4, 2, 1): {4: 1.875, 2: -1.25, 0: 0.375},  # half a gap on: (3/2 · 5/2)/2, −(1/2 · 5/2), (1/2 · 3/2)/2
    (4, 2, 3): {4: 2.5, 2: -1.5},  # one and a half gaps on: the parabola's weights exceed 7 in sum, the line's do not
    (3, 1, 4): {3: 1.0},  # four gaps on: the line's weights do too
    (3, 2, 1): {3: 1.5, 1: -0.5},  # 2 g back there is no step
}


def eager_pass(model: Model, kwargs: dict[str, Any], cached: int, forecast: Callable[[], Tensor] | None) -> tuple[Tensor, Tensor]:
    """The model's output and its cached blocks' summed update; with ``forecast`` that update instead of those blocks."""
    ends: dict[str, Tensor] = {}

    def first(_: nn.Module, args: tuple[Any, ...]) -> None:
        ends["in"] = args[0]

    def last(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        ends["out"] = output if forecast is None else ends["in"] + forecast()
        return None if forecast is None else ends["out"]

    handles = [
        model.transformer_blocks[0].register_forward_pre_hook(first),
        model.transformer_blocks[cached - 1].register_forward_hook(last),
    ]
    with torch.no_grad():
        output: Tensor = model(**kwargs, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return output, ends["out"] - ends["in"]


def plain_error(
    model: Model, scheduler: Any, noise: Tensor, given: Conditions, steps: int, last_k: int, target: int, parts: dict[int, float]
) -> float:
    """The error of one P-step: two whole runs from the start with the same seed, one of which forecasts step ``target``."""

    def run(forecasting: bool) -> Tensor:
        torch.manual_seed(0)
        own = copy.deepcopy(scheduler)
        own.set_timesteps(steps)
        images: Tensor = noise * own.init_noise_sigma
        updates: dict[int, Tensor] = {}

        def weighted() -> Tensor:
            return torch.stack([weight * updates[node] for node, weight in parts.items()]).sum(0)

        for step, timestep in enumerate(own.timesteps[: target + 1]):
            forecast = weighted if forecasting and step == target else None
            rows = torch.cat([images, images]) if given.null else images
            kwargs = {"hidden_states": rows, "timestep": timestep.expand(len(rows)), **given.rows}
            output, updates[step] = eager_pass(model, kwargs, LAYERS - last_k, forecast)
            output = output[:, :4]
            if given.null:
                output = output[len(noise) :] + given.guidance * (output[: len(noise)] - output[len(noise) :])
            images = own.step(output, timestep, images).prev_sample
        return images

    return float((run(True).double() - run(False).double()).square().mean())


@pytest.mark.parametrize("last_k", [0, 1])
def test_interval_errors_with_guidance(model: Model, stack: BlockStack, last_k: int) -> None:
    given, noise = guided([1, 2]), sample(2)
    seen: list[int] = []
    found = interval_errors(stack, ddim_scheduler(), noise, given, 8, last_k, 2, 5, seen.append)
    assert seen == list(range(8))
    for (i, g, d), parts in PARTS.items():
        expected = plain_error(model, ddim_scheduler(), noise, given, 8, last_k, i + d, parts)
        assert expected > 1e-6
        assert float(found[i, g, d]) == pytest.approx(expected, rel=1e-3), (i, g, d)


@pytest.mark.parametrize("kind", ["stateful", "stochastic"])
def test_trying_does_not_disturb_the_run(model: Model, kind: str) -> None:
    """A multistep solver keeps earlier outputs, an ancestral one draws noise at every step."""
    common: dict[str, Any] = {"num_train_timesteps": 1000, "prediction_type": "v_prediction"}
    scheduler = DPMSolverMultistepScheduler(**common) if kind == "stateful" else DDPMScheduler(**common, clip_sample=False)
    given, noise = Conditions({"class_labels": torch.tensor([3, 4])}), sample(2)
    stack = BlockStack(model, {"hidden_states": noise, "timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([3, 4])})
    torch.manual_seed(0)
    found = interval_errors(stack, copy.deepcopy(scheduler), noise, given, 6, 1, 1, 3)
    for (i, g, d), parts in {(0, 0, 1): {0: 1.0}, (2, 1, 2): {2: 3.0, 1: -2.0}, (4, 2, 1): {4: 1.5, 2: -0.5}, (3, 0, 2): {3: 1.0}}.items():
        expected = plain_error(model, scheduler, noise, given, 6, 1, i + d, parts)
        assert expected > 1e-6
        assert float(found[i, g, d]) == pytest.approx(expected, rel=1e-3), (i, g, d)


def test_interval_errors_are_finite_where_a_run_has_such_a_step(stack: BlockStack) -> None:
    steps, gaps = 5, 3
    found = interval_errors(stack, ddim_scheduler(), sample(2), guided([1, 2]), steps, 1, 1, gaps)
    assert found.shape == (steps, gaps + 1, gaps)
    for i, g, d in itertools.product(range(steps), range(gaps + 1), range(gaps)):
        value = float(found[i, g, d])
        assert math.isfinite(value) == (i + d < steps and g <= i)
        assert (value == 0.0) == (math.isfinite(value) and d == 0)
    assert len(optimal(found, steps, 2).full or ()) == 2


def test_errors_do_not_depend_on_the_largest_gap(stack: BlockStack) -> None:
    """A small one lets go of early updates during the run."""
    settings = (stack, ddim_scheduler(), sample(2), guided([1, 2]), 9, 1, 2)
    assert torch.equal(interval_errors(*settings, 2), interval_errors(*settings, 5)[:, :3, :2])


def test_equal_forecasts_are_tried_once(model: Model, stack: BlockStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held updates are the newest ones whatever the gap: one pass for each (step, newest I-step), and one a step for the run."""
    runs: list[int] = []
    original = stack.run

    def counted(*args: Any) -> Tensor:
        runs.append(1)
        return original(*args)

    monkeypatch.setattr(stack, "run", counted)
    found = interval_errors(stack, ddim_scheduler(), sample(2), guided([1, 2]), 5, 1, 0, 4)
    assert len(runs) == 5 + (1 + 2 + 3 + 3)
    assert float(found[2, 0, 1]) == float(found[2, 1, 1]) == float(found[2, 2, 1]) > 0


@pytest.mark.parametrize(
    ("setting", "named"),
    [({"steps": 0}, "steps="), ({"steps": True}, "steps="), ({"max_gap": 0}, "max_gap="), ({"max_gap": 1.5}, "max_gap="),
     ({"last_k": LAYERS}, "last_k="), ({"last_k": -1}, "last_k="), ({"forecast": 3}, "forecast=")],
)  # fmt: skip
def test_settings_of_interval_errors(stack: BlockStack, setting: dict[str, Any], named: str) -> None:
    settings = {"steps": 2, "last_k": 1, "forecast": 1, "max_gap": 2} | setting
    with pytest.raises(ConfigError, match=named):
        interval_errors(stack, ddim_scheduler(), sample(2), guided([1, 2]), **settings)


def test_a_batch_of_another_size_than_the_stack(stack: BlockStack) -> None:
    with pytest.raises(InputError, match="captured with"):
        interval_errors(stack, ddim_scheduler(), sample(1), guided([1]), 2, 1, 1, 2)


# --- the file -------------------------------------------------------------------------------------------------------


def made(**changes: Any) -> Calibration:
    draw = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {
        "steps": 3, "samples": 5, "ratio": 0.9, "last_k": 1,
        "alpha": torch.rand(3, 4, generator=draw, dtype=torch.float64),
        "share": torch.rand(3, 3, generator=draw, dtype=torch.float64) / 10,
        "examples": torch.rand(2, 3, 4, 7, generator=draw).half(),
        "images": torch.rand(2, 4, 8, 8, generator=draw),
    }  # fmt: skip
    return Calibration(**settings | changes)


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    saved = made(alpha=torch.rand(4, 3, dtype=torch.float64).T)  # not contiguous
    saved.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert (loaded.steps, loaded.samples, loaded.ratio, loaded.last_k) == (3, 5, 0.9, 1)
    for name in ("alpha", "share", "examples", "images"):
        before, after = getattr(saved, name), getattr(loaded, name)
        assert torch.equal(before, after) and before.dtype == after.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_save_that_fails_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    made().save(path)

    def half(tensors: dict[str, Tensor], side: Path, metadata: dict[str, str]) -> None:
        Path(side).write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(calibration_module, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        made(samples=6).save(path)
    assert Calibration.load(path).samples == 5
    assert [found.name for found in tmp_path.iterdir()] == ["c.safetensors"]


def changed_file(path: Path, header: Callable[[dict[str, Any]], Any], drop: str = "") -> None:
    made().save(path)
    with safe_open(path, framework="pt") as file:
        before = json.loads(file.metadata()["calibration"])
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors, path, metadata={"calibration": json.dumps(header(before))})


@pytest.mark.parametrize("header", [lambda h: h | {"format": 2}, lambda h: h | {"format": "1"}, lambda h: {}, lambda h: [1]])
def test_another_format_version(tmp_path: Path, header: Any) -> None:
    changed_file(tmp_path / "c", header)
    with pytest.raises(ConfigError, match="format"):
        Calibration.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["alpha", "share", "examples", "images"])
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    changed_file(tmp_path / "c", lambda h: h, drop=name)
    with pytest.raises(ConfigError, match=f"lacks {name}"):
        Calibration.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["steps", "samples", "ratio", "last_k"])
def test_a_missing_number(tmp_path: Path, name: str) -> None:
    changed_file(tmp_path / "c", lambda h: {key: value for key, value in h.items() if key != name})
    with pytest.raises(ConfigError, match=f"lacks {name}"):
        Calibration.load(tmp_path / "c")


def test_numbers_that_do_not_fit_the_tensors_of_a_file(tmp_path: Path) -> None:
    changed_file(tmp_path / "c", lambda h: h | {"steps": 4})
    with pytest.raises(ConfigError, match="T = 4"):
        Calibration.load(tmp_path / "c")


def test_files_that_are_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Calibration.load(tmp_path / "none")
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(ConfigError, match="not a readable"):
        Calibration.load(tmp_path / "text")
    save_file({"alpha": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ConfigError, match="format None"):
        Calibration.load(tmp_path / "other")
    save_file({"alpha": torch.zeros(1)}, tmp_path / "broken", metadata={"calibration": "{"})
    with pytest.raises(ConfigError, match="not a readable"):
        Calibration.load(tmp_path / "broken")


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": torch.zeros(2, 4)},
        {"alpha": torch.zeros(3)},
        {"alpha": torch.zeros(3, 1), "share": torch.zeros(3, 0), "examples": torch.zeros(2, 3, 1, 7)},
        {"share": torch.zeros(3, 4)},
        {"examples": torch.zeros(2, 3, 7)},
        {"examples": torch.zeros(2, 3, 5, 7)},
        {"images": torch.zeros(3, 4, 8, 8)},
        {"images": torch.zeros(2)},
    ],
)
def test_shapes_of_a_calibration(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="are needed"):
        made(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"steps": 0}, "steps="), ({"samples": 0}, "samples="), ({"samples": 2.0}, "samples="), ({"last_k": None}, "last_k="),
     ({"ratio": 2}, "ratio="), ({"alpha": torch.full((3, 4), torch.nan)}, "NaN"), ({"share": torch.full((3, 3), torch.inf)}, "infinity")],
)  # fmt: skip
def test_values_of_a_calibration(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        made(**changes)


@pytest.mark.parametrize("base", [CacheConfig(ratio=0.8, last_k=1), CacheConfig(last_k=2)])
def test_settings_that_were_not_calibrated(base: CacheConfig) -> None:
    with pytest.raises(ConfigError, match="calibrate again"):
        to_config(replace(made(), share=torch.full((3, 3), 0.1)), base, Schedule(), 16)


def test_a_schedule_without_p_steps() -> None:
    with pytest.raises(ConfigError, match="run in full"):
        to_config(made(), CacheConfig(last_k=1), Schedule(every=1), 16)
