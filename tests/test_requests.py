"""Runs, guidance branches, aborts, threads: after whatever happened, a run gives bit for bit what a fresh model gives."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from tiny import ROWS, Call, Model, build, call_of, conditions, ddim, inputs, same_bits, sample, sampler, transformed
from torch import Tensor, nn

from tokencache_compile import InputError, Schedule, StepReport

STEPS = 10
# the settings under which a P-step writes most: what it leaves behind is what could go wrong
SETTINGS: dict[str, Any] = {"ratio": 0.75, "context": "cached", "history": "computed", "schedule": Schedule(4)}
Before = Callable[[Model], object]


class Stop(Exception):
    """Raised by a test in the middle of a run."""


def fresh(model: Model, **changes: Any) -> Model:
    return transformed(model, **SETTINGS | changes)


@pytest.fixture(scope="module")
def model() -> Model:
    return build("dit")


@pytest.fixture(scope="module")
def expected(model: Model) -> list[Tensor]:
    """The run that every other one here is compared with."""
    return ten_steps(fresh(model))


@pytest.fixture(scope="module")
def watched_expected(model: Model, expected: list[Tensor]) -> list[Tensor]:
    """The same run where the scheduler is known, and the conditioning of all its P-steps so made at once: it rounds otherwise."""
    dispatcher, scheduler = watched(model)
    scheduler.set_timesteps(STEPS)
    run = ten_steps(dispatcher, scheduler=scheduler)
    for got, wanted in zip(run, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    return run


def ten_steps(dispatcher: Model, seed: int = 2, scheduler: Any = None, start: int = 0, stop_at: int | None = None) -> list[Tensor]:
    """A DDIM run, from scheduler step ``start``, aborted by :class:`Stop` where the caller stands after ``stop_at`` calls."""
    call = call_of(dispatcher, conditions("dit"))

    def stopping(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        if step == stop_at:
            raise Stop
        return call(step, x, timesteps)

    return ddim(stopping, sample(seed=seed), STEPS, scheduler, start)


def kinds(dispatcher: Model) -> list[StepReport]:
    """The reports of the calls from now on."""
    reports: list[StepReport] = []
    dispatcher.step_callback = reports.append
    return reports


def test_the_run_caches(model: Model, expected: list[Tensor]) -> None:
    """Else all that follows would hold for the model itself."""
    assert not same_bits(ddim(call_of(model, conditions("dit")), sample(), STEPS), expected)


# --- aborted runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop_at", "seed"), [(1, 9), (2, 2), (2, 9), (5, 2), (5, 9), (9, 2)])
def test_a_run_after_an_aborted_one(model: Model, expected: list[Tensor], stop_at: int, seed: int) -> None:
    """The caller stopped between two calls, where the dispatcher sees nothing of it."""
    dispatcher = fresh(model)
    with pytest.raises(Stop):
        ten_steps(dispatcher, seed=seed, stop_at=stop_at)
    assert same_bits(ten_steps(dispatcher), expected)


def test_a_run_after_one_aborted_at_its_first_step_on_the_same_noise(
    model: Model, expected: list[Tensor], watched_expected: list[Tensor]
) -> None:
    """From the calls alone that looks like guidance; ``reset`` or a watched scheduler tells them apart."""
    dispatcher = fresh(model)
    with pytest.raises(Stop):
        ten_steps(dispatcher, stop_at=1)
    dispatcher.reset()
    assert same_bits(ten_steps(dispatcher), expected)
    scheduler = sampler(STEPS)
    watching = fresh(model, scheduler=scheduler)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(Stop):
        ten_steps(watching, scheduler=scheduler, stop_at=1)
    scheduler.set_timesteps(STEPS)
    assert same_bits(ten_steps(watching, scheduler=scheduler), watched_expected)


def raise_in_callback(dispatcher: Model, patch: pytest.MonkeyPatch) -> None:
    def callback(report: StepReport) -> None:
        if report.step == 6:
            raise Stop

    dispatcher.step_callback = callback


def raise_in_cached_engine(dispatcher: Model, patch: pytest.MonkeyPatch) -> None:
    """The engine fails at its third P-step, after a first part of the run has filled the caches."""
    dispatcher.prepare(inputs("dit"))
    (compiled,) = dispatcher._compiled.values()
    (engine,) = compiled.cached
    original, calls = engine.run, []

    def failing(*args: Tensor) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return original(*args)

    patch.setattr(engine, "run", failing)


@pytest.mark.parametrize("breaking", [raise_in_callback, raise_in_cached_engine])
def test_an_exception_inside_a_step(
    model: Model, expected: list[Tensor], breaking: Callable[[Model, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = fresh(model)
    breaking(dispatcher, monkeypatch)
    with pytest.raises(Stop):
        ten_steps(dispatcher)
    monkeypatch.undo()
    reports = kinds(dispatcher)
    assert same_bits(ten_steps(dispatcher), expected)
    assert [r.step for r in reports] == list(range(STEPS))


def test_going_on_after_an_exception_begins_anew(model: Model) -> None:
    """The caches of a failed step are not trusted: the next call is an I-step, whatever its timestep."""
    dispatcher = fresh(model)

    def interrupt(report: StepReport) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    dispatcher.step_callback = interrupt
    with pytest.raises(KeyboardInterrupt):
        ten_steps(dispatcher)
    reports = kinds(dispatcher)
    given = inputs("dit", timestep=600)
    with torch.no_grad():
        assert torch.equal(dispatcher(**given).sample, model(**given).sample)
    assert [(r.kind, r.step) for r in reports] == [("I", 0)]


@pytest.mark.parametrize("where", ["hidden_states", "encoder_hidden_states"])
def test_nan_is_refused_and_the_run_goes_on(where: str) -> None:
    """A NaN never reaches the caches: with the call repeated on good inputs, the run is what it would have been."""
    model, given = build("pixart"), conditions("pixart")
    expected = ddim(call_of(fresh(model), given), sample(), STEPS)
    dispatcher = fresh(model)
    call = call_of(dispatcher, given)

    def with_nan(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        if step in (0, 3, 5):
            bad = {"hidden_states": x, "timestep": timesteps, **given}
            bad[where] = bad[where].clone()
            bad[where].view(-1)[7] = float("nan")
            with pytest.raises(InputError, match=where), torch.no_grad():
                dispatcher(**bad)
        return call(step, x, timesteps)

    assert same_bits(ddim(with_nan, sample(), STEPS), expected)


# --- one run after another ------------------------------------------------------------------------------------------


def other_noise(dispatcher: Model) -> None:
    ten_steps(dispatcher, seed=7)


def other_labels(dispatcher: Model) -> None:
    ddim(call_of(dispatcher, conditions("dit", seed=4)), sample(), STEPS)


def other_batch(dispatcher: Model) -> None:
    ddim(call_of(dispatcher, conditions("dit", rows=1)), sample(rows=1), STEPS)


def other_resolution(dispatcher: Model) -> None:
    ddim(call_of(dispatcher, conditions("dit")), sample(size=12), STEPS)


def other_resolution_aborted(dispatcher: Model) -> None:
    ddim(call_of(dispatcher, conditions("dit")), sample(size=12), STEPS, start=STEPS - 1)


def more_steps(dispatcher: Model) -> None:
    ddim(call_of(dispatcher, conditions("dit")), sample(), 25)


@pytest.mark.parametrize("before", [other_noise, other_labels, other_batch, other_resolution, other_resolution_aborted, more_steps])
def test_a_run_after_another_one(model: Model, expected: list[Tensor], before: Before) -> None:
    dispatcher = fresh(model)
    assert same_bits(ten_steps(dispatcher), expected)
    before(dispatcher)
    assert same_bits(ten_steps(dispatcher), expected)
    assert dispatcher.summary().full_steps == 3 and dispatcher.summary().cached_steps == 7


@pytest.mark.parametrize(("rows", "size"), [(2, 8), (4, 12)])
def test_another_shape_begins_a_request(model: Model, rows: int, size: int) -> None:
    """Even where the timesteps go on falling: the caches are of the other shape."""
    dispatcher = fresh(model)
    with pytest.raises(Stop):
        ten_steps(dispatcher, stop_at=3)
    given = inputs("dit", rows=rows, timestep=600) | {"hidden_states": sample(rows, size=size)}
    reports = kinds(dispatcher)
    with torch.no_grad():
        assert torch.equal(dispatcher(**given).sample, model(**given).sample)
    assert [(r.kind, r.step) for r in reports] == [("I", 0)]


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (4, 12), (3, 4)])
def test_other_batches_and_resolutions_are_right_themselves(model: Model, rows: int, size: int) -> None:
    """Captured second, on a dispatcher that knows another signature, and with as many tokens as the sample has patches."""
    given, noise = conditions("dit", rows=rows), sample(rows, size=size)
    expected = ddim(call_of(fresh(model), given), noise, STEPS)
    dispatcher = fresh(model)
    ten_steps(dispatcher)
    assert same_bits(ddim(call_of(dispatcher, given), noise, STEPS), expected)
    assert dispatcher.plan.tokens == (size // 2) ** 2


# --- schedulers -----------------------------------------------------------------------------------------------------


def watched(model: Model) -> tuple[Model, DDIMScheduler]:
    scheduler = sampler(STEPS)
    return fresh(model, scheduler=scheduler), scheduler


@pytest.mark.parametrize("stop_at", [None, 1, 4])
def test_image_to_image(model: Model, stop_at: int | None) -> None:
    """A run from the middle of the schedule, alone and after an aborted one, has the steps of that part of the schedule."""
    dispatcher, scheduler = watched(model)
    scheduler.set_timesteps(STEPS)
    expected = ten_steps(dispatcher, scheduler=scheduler, start=3)
    dispatcher, scheduler = watched(model)
    scheduler.set_timesteps(STEPS)
    if stop_at is not None:
        with pytest.raises(Stop):
            ten_steps(dispatcher, seed=5, scheduler=scheduler, stop_at=stop_at)
    scheduler.set_timesteps(STEPS)
    reports = kinds(dispatcher)
    assert same_bits(ten_steps(dispatcher, scheduler=scheduler, start=3), expected)
    assert [(r.kind, r.step) for r in reports] == [("I", 3), ("I", 4), *(("P", n) for n in (5, 6, 7)), ("I", 8), ("P", 9)]


def test_image_to_image_below_an_aborted_run(model: Model) -> None:
    """Its first timestep is below the last one of the aborted run: only the scheduler can tell that a run begins there."""
    dispatcher, scheduler = watched(model)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(Stop):
        ten_steps(dispatcher, scheduler=scheduler, stop_at=2)
    scheduler.set_timesteps(STEPS)
    reports = kinds(dispatcher)
    ten_steps(dispatcher, scheduler=scheduler, start=6)
    assert [(r.kind, r.step) for r in reports] == [("I", 6), ("P", 7), ("I", 8), ("P", 9)]


def test_a_run_with_another_scheduler(model: Model, expected: list[Tensor]) -> None:
    """A watched scheduler that is not in use says nothing about the run, though timesteps of the two coincide."""
    dispatcher, scheduler = watched(model)
    scheduler.set_timesteps(4)
    ten_steps(dispatcher, scheduler=scheduler)
    reports = kinds(dispatcher)
    other = sampler(STEPS)
    assert set(other.timesteps.tolist()) & set(scheduler.timesteps.tolist()) - {int(other.timesteps[0])}
    assert same_bits(ten_steps(dispatcher, scheduler=other), expected)
    assert [r.step for r in reports] == list(range(STEPS))


def test_a_run_with_another_scheduler_after_an_aborted_one(model: Model, expected: list[Tensor]) -> None:
    dispatcher, scheduler = watched(model)
    scheduler.set_timesteps(4)
    ten_steps(dispatcher, scheduler=scheduler)
    with pytest.raises(Stop):
        ten_steps(dispatcher, seed=3, scheduler=sampler(STEPS), stop_at=1)
    assert same_bits(ten_steps(dispatcher, scheduler=sampler(STEPS)), expected)


@pytest.mark.parametrize("times_set", [1, 2])
def test_two_runs_of_one_scheduler(model: Model, watched_expected: list[Tensor], times_set: int) -> None:
    """Whether ``set_timesteps`` is called for each run, or once for both."""
    dispatcher, scheduler = watched(model)
    for run in range(2):
        if run < times_set:
            scheduler.set_timesteps(STEPS)
        assert same_bits(ten_steps(dispatcher, scheduler=scheduler), watched_expected)


def test_watching_leaves_the_scheduler_alone(model: Model, watched_expected: list[Tensor]) -> None:
    """Its class, settings and timesteps stay; a copy is watched too."""
    plain = sampler(STEPS)
    dispatcher, scheduler = watched(model)
    assert type(scheduler) is DDIMScheduler and scheduler.config == plain.config
    for one in (scheduler, copy.deepcopy(scheduler), copy.copy(scheduler)):
        one.set_timesteps(STEPS)
        assert torch.equal(one.timesteps, plain.timesteps)
        with pytest.raises(Stop):
            ten_steps(dispatcher, scheduler=one, stop_at=1)
        one.set_timesteps(STEPS)  # without a watch, the same noise again would be a second branch
        assert same_bits(ten_steps(dispatcher, scheduler=one), watched_expected)


def test_a_second_order_scheduler(model: Model) -> None:
    """Heun evaluates twice at a timestep, on different samples: each evaluation is a step, and the second run the same."""
    scheduler = HeunDiscreteScheduler(num_train_timesteps=1000, prediction_type="v_prediction")
    dispatcher, given = fresh(model, scheduler=scheduler), conditions("dit")
    runs, reports = [], kinds(dispatcher)
    for _ in range(2):
        scheduler.set_timesteps(6)
        call, x, outputs = call_of(dispatcher, given), sample() * scheduler.init_noise_sigma, []
        for step, t in enumerate(scheduler.timesteps):
            outputs.append(call(step, scheduler.scale_model_input(x, t), t.expand(ROWS)))
            x = scheduler.step(outputs[-1][:, :4], t, x).prev_sample
        runs.append(outputs)
    assert len(runs[0]) == 11 and same_bits(*runs)
    assert [(r.kind, r.step, r.branch) for r in reports] == 2 * [("P" if n % 4 else "I", n, "branch 0") for n in range(11)]


@pytest.mark.parametrize("stop_at", [None, 1, 4])
def test_a_time_that_rises(model: Model, stop_at: int | None) -> None:
    """Z-Image's runs from 0 to 1: of a watched scheduler, the run goes on all the same, also after an aborted one."""
    dispatcher, scheduler = watched(model)
    call, reports = call_of(dispatcher, conditions("dit")), kinds(dispatcher)

    def rising(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        return call(step, x, 999 - timesteps)

    if stop_at is not None:
        scheduler.set_timesteps(STEPS)
        with pytest.raises(Stop):
            ddim(lambda n, x, t: rising(n, x, t) if n < stop_at else _stop(), sample(seed=5), STEPS, scheduler)
    runs = []
    for _ in range(2):
        reports.clear()
        scheduler.set_timesteps(STEPS)
        runs.append(ddim(rising, sample(), STEPS, scheduler))
        assert [(r.kind, r.step) for r in reports] == [("P" if step % 4 else "I", step) for step in range(STEPS)]
    assert same_bits(*runs)


# --- guidance -------------------------------------------------------------------------------------------------------


def guided(cond: Call, uncond: Call) -> Call:
    """Classifier-free guidance by two calls a step."""

    def call(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        plain = uncond(step, x, timesteps)
        return plain + 1.5 * (cond(step, x, timesteps) - plain)

    return call


def inside(dispatcher: Model, name: str, call: Call) -> Call:
    """The call in a named branch, with more told of the step, as some pipelines do."""

    def named_call(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
        with dispatcher.cache_context(name, step_index=step, sigma=0.5):
            return call(step, x, timesteps)

    return named_call


def branches_of(dispatcher: Model, named: bool) -> tuple[Call, Call]:
    """The guided and the unguided call of one dispatcher."""
    cond, uncond = call_of(dispatcher, conditions("dit")), call_of(dispatcher, conditions("dit", seed=6))
    return (inside(dispatcher, "cond", cond), inside(dispatcher, "uncond", uncond)) if named else (cond, uncond)


@pytest.mark.parametrize("watch", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_sequential_guidance(model: Model, named: bool, watch: bool) -> None:
    """Two branches of one dispatcher are as two dispatchers, each with its own caches."""
    scheduler = sampler(STEPS)
    cond, uncond, dispatcher = (fresh(model, scheduler=scheduler if watch else None) for _ in range(3))
    scheduler.set_timesteps(STEPS)
    alone = guided(call_of(cond, conditions("dit")), call_of(uncond, conditions("dit", seed=6)))
    expected = ddim(alone, sample(), STEPS, scheduler)
    reports = kinds(dispatcher)
    call = guided(*branches_of(dispatcher, named))
    scheduler.set_timesteps(STEPS)
    with pytest.raises(Stop):
        ddim(lambda n, x, t: call(n, x, t) if n < 4 else _stop(), sample(seed=5), STEPS, scheduler)
    reports.clear()
    scheduler.set_timesteps(STEPS)
    assert same_bits(ddim(call, sample(), STEPS, scheduler), expected)
    names = ["uncond", "cond"] if named else ["branch 0", "branch 1"]
    assert [(r.step, r.branch) for r in reports] == [(step, name) for step in range(STEPS) for name in names]
    assert dispatcher.summary().full_steps == 6 and dispatcher.summary().cached_steps == 14


@pytest.mark.parametrize("named", [True, False])
def test_guidance_by_texts_of_different_lengths(named: bool) -> None:
    """Each branch has its own graphs and caches, and is as a dispatcher of its own; a length that changes begins a run."""
    model, given = build("pixart"), conditions("pixart")
    longer = {"encoder_hidden_states": torch.cat([given["encoder_hidden_states"], torch.randn(ROWS, 2, 20)], 1)}
    cond, uncond = fresh(model), fresh(model)
    expected = ddim(guided(call_of(cond, given), call_of(uncond, longer)), sample(), STEPS)
    dispatcher = fresh(model)
    reports = kinds(dispatcher)

    def branch(name: str, texts: dict[str, Any]) -> Call:
        return inside(dispatcher, name, call_of(dispatcher, texts)) if named else call_of(dispatcher, texts)

    assert same_bits(ddim(guided(branch("cond", given), branch("uncond", longer)), sample(), STEPS), expected)
    assert [(r.kind, r.step) for r in reports] == [("P" if step % 4 else "I", step) for step in range(STEPS) for _ in range(2)]
    parts, whole = (cond.summary(), uncond.summary()), dispatcher.summary()
    assert whole.macs_uncached == sum(part.macs_uncached for part in parts) > whole.macs == sum(part.macs for part in parts)
    assert whole.cache_bytes == sum(part.cache_bytes for part in parts)
    reports.clear()
    with pytest.raises(Stop):
        ddim(lambda n, x, t: branch("cond", given)(n, x, t) if n < 2 else _stop(), sample(), STEPS)
    ddim(branch("cond", longer), sample(seed=5), STEPS, start=STEPS - 2)
    assert [(r.kind, r.step) for r in reports] == [("I", 0), ("P", 1)] * 2


def _stop() -> Tensor:
    raise Stop


@pytest.mark.parametrize("stop_at", [1, 3])
def test_sequential_guidance_after_an_aborted_run_on_the_same_noise(model: Model, stop_at: int) -> None:
    """Named branches tell a run that begins again from the next branch, at the first step too, without a scheduler."""
    dispatcher = fresh(model)
    call = guided(*branches_of(dispatcher, named=True))
    expected = ddim(guided(*branches_of(fresh(model), named=True)), sample(), STEPS)
    with pytest.raises(Stop):
        ddim(lambda n, x, t: call(n, x, t) if n < stop_at else _stop(), sample(), STEPS)
    reports = kinds(dispatcher)
    assert same_bits(ddim(call, sample(), STEPS), expected)
    assert [(r.kind, r.step) for r in reports[:4]] == [("I", 0), ("I", 0), ("P", 1), ("P", 1)]


@pytest.mark.parametrize("named", [True, False])
def test_guidance_in_a_part_of_the_run_only(model: Model, named: bool) -> None:
    """A branch that joins late, or pauses, does not disturb the other; on joining, it begins with an I-step."""
    dispatcher = fresh(model)
    reports = kinds(dispatcher)
    uncond, cond = reversed(branches_of(dispatcher, named))
    both = guided(cond, uncond)
    ddim(lambda n, x, t: both(n, x, t) if n in (2, 3, 5, 6) else uncond(n, x, t), sample(), STEPS)
    names = ["uncond", "cond"] if named else ["branch 0", "branch 1"]
    assert [(r.kind, r.step) for r in reports if r.branch == names[0]] == [("P" if n % 4 else "I", n) for n in range(STEPS)]
    assert [(r.kind, r.step) for r in reports if r.branch == names[1]] == [("I", 2), ("P", 3), ("P", 5), ("P", 6)]


def test_contexts_nest_and_are_left_on_an_exception(model: Model) -> None:
    dispatcher = fresh(model)
    reports = kinds(dispatcher)
    with torch.no_grad(), pytest.raises(Stop), dispatcher.cache_context("outer"):
        with dispatcher.cache_context("inner"):
            dispatcher(**inputs("dit"))
        dispatcher(**inputs("dit"))
        raise Stop
    with torch.no_grad():
        dispatcher(**inputs("dit"))
    assert [r.branch for r in reports] == ["inner", "outer", "branch 2"]


@pytest.mark.parametrize("selection", ["sample", "pair", "batch"])
def test_batched_guidance(model: Model, selection: str) -> None:
    """Both halves in one call. After a run of the single halves, what a fresh model gives; a pair keeps the same tokens."""
    twice = {"class_labels": torch.cat([conditions("dit")["class_labels"], conditions("dit", seed=6)["class_labels"]])}

    def run(dispatcher: Model) -> list[Tensor]:
        call = call_of(dispatcher, twice)

        def guided_call(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
            cond, uncond = call(step, torch.cat([x, x]), torch.cat([timesteps, timesteps])).chunk(2)
            return uncond + 1.5 * (cond - uncond)

        return ddim(guided_call, sample(), STEPS)

    expected = run(fresh(model, selection=selection))
    dispatcher = fresh(model, selection=selection)
    ten_steps(dispatcher)
    assert same_bits(run(dispatcher), expected)
    stamps = next(c for c, s in zip(_caches(dispatcher), dispatcher.steps.full.caches, strict=True) if s.name == "stamps_00")
    first, second = stamps[..., 0].chunk(2)
    assert torch.equal(first, second) == (selection != "sample")
    assert bool((stamps[..., 0] == stamps[:1, :, 0]).all()) == (selection == "batch")


def _caches(dispatcher: Model) -> list[Tensor]:
    """The caches of the only branch of this thread's request."""
    (branch,) = dispatcher._tracker.current.branches.values()
    found: list[Tensor] = branch.caches
    return found


# --- threads --------------------------------------------------------------------------------------------------------


def in_threads(jobs: Sequence[Callable[[], list[Tensor]]]) -> list[list[Tensor]]:
    """The results of all jobs, each run in a thread of its own; the first error is raised here."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            results[number] = jobs[number]()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("watch", [True, False])
def test_threads_share_a_dispatcher(model: Model, watch: bool) -> None:
    """Their steps alternate strictly, on other noises, labels, batch sizes and step counts: nothing of one reaches the other.

    The graphs are captured inside the threads, at the same time.
    """
    plans = [(2, 1, ROWS), (8, 5, ROWS), (9, 5, 2)]  # seed of the noise, of the labels, rows
    scheduler, expected = sampler(STEPS), []
    for seed, labels, rows in plans:
        alone = fresh(model, scheduler=scheduler if watch else None)
        scheduler.set_timesteps(STEPS)
        expected.append(ddim(call_of(alone, conditions("dit", rows, labels)), sample(rows, seed), STEPS, scheduler))
    dispatcher = fresh(model, scheduler=scheduler if watch else None)
    barrier = threading.Barrier(len(plans), timeout=60)

    def job(seed: int, labels: int, rows: int) -> list[Tensor]:
        own = copy.deepcopy(scheduler)
        own.set_timesteps(STEPS)
        call = call_of(dispatcher, conditions("dit", rows, labels))

        def in_turn(step: int, x: Tensor, timesteps: Tensor) -> Tensor:
            barrier.wait()
            return call(step, x, timesteps)

        return ddim(in_turn, sample(rows, seed), STEPS, own)

    for got, wanted in zip(in_threads([lambda p=p: job(*p) for p in plans]), expected, strict=True):  # type: ignore[misc]
        assert same_bits(got, wanted)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_thread_runs_while_another_captures(model: Model, expected: list[Tensor], enabled: bool) -> None:
    """``torch.export`` patches ``nn.Module.__call__`` for every thread, and capturing stubs the blocks: no step may see that."""
    dispatcher = fresh(model)
    if not enabled:
        dispatcher.disable()
        expected = ten_steps(model)
    stop = threading.Event()

    def runs() -> list[Tensor]:
        all_same: list[bool] = []
        while not stop.is_set() or not all_same:
            all_same.append(same_bits(ten_steps(dispatcher), expected))
        return [torch.tensor(all_same)]

    def captures() -> list[Tensor]:
        try:
            for _ in range(3):
                fresh(model, example_inputs=inputs("dit"))
        finally:
            stop.set()
        return []

    ((all_same,), _) = in_threads([runs, captures])
    assert len(all_same) and bool(all_same.all())


# --- the model changes ----------------------------------------------------------------------------------------------


def scale_in_place(model: Model) -> None:
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight.mul_(1.5)


def load_in_place(model: Model) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def load_by_assignment(model: Model) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)


def replace_parameter(model: Model) -> None:
    layer = model.transformer_blocks[1].ff.net[2]
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


def replace_buffer(model: Model) -> None:
    model.pos_embed.register_buffer("pos_embed", model.pos_embed.pos_embed * 1.5)


@pytest.mark.parametrize("change", [scale_in_place, load_in_place, load_by_assignment, replace_parameter, replace_buffer])
def test_the_weights_change_between_runs(change: Before) -> None:
    """The next run has the new weights, whether they were written to or replaced."""
    model = build("dit")
    dispatcher = fresh(model)
    before = ten_steps(dispatcher)
    change(model)
    expected = ten_steps(fresh(model))
    assert not same_bits(before, expected)
    assert same_bits(ten_steps(dispatcher), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_changes_between_runs_and_back(dtype: torch.dtype) -> None:
    model = build("dit")
    dispatcher = fresh(model)
    for now in (torch.float32, dtype, torch.float32):
        model.to(now)
        expected = ddim(call_of(fresh(model), conditions("dit")), sample(dtype=now), STEPS)
        assert same_bits(ddim(call_of(dispatcher, conditions("dit")), sample(dtype=now), STEPS), expected)


# --- modes of torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["plain", "mode"])
@pytest.mark.parametrize("mode", ["autocast", "inference"])
def test_modes_of_torch(model: Model, mode: str, first: str) -> None:
    """Under autocast and inference mode, captured there or outside, an I-step is still the model's own."""
    dispatcher, given = fresh(model), inputs("dit")

    def compare(mode_now: Any) -> Tensor:
        with torch.no_grad(), mode_now:
            dispatcher.reset()
            got: Tensor = dispatcher(**given).sample
            assert torch.equal(got, model(**given).sample)
            assert bool(dispatcher(**inputs("dit", timestep=400)).sample.isfinite().all())
        return got

    def entered() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else torch.inference_mode()

    results = [compare(entered() if (first == "mode") == (number % 2 == 0) else torch.no_grad()) for number in range(3)]
    assert {result.dtype for result in results} == ({torch.float32, torch.bfloat16} if mode == "autocast" else {torch.float32})


@pytest.mark.parametrize(("steps", "full"), [(10, [0, 2, 4, 6, 8, 9]), (20, [*range(0, 20, 2), 19])])
def test_the_default_schedule_follows_the_scheduler(model: Model, steps: int, full: list[int]) -> None:
    """A watched scheduler tells how many steps the run has, at each of its runs; without one every 4th step is an I-step."""
    for known, expected in ((True, full), (False, list(range(0, steps, 4)))):
        scheduler = sampler(1)
        dispatcher = transformed(model, **{**SETTINGS, "schedule": None}, scheduler=scheduler if known else None)
        reports: list[StepReport] = []
        dispatcher.step_callback = reports.append
        for _ in range(2):
            scheduler.set_timesteps(steps)
            reports.clear()
            ddim(call_of(dispatcher, conditions("dit")), sample(), steps, scheduler)
            assert [report.step for report in reports if report.kind == "I"] == expected
        assert dispatcher.summary().full_steps == len(expected)
