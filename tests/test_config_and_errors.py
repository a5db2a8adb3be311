"""What is refused, with what reason, and that everything still works after it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
import toy
from tiny import LAST_K, LAYERS, ROWS, TOKENS, Model, build, inputs, run, same_bits, transformed
from torch import Tensor, nn

import tokencache_compile
from tokencache_compile import (
    CacheConfig,
    CachePlan,
    CachePredictor,
    ConfigError,
    InputError,
    Schedule,
    TokenCacheError,
    UnsupportedModelError,
)

Refused = Mapping[str, Any]


@pytest.fixture(scope="module")
def model() -> Model:
    return build("dit")


def gives_the_models_own(dispatcher: Model, model: Model, given: dict[str, Any] | None = None) -> None:
    """A good call begins a request, and is bit for bit the model's."""
    given = given or inputs("dit")
    with torch.no_grad():
        assert torch.equal(dispatcher(**given).sample, model(**given).sample)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [-0.01, 1.01, -1, 2, math.nan, math.inf, "0.9", True, [0.9]])
def test_ratio(model: Model, ratio: Any) -> None:
    with pytest.raises(ConfigError, match="ratio="):
        transformed(model, ratio=ratio)
    gives_the_models_own(transformed(model), model)


@pytest.mark.parametrize(
    "setting",
    [
        {"last_k": -1},
        {"last_k": None},
        {"last_k": 1.0},
        {"last_k": "1"},
        {"last_k": True},
        {"context": "some"},
        {"context": ["kept"]},
        {"context": None},
        {"forecast": 3},
        {"forecast": -1},
        {"forecast": "2"},
        {"forecast": True},
        {"forecast": 1.0},
        {"history": "all"},
        {"scorer": "loudest"},
        {"scorer": 3},
        {"selection": "token"},
        {"schedule": 4},
        {"keep": ()},
        {"keep": (3, 3, 3)},
        {"keep": ((3.0, 3.0, 3.0),)},
        {"keep": ((True, 3, 3),)},
        {"keep": 5},
        {"keep": "abc"},
        {"groups": 3},
        {"groups": "a"},
        {"groups": (0.5,)},
    ],
)
def test_settings(model: Model, setting: Refused) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}="):
        transformed(model, **setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"last_k": LAYERS},
        {"last_k": LAYERS + 1},
        {"keep": ((3, 3),)},
        {"keep": ((3, 3, 3, 3),)},
        {"keep": ((3, 3, TOKENS + 1),)},
        {"keep": ((3, -1, 3),)},
        {"groups": (1,)},
        {"groups": (0, -1)},
        {"keep": ((3, 3, 3), (1, 1, 1)), "groups": (0, 1, 2)},
    ],
)
def test_settings_that_do_not_fit_the_model(model: Model, setting: Refused) -> None:
    """Known at the first call, when the model's blocks and tokens are; ``example_inputs`` brings that forward."""
    dispatcher = transformed(model, **setting)
    name = list(setting)[-1]
    with pytest.raises(ConfigError, match=f"{name}="), torch.no_grad():
        dispatcher(**inputs("dit"))
    with pytest.raises(ConfigError, match=f"{name}="):
        transformed(model, example_inputs=inputs("dit"), **setting)
    dispatcher.disable()
    gives_the_models_own(dispatcher, model)
    gives_the_models_own(transformed(model), model)


def test_pairs_need_two_halves(model: Model) -> None:
    dispatcher = transformed(model, selection="pair")
    with pytest.raises(ConfigError, match='selection="pair"'), torch.no_grad():
        dispatcher(**inputs("dit", rows=3))
    gives_the_models_own(dispatcher, model)


@pytest.mark.parametrize(
    "schedule",
    [
        {"every": 0},
        {"every": -1},
        {"every": 1.5},
        {"every": "2"},
        {"every": True},
        {"full": ()},
        {"full": (1, 2)},
        {"full": (0, 0)},
        {"full": (0, 4, 2)},
        {"full": (0, -1)},
        {"full": (0, 2.5)},
        {"full": ("a",)},
        {"full": 5},
        {"full": "0"},
    ],
)
def test_schedules(schedule: Refused) -> None:
    (name,) = schedule
    with pytest.raises(ConfigError, match=f"{name}="):
        Schedule(**schedule)


@pytest.mark.parametrize(("steps", "full_steps"), [(10, 0), (10, 11), (0, 0), (10, 2.5), ("10", 2)])
def test_uniform_schedules(steps: Any, full_steps: Any) -> None:
    with pytest.raises(ConfigError, match="I-steps of"):
        Schedule.uniform(steps, full_steps)


@pytest.mark.parametrize(("steps", "every"), [(0, 4), (10, 0), (10, -2), (10, 2.5), ("10", 2)])
def test_schedules_with_the_last_step(steps: Any, every: Any) -> None:
    with pytest.raises(ConfigError, match="both are whole numbers"):
        Schedule.with_last(steps, every)


@pytest.mark.parametrize(("steps", "full_steps", "power"), [(10, 1, 1.5), (10, 11, 1.5), (1, 1, 1.5), (10, 2.5, 1.5), (10, 4, 0.5)])
def test_schedules_that_grow_denser(steps: Any, full_steps: Any, power: float) -> None:
    with pytest.raises(ConfigError, match="2 to all steps"):
        Schedule.denser_late(steps, full_steps, power)


@pytest.mark.parametrize(("steps", "full_steps"), [(50, 13), (20, 11), (20, 6), (10, 9), (7, 7), (5, 2)])
def test_schedules_grow_denser_late(steps: int, full_steps: int) -> None:
    """As many I-steps as asked for, the first and the last step among them, and no interval much longer than one before it."""
    full = Schedule.denser_late(steps, full_steps).full
    assert full is not None and len(full) == full_steps and (full[0], full[-1]) == (0, steps - 1)
    gaps = [after - before for before, after in itertools.pairwise(full)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(gaps)) and gaps[-1] == min(gaps)
    assert Schedule.denser_late(20, 11).full == (0, 3, 5, 8, 10, 12, 14, 16, 17, 18, 19)


@pytest.mark.parametrize(("steps", "full_steps"), [(50, 12), (20, 9), (10, 6), (250, 50), (7, 7), (5, 1)])
def test_uniform_schedules_have_as_many_full_steps_as_asked_for(steps: int, full_steps: int) -> None:
    schedule = Schedule.uniform(steps, full_steps)
    full = [step for step in range(steps) if schedule.is_full(step)]
    assert len(full) == full_steps and full[0] == 0
    gaps = {after - before for before, after in zip(full, [*full[1:], steps], strict=True)}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("steps", "full"),
    [
        (1, [0]),
        (4, [0, 2, 3]),
        (20, [*range(0, 20, 2), 19]),
        (35, list(range(0, 35, 2))),
        (36, [*range(0, 36, 3), 35]),
        (50, [*range(0, 50, 4), 49]),
        (100, [*range(0, 100, 4), 99]),
    ],
)
def test_the_default_schedule_is_denser_in_short_runs_and_ends_in_an_i_step(steps: int, full: list[int]) -> None:
    schedule = CacheConfig().schedule_of(steps)
    assert [step for step in range(steps) if schedule.is_full(step)] == full
    assert CacheConfig(schedule=Schedule(3)).schedule_of(steps) == Schedule(3), "a schedule that was asked for stays"
    assert CacheConfig().schedule_of(None) == Schedule(4), "the number of steps is not known"


@pytest.mark.parametrize(
    ("name", "settings", "forecast"),
    [
        ("EulerAncestralDiscreteScheduler", {}, 0),
        ("DDPMScheduler", {}, 0),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, 0),
        ("FlowMatchEulerDiscreteScheduler", {}, 2),
        ("DPMSolverMultistepScheduler", {}, 2),
        ("DDIMScheduler", {}, 2),
    ],
)
def test_samplers_that_add_noise_hold_by_default(model: Model, name: str, settings: dict[str, Any], forecast: int) -> None:
    """Only where nothing was asked for: a forecast by name, a config or an artefact stays what it is."""
    scheduler = getattr(diffusers, name)(**settings)
    defaults = CacheConfig()
    transform = partial(tokencache_compile.transform, model, scheduler=scheduler)
    assert transform(ratio=0.9).cache_config == replace(defaults, ratio=0.9, forecast=forecast)
    assert transform(forecast=1).cache_config.forecast == 1
    assert transform(defaults).cache_config == transform(config=defaults).cache_config == defaults


def test_paper_settings() -> None:
    config = CacheConfig.paper(steps=50)
    assert (config.ratio, config.last_k, config.context, config.forecast, config.history) == (0.9, 4, "kept", 0, "computed")
    assert config.scorer == "predictor" and CacheConfig.paper(steps=250, full_steps=50).last_k == 2
    assert sum(config.schedule_of(50).is_full(step) for step in range(50)) == 12


@pytest.mark.parametrize(("ratio", "kept"), [(0.9, 2), (0.5, 8), (0.97, 0), (0.96, 1), (0.01, 16), (1.0, 0), (1, 0)])
def test_ratio_gives_the_nearest_count(model: Model, ratio: float, kept: int) -> None:
    plan: CachePlan = transformed(model, ratio=ratio, example_inputs=inputs("dit")).plan
    assert plan.profiles == ((kept,) * (LAYERS - LAST_K),)
    assert f"{kept} in 3 blocks" in str(plan)


# --- the call of transform ------------------------------------------------------------------------------------------


def test_unknown_names(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting rate, rations.*ratio"):
        transformed(model, rations=0.9, rate=2)
    with pytest.raises(ConfigError, match="backend='jax'"):
        transformed(model, backend="jax")
    gives_the_models_own(transformed(model), model)


def test_what_cannot_be_transformed(model: Model) -> None:
    for thing in (None, "facebook/DiT-XL-2-256", object(), type(model)):
        with pytest.raises(ConfigError, match=r"torch.nn.Module or a diffusers pipeline"):
            transformed(thing)
    with pytest.raises(ConfigError, match="transformed already"):
        transformed(transformed(model))
    with pytest.raises(ConfigError, match="no argument named timestep"):
        transformed(toy.WithoutTimestep())
    gives_the_models_own(transformed(model), model)


def predictor_of(block: nn.Module, channels: int = 32, num_blocks: int = LAYERS) -> CachePredictor:
    return CachePredictor(block, channels, num_blocks).eval()


def test_predictor_and_scorer_belong_together(model: Model) -> None:
    predictor = predictor_of(model.transformer_blocks[0])
    for scorer in ("change", "norm", "random"):
        with pytest.raises(ConfigError, match="predictor"):
            transformed(model, predictor=predictor, scorer=scorer)
    with pytest.raises(ConfigError, match="no predictor"):
        transformed(model, scorer="predictor")
    with pytest.raises(ConfigError, match="no predictor"):
        transformed(model, config=CacheConfig.paper())
    assert transformed(model, predictor=predictor).cache_config.scorer == "predictor"


@pytest.mark.parametrize("wrong", ["width", "depth", "block_width", "block_kind"])
def test_a_predictor_of_another_model(model: Model, wrong: str) -> None:
    block = model.transformer_blocks[0]
    predictor = {
        "width": lambda: predictor_of(block, channels=48),
        "depth": lambda: predictor_of(block, num_blocks=LAYERS + 1),
        "block_width": lambda: predictor_of(build("dit", heads=3).transformer_blocks[0]),
        "block_kind": lambda: predictor_of(build("pixart").transformer_blocks[0]),
    }[wrong]()
    dispatcher = transformed(model, predictor=predictor)
    with pytest.raises(ConfigError, match="does not fit this model"), torch.no_grad():
        dispatcher(**inputs("dit"))
    gives_the_models_own(transformed(model, predictor=predictor_of(block)), model)


def test_a_fresh_predictor_scores_all_alike(model: Model) -> None:
    """Its head starts at 0: α is 0.5 everywhere, and the block is a copy that training leaves alone."""
    block = model.transformer_blocks[0]
    predictor = predictor_of(block)
    calls: list[Any] = []
    handle = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        model(**inputs("dit"))
        handle.remove()
        args, kwargs = calls[0]
        assert torch.equal(predictor(*args, **kwargs), torch.full((ROWS, LAYERS, TOKENS), 0.5))
    own = {parameter.data_ptr() for parameter in predictor.parameters()}
    assert not own & {parameter.data_ptr() for parameter in model.parameters()}


# --- calls ----------------------------------------------------------------------------------------------------------


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs("dit").items() if key != name}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (without("hidden_states"), "hidden_states"),
        (without("timestep"), "timestep=None"),
        (without("class_labels"), "class_labels"),
        (inputs("dit") | {"labels": 3}, "labels"),
        (inputs("dit") | {"timestep": 500}, r"timestep=500 \(int\)"),
        (inputs("dit") | {"timestep": 500.0}, r"timestep=500.0 \(float\)"),
        (inputs("dit") | {"hidden_states": [[1.0]]}, r"hidden_states=.*\(list\)"),
        (inputs("dit") | {"hidden_states": torch.full((ROWS, 4, 8, 8), math.nan)}, "NaN was found in hidden_states"),
        (inputs("dit") | {"hidden_states": torch.zeros(ROWS, 5, 8, 8)}, "itself refused"),
        (inputs("dit") | {"hidden_states": torch.zeros(ROWS, 4, 8, 8, requires_grad=True)}, "gradient"),
    ],
)
def test_calls(model: Model, call: dict[str, Any], message: str) -> None:
    """Refused at the first call and in the middle of a run; in both cases the next good call is right."""
    dispatcher = transformed(model)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            dispatcher(**call)
        dispatcher.reset()
        gives_the_models_own(dispatcher, model)


def test_positional_arguments(model: Model) -> None:
    given = inputs("dit")
    dispatcher = transformed(model)
    with torch.no_grad():
        expected = model(**given).sample
        assert torch.equal(dispatcher(given["hidden_states"], given["timestep"], class_labels=given["class_labels"]).sample, expected)
        with pytest.raises(InputError, match="positional"):
            dispatcher(*range(20))


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_return_dict(kind: str) -> None:
    """The model's own class or a plain tuple, as asked for, of the same values."""
    model, given = build(kind), inputs(kind)
    dispatcher = transformed(model)
    with torch.no_grad():
        for step, timestep in enumerate((500, 400)):
            given["timestep"] = torch.full((ROWS,), timestep)
            outputs = []
            for options in ({}, {"return_dict": True}, {"return_dict": False}):
                dispatcher.reset()
                dispatcher(**inputs(kind, timestep=600))
                for _ in range(step):
                    dispatcher(**inputs(kind, timestep=550))
                outputs.append((dispatcher(**given, **options), model(**given, **options)))
            for got, own in outputs:
                assert type(got) is type(own)
                assert torch.equal(got[0], outputs[0][0].sample)
            assert isinstance(outputs[2][0], tuple) and len(outputs[2][0]) == 1


def test_training_mode(model: Model) -> None:
    dispatcher = transformed(model)
    gives_the_models_own(dispatcher, model)
    model.train()
    try:
        with pytest.raises(InputError, match="training mode"), torch.no_grad():
            dispatcher(**inputs("dit", timestep=400))
    finally:
        model.eval()
    dispatcher.reset()
    gives_the_models_own(dispatcher, model)
    assert not dispatcher.training
    dispatcher.train()
    assert model.training
    dispatcher.eval()
    assert not model.training


def test_gradients_flow_when_disabled() -> None:
    model = build("dit")
    dispatcher = transformed(model)
    given = inputs("dit")
    given["hidden_states"].requires_grad_()
    dispatcher.disable()
    dispatcher(**given).sample.square().mean().backward()
    assert given["hidden_states"].grad is not None and all(p.grad is not None for p in model.transformer_blocks[0].ff.parameters())


def test_no_gradient_is_recorded(model: Model) -> None:
    """Cached graphs are for inference: with gradients on, their outputs still have none."""
    dispatcher = transformed(model)
    assert not dispatcher(**inputs("dit")).sample.requires_grad
    assert not dispatcher(**inputs("dit", timestep=400)).sample.requires_grad


# --- models ---------------------------------------------------------------------------------------------------------


def toy_run(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [model(**toy.toy_inputs(seed=t, t=t)) for t in (900, 800, 700, 600, 500)]


def test_a_toy_model_is_cached() -> None:
    """So the refusals below are of what the toys do, not of toys."""
    model = toy.ToyModel()
    dispatcher = transformed(model)
    own, got = toy_run(model), toy_run(dispatcher)
    assert [torch.equal(a, b) for a, b in zip(own, got, strict=True)] == [True, False, False, False, True]
    full = transformed(model, keep=((toy.TOKENS,) * 2,))
    for a, b in zip(own, toy_run(full), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_in_place_on_its_own_tensors_is_allowed() -> None:
    """And the update is what the block adds to the stream it was given."""
    model = toy.ToyModel(toy.AddsInPlaceToItsOwn)
    own = toy_run(model)
    for a, b in zip(own, toy_run(transformed(model, keep=((toy.TOKENS,) * 2,))), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    plain = toy.ToyModel()
    plain.load_state_dict(model.state_dict())
    for a, b in zip(toy_run(transformed(plain)), toy_run(transformed(model)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (toy.Positional, "fixes its token count"),
        (toy.Convolved, "fixes its token count"),
        (toy.Cumulative, "depends on positions"),
        (toy.Shifted, "depends on positions"),
        (toy.Branching, "cannot capture the block"),
        (toy.Counting, "in place"),
        (toy.AddsInPlace, "in place"),
        (toy.WritesToAView, "in place"),
        (toy.Noisy, "changes its output"),
        (toy.TwoStreams, "continues none of its streams"),
        (toy.ExplicitAttention, "reach each other"),
        (toy.Pooled, "reach each other"),
    ],
)
def test_blocks_that_cannot_be_cached(block: Callable[[], nn.Module], reason: str) -> None:
    """Refused with the block's name; the model is as it was, and so is the dispatcher when disabled."""
    model = toy.ToyModel(block)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dispatcher = transformed(model)
    with pytest.raises(UnsupportedModelError, match=reason) as caught, torch.no_grad():
        dispatcher(**toy.toy_inputs())
    assert caught.value.where == "blocks.0" and str(caught.value).startswith("blocks.0: ")
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())
    if block is not toy.Counting:  # the one eager run counts, as any run of it does
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if block is not toy.Noisy:
        fresh = toy.ToyModel(block)
        fresh.load_state_dict(model.state_dict())
        dispatcher.disable()
        assert same_bits(toy_run(dispatcher), toy_run(fresh))


@pytest.mark.parametrize("block", [toy.ExplicitAttention, toy.Pooled])
def test_other_ways_of_mixing_tokens_are_fine_among_kept_tokens(block: Callable[[], nn.Module]) -> None:
    model = toy.ToyModel(block)
    own = toy_run(model)
    for a, b in zip(own, toy_run(transformed(model, context="kept", keep=((toy.TOKENS,) * 2,))), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "where", "reason"),
    [
        (toy.CallsTwice, "blocks.0", "called more than once"),
        (toy.WithoutList, "WithoutList", "no repeated block"),
        (toy.ReturnsNumber, "ReturnsNumber", "not tensors"),
    ],
)
def test_models_that_cannot_be_cached(model: Callable[[], nn.Module], where: str, reason: str) -> None:
    original = model()
    dispatcher = transformed(original)
    with pytest.raises(UnsupportedModelError, match=reason) as caught, torch.no_grad():
        dispatcher(**toy.toy_inputs())
    assert caught.value.where == where
    dispatcher.disable()
    with torch.no_grad():
        assert str(dispatcher(**toy.toy_inputs())) == str(original(**toy.toy_inputs()))


def test_keyword_arguments_of_any_name() -> None:
    """What a model takes as ``**more`` reaches it under its own names, constants and tensors alike."""
    model = toy.TakesMore()
    dispatcher = transformed(model)
    with torch.no_grad():
        for more in ({}, {"scale": 2}, {"scale": 3}, {"scale": torch.tensor(2.5)}, {"other": torch.ones(3), "scale": torch.tensor(0.5)}):
            dispatcher.reset()
            assert torch.equal(dispatcher(**toy.toy_inputs(), **more), model(**toy.toy_inputs(), **more))


def test_a_failed_capture_leaves_other_signatures_usable(model: Model) -> None:
    """A refusal for one batch size says nothing about another that is already compiled."""
    dispatcher = transformed(model, selection="pair")
    expected = run(dispatcher, "dit", steps=6)
    with pytest.raises(TokenCacheError), torch.no_grad():
        dispatcher(**inputs("dit", rows=1))
    assert same_bits(run(dispatcher, "dit", steps=6), expected)


def test_attributes_are_the_models_own(model: Model) -> None:
    dispatcher = transformed(model)
    assert dispatcher.config is model.config and dispatcher.dtype == torch.float32 and dispatcher.device.type == "cpu"
    assert dispatcher.transformer_blocks is model.transformer_blocks
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = dispatcher.no_such_thing
    with pytest.raises(ConfigError, match="nothing is captured yet"):
        _ = dispatcher.plan
    assert dispatcher.summary().full_steps == 0


def test_example_inputs_capture_at_once(model: Model) -> None:
    """And use up no step of a run."""
    dispatcher = transformed(model, example_inputs=inputs("dit"))
    assert dispatcher.plan.tokens == TOKENS and dispatcher.summary().full_steps == 0
    programs = dispatcher.steps
    assert same_bits(run(dispatcher, "dit", steps=6), run(transformed(model), "dit", steps=6))
    assert dispatcher.steps is programs
    with pytest.raises(InputError):
        tokencache_compile.transform(model, example_inputs=without("timestep"), backend="eager")
