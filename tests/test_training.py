"""Training the predictor: gates, windows and runs, held against plain loops over the eager model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from plain_loop import Conditioning, PlainLoop, after_attention, forecast_update, modulate, run_full
from plain_run import assert_close, make_predictor
from processes import two_processes
from safetensors.torch import load_file, save_file
from tiny import LAYERS, ROWS, TOKENS, Model, build, conditions, inputs, sample, sampler
from torch import Tensor

from tokencache_compile import CacheConfig, CachePredictor, ConfigError, Schedule
from tokencache_compile.errors import InputError
from tokencache_compile.learn.checkpoint import load_checkpoint, save_checkpoint
from tokencache_compile.learn.deployed import DeployedBlocks
from tokencache_compile.learn.gated import GatedPass, GatedStep, gated_stream, shifted
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.learn.train import CHECKPOINT, TrainingConfig, train_predictor
from tokencache_compile.learn.window import Window, history_of

STEPS, CACHED = 20, LAYERS - 1
CONTEXTS = ["kept", "cached", "full", "reuse"]


# --- windows and gated passes on a model of four blocks, the last never cached ----------------------------------------


@cache
def model_of(kind: str) -> Model:
    return build(kind)


@cache
def stack_of(kind: str) -> BlockStack:
    return BlockStack(model_of(kind), inputs(kind))


def settings(**changes: Any) -> CacheConfig:
    defaults: dict[str, Any] = {"last_k": 1, "context": "full", "forecast": 0, "scorer": "predictor", "schedule": Schedule(every=4)}
    return CacheConfig(**defaults | changes)


def run_window(kind: str, config: CacheConfig, step: int, scheduler: Any = None) -> tuple[DeployedBlocks, GatedStep]:
    blocks = DeployedBlocks(stack_of(kind), config)
    window = Window(blocks, scheduler or sampler(STEPS), config, CACHED)
    given = conditions(kind)

    def make_call(x: Tensor, timestep: Tensor) -> Mapping[str, Any]:
        return {"hidden_states": x, "timestep": timestep.expand(len(x)), **given}

    return blocks, window.run(sample(seed=3), sample(seed=4), step, make_call, [torch.Generator() for _ in range(ROWS)])


def noised(scheduler: Any, step: int) -> Tensor:
    """x_t ~ q(· | x_0) at sampling step ``step``, from the same sample and noise as :func:`run_window`."""
    kept = scheduler.alphas_cumprod[scheduler.timesteps[step]]
    mixed: Tensor = kept.sqrt() * sample(seed=3) + (1 - kept).sqrt() * sample(seed=4)
    return mixed


def prologue(model: Model, hidden_states: Tensor, **given: Any) -> tuple[Tensor, Conditioning]:
    """x^0, and what the blocks see besides."""
    with torch.no_grad():
        return PlainLoop(model, [0] * CACHED, 1, "full", 0, "external")._prologue(hidden_states, **given)


@torch.no_grad()
def plain_target(model: Model, **given: Any) -> Tensor:
    """The stream after the eager model's last block."""
    found: list[Tensor] = []
    handle = model.transformer_blocks[-1].register_forward_hook(lambda _, args, out: found.append(out))
    model(**given)
    handle.remove()
    return found[0]


def plain_window(kind: str, config: CacheConfig, step: int, start: int, scheduler: Any) -> tuple[Tensor, PlainLoop]:
    """A plain sampling run from real data at ``start`` to ``step``, nothing recomputed: the sample there, and what is cached."""
    loop = PlainLoop(model_of(kind), [0] * CACHED, 1, config.context, config.forecast, "external", history=config.history)
    x = noised(scheduler, start)
    for index in range(start, step):
        t, full = scheduler.timesteps[index], config.schedule.is_full(index)
        scores = None if full else torch.zeros(ROWS, CACHED, TOKENS)
        output = loop.step(index, full, scores, hidden_states=x, timestep=t.expand(ROWS), **conditions(kind))
        x = scheduler.step(output[:, :4], t, x).prev_sample
    return x, loop


def plain_gated(
    model: Model, x: Tensor, cond: Conditioning, alpha: Tensor, updates: Sequence[Tensor], attentions: Sequence[Tensor] | None
) -> Tensor:
    """SPEC section 3 step 5: all tokens through every block, mixed with what would be reused. ``attentions`` for ``reuse``."""
    for layer, block in enumerate(model.transformer_blocks):
        if layer >= len(updates):
            x = run_full(block, x, cond)[0]
            continue
        if attentions is None:
            computed = run_full(block, x, cond)[0]
        else:
            computed = after_attention(block, x, attentions[layer], modulate(block, x, cond), cond)
        gate = alpha[:, layer].unsqueeze(-1)
        x = x + gate * (computed - x) + (1 - gate) * updates[layer]
    return x


# steps 3 and 6 come after one and two I-steps, step 15 after as many as any forecast takes
@pytest.mark.parametrize(
    ("kind", "context", "forecast", "step", "history"),
    [
        *[("dit", context, forecast, 15, "full_steps") for context in CONTEXTS for forecast in (0, 1, 2)],
        *[("pixart", context, forecast, 15, "full_steps") for context in CONTEXTS for forecast in (0, 2)],
        *[("pixart_masked", context, 2, 15, "full_steps") for context in CONTEXTS],
        ("pixart_added", "full", 1, 15, "full_steps"),
        ("dit", "reuse", 2, 3, "full_steps"),
        ("dit", "reuse", 2, 6, "full_steps"),
        ("dit", "reuse", 2, 15, "computed"),
        ("dit", "full", 1, 14, "computed"),
    ],
)
def test_window_and_gated_stream_are_the_plain_loops(kind: str, context: Any, forecast: int, step: int, history: Any) -> None:
    """A whole window (several I-steps, P-steps between them), then a gated pass with random gates."""
    config = settings(context=context, forecast=forecast, history=history)
    blocks, found = run_window(kind, config, step)
    start = max(0, step // 4 - forecast) * 4
    scheduler, model = sampler(STEPS), model_of(kind)
    x, loop = plain_window(kind, config, step, start, scheduler)
    given = {"hidden_states": x, "timestep": scheduler.timesteps[step].expand(ROWS), **conditions(kind)}
    updates = [forecast_update(state.history, state.stamps, step) for state in loop.state]
    attentions = None
    if context == "reuse":
        held = [state.attention or [] for state in loop.state]
        forecasts = [forecast_update(entries, state.stamps, step) for entries, state in zip(held, loop.state, strict=True)]
        attentions = forecasts if history == "full_steps" else [entries[0] for entries in held]

    assert set(found.kwargs) == set(given) and torch.equal(found.kwargs["timestep"], given["timestep"])
    assert_close([found.kwargs["hidden_states"]], [x])
    assert len(found.reused) == CACHED
    assert_close([cached.update for cached in found.reused], updates)
    assert_close([found.target], [plain_target(model, **given)])
    stream, cond = prologue(model, **given)
    assert_close([found.first[stack_of(kind).program.bodies[0].known_roles.stream_input]], [stream])

    alpha = torch.rand(ROWS, CACHED, TOKENS, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got = gated_stream(blocks, found, alpha)[0]
        expected = plain_gated(model, stream, cond, alpha, updates, attentions)
    assert_close([got], [expected])
    assert float((got - found.target).norm() / found.target.norm()) > 0.01, "reusing changed nothing: the test would pass on anything"


def test_gates_at_one_are_the_model_and_at_zero_its_skipped_blocks() -> None:
    blocks, found = run_window("dit", settings(forecast=1), 15)
    with torch.no_grad():
        assert_close([gated_stream(blocks, found, torch.ones(ROWS, CACHED, TOKENS))[0]], [found.target])
        got = gated_stream(blocks, found, torch.zeros(ROWS, CACHED, TOKENS))[0]
        stream, cond = prologue(model_of("dit"), **found.kwargs)
        assert_close([gated_stream(blocks, found, None)[0]], [got])
        skipped = stream + sum(cached.update for cached in found.reused)
        assert_close([got], [run_full(model_of("dit").transformer_blocks[-1], skipped, cond)[0]])


def test_one_step_after_the_i_step_a_window_is_algorithm_1() -> None:
    """Lines 4 to 11: x_(t+1) ~ q, the updates there, one solver step to x_t, the full pass there. All from the eager model."""
    config = settings(schedule=Schedule(every=2))
    _, found = run_window("dit", config, 7)
    model, scheduler, given = model_of("dit"), sampler(STEPS), conditions("dit")
    before, now = scheduler.timesteps[6], scheduler.timesteps[7]
    x = noised(scheduler, 6)
    streams: list[tuple[Tensor, Tensor]] = []
    handles = [b.register_forward_hook(lambda _, args, out: streams.append((args[0], out))) for b in model.transformer_blocks]
    with torch.no_grad():
        output = model(hidden_states=x, timestep=before.expand(ROWS), **given).sample
        x_now = scheduler.step(output[:, :4], before, x).prev_sample
        model(hidden_states=x_now, timestep=now.expand(ROWS), **given)
    for handle in handles:
        handle.remove()
    assert_close([found.kwargs["hidden_states"]], [x_now])
    assert_close([cached.update for cached in found.reused], [after - into for into, after in streams[:CACHED]])
    assert_close([found.target], [streams[-1][1]])


@pytest.mark.parametrize(
    ("schedule", "forecast", "step", "expected"),
    [
        (Schedule(every=4), 0, 15, (12,)),
        (Schedule(every=4), 2, 15, (12, 8, 4)),
        (Schedule(every=4), 2, 6, (4, 0)),
        (Schedule(every=4), 1, 13, (12, 8)),
        (Schedule(full=(0, 2, 3, 9)), 2, 5, (3, 2, 0)),
        (Schedule(full=(0, 2, 3, 9)), 0, 1, (0,)),
        (Schedule(every=5, full=(0, 2, 3, 9)), 1, 17, (14, 9)),
    ],
)
def test_history_of(schedule: Schedule, forecast: int, step: int, expected: tuple[int, ...]) -> None:
    assert history_of(settings(schedule=schedule, forecast=forecast), step, STEPS) == expected


def multistep_solver() -> Any:
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, prediction_type="v_prediction", algorithm_type="dpmsolver++")
    scheduler.set_timesteps(STEPS)
    return scheduler


def test_a_window_of_a_multistep_solver() -> None:
    """Its state is that of a run begun at the window's first step, and is gone in the next window."""
    config, reference = settings(forecast=2), multistep_solver()
    reference.set_begin_index(4)
    x, _ = plain_window("dit", config, 15, 4, reference)
    scheduler = multistep_solver()
    for _ in range(2):
        _, found = run_window("dit", config, 15, scheduler)
        assert_close([found.kwargs["hidden_states"]], [x])
        assert all(bool(value.isfinite().all()) for value in (found.target, *(cached.update for cached in found.reused)))


# --- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_gate_of_every_cached_block_gets_a_gradient(context: Any) -> None:
    blocks, found = run_window("dit", settings(context=context), 7)
    alpha = torch.full((ROWS, CACHED, TOKENS), 0.5, requires_grad=True)
    (gated_stream(blocks, found, alpha)[0] - found.target).square().mean().backward()
    assert alpha.grad is not None and bool((alpha.grad != 0).all()) and bool(alpha.grad.isfinite().all())


def test_the_gradient_of_a_gate_is_the_slope_of_the_loss() -> None:
    """Central differences in double precision of the plain loop, at gates of the first and the last cached block."""
    blocks, found = run_window("dit", settings(), 7)
    generator = torch.Generator().manual_seed(6)
    alpha = torch.rand(ROWS, CACHED, TOKENS, generator=generator, requires_grad=True)
    (gated_stream(blocks, found, alpha)[0] - found.target).square().mean().backward()
    assert alpha.grad is not None
    model = build("dit").double()
    call = {name: value.double() if value.is_floating_point() else value for name, value in found.kwargs.items()}
    updates, target = [cached.update.double() for cached in found.reused], found.target.double()
    stream, cond = prologue(model, **call)

    @torch.no_grad()
    def loss(gates: Tensor) -> float:
        return float((plain_gated(model, stream, cond, gates, updates, None) - target).square().mean())

    for place in [(0, 0, 0), (3, 0, 15), (1, 2, 7)]:
        nudge = torch.zeros(alpha.shape, dtype=torch.float64)
        nudge[place] = 1e-4
        slope = (loss(alpha.detach() + nudge) - loss(alpha.detach() - nudge)) / 2e-4
        assert float(alpha.grad[place]) == pytest.approx(slope, rel=1e-3)


def unhatted(last_k: int) -> tuple[Tensor, Tensor]:
    """The loss by Eq. 10 as printed, x̂^l from the true x^(l−1), and the gradient of the gates."""
    _, found = run_window("dit", settings(), 7)
    model, cached = model_of("dit"), LAYERS - last_k
    _, streams, _ = stack_of("dit").updates(found.kwargs)
    _, cond = prologue(model, **found.kwargs)
    updates = [c.update for c in found.reused] + [torch.randn(streams[0].shape, generator=torch.Generator().manual_seed(1))]
    alpha = torch.full((ROWS, cached, TOKENS), 0.5, requires_grad=True)
    hatted = streams[0]
    for layer, block in enumerate(model.transformer_blocks):
        true = streams[layer].detach()
        computed = run_full(block, true, cond)[0].detach()
        hatted = computed
        if layer < cached:
            gate = alpha[:, layer].unsqueeze(-1)
            hatted = true + gate * (computed - true) + (1 - gate) * updates[layer]
    loss = (hatted - found.target).square().mean()
    (gradient,) = torch.autograd.grad(loss, alpha, allow_unused=True) if loss.requires_grad else (None,)
    return loss.detach(), torch.zeros_like(alpha) if gradient is None else gradient


def test_the_printed_recursion_is_degenerate() -> None:
    """Why x̂ follows Eq. 6: as Eq. 10 is printed only the last gate learns, and with uncached last blocks none does."""
    loss, gradient = unhatted(last_k=0)
    assert float(loss) > 0.01
    assert bool((gradient[:, -1] != 0).all()) and not bool(gradient[:, :-1].any())
    loss, gradient = unhatted(last_k=1)
    assert float(loss) < 1e-9 and not bool(gradient.any())


@pytest.mark.parametrize("mean", [0.02, 0.1, 0.5, 0.9])
def test_shifted_gates_have_the_mean_and_keep_the_ranks(mean: float) -> None:
    """Logits of blocks whose means lie far apart."""
    logits = 2 * torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) + torch.tensor([-60.0, -2.0, 0.0, 2.0, 60.0])[:, None]
    gates = shifted(logits, mean)
    assert gates.shape == logits.shape
    assert float((gates.mean((0, 2)) - mean).abs().max()) < 1e-3
    order = logits.transpose(0, 1).flatten(1).argsort(1)  # of all tokens of a block, over the batch
    ranked = gates.transpose(0, 1).flatten(1).gather(1, order)
    assert bool((ranked.diff(dim=1) >= 0).all()) and bool((ranked[:, -1] > ranked[:, 0]).all())
    assert_close([gates], [shifted(logits + torch.randn(5, 1), mean)])


def test_the_gradient_of_shifted_gates_is_their_slope() -> None:
    """Central differences through the bisection itself: the shift moves with the logits, and a common rise does nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, generator=generator, requires_grad=True)
    weights = torch.randn(2, 3, 8, generator=generator)
    (gradient,) = torch.autograd.grad((shifted(logits, 0.2) * weights).sum(), logits)
    assert float(gradient.sum((0, 2)).abs().max()) < 1e-5 and bool((gradient.abs() > 1e-5).all())
    for place in [(0, 0, 0), (1, 2, 7), (1, 1, 3)]:
        nudge = torch.zeros(logits.shape)
        nudge[place] = 1e-2
        with torch.no_grad():
            slope = float(((shifted(logits + nudge, 0.2) - shifted(logits - nudge, 0.2)) * weights).sum()) / 2e-2
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_the_losses_of_a_gated_pass() -> None:
    """Eq. 9: the squared error a value, and the gates summed over blocks and tokens, averaged over the batch.

    With a budget the error is a share of that of gates at 0.
    """
    blocks, found = run_window("dit", settings(forecast=1), 15)
    predictor = make_predictor(model_of("dit"))
    with torch.no_grad():
        logits = stack_of("dit").logits(predictor, found.first)[:, :CACHED]
        alpha = 1 / (1 + (-logits).exp())
        result = GatedPass(blocks, predictor)(found)
        budgeted = GatedPass(blocks, predictor)(found, 0.25)
        error, error_budgeted, error_unaided = (
            gated_stream(blocks, found, gates)[0] - found.target for gates in (alpha, shifted(logits, 0.25), torch.zeros_like(alpha))
        )
    assert float(result.cache_loss) == pytest.approx(float(error.pow(2).sum()) / error.numel(), rel=1e-5)
    assert float(result.cost) == pytest.approx(sum(float(alpha[row].sum()) for row in range(ROWS)) / ROWS, rel=1e-5)
    assert_close([result.alpha], [torch.stack([alpha[:, layer].mean() for layer in range(CACHED)])])
    assert float(budgeted.cost) == pytest.approx(0.25 * CACHED * TOKENS, rel=1e-3)
    assert float(budgeted.cache_loss) == pytest.approx(float(error_budgeted.pow(2).sum() / error_unaided.pow(2).sum()), rel=1e-5)
    assert abs(float(result.cost) - float(budgeted.cost)) > 1


def test_guided_losses_are_of_the_guided_output() -> None:
    """One selection for both halves of a pair, and the error that is left when guidance has combined them."""
    labels = conditions("dit")["class_labels"]
    half = ROWS // 2
    blocks = DeployedBlocks(stack_of("dit"), settings(forecast=1))
    weight = 2.5

    def make_call(x: Tensor, timestep: Tensor) -> Mapping[str, Any]:
        rows = torch.cat([x, x])
        given = torch.cat([labels[:half], torch.full_like(labels[:half], 1000)])
        return {"hidden_states": rows, "timestep": timestep.expand(ROWS), "class_labels": given}

    window = Window(blocks, sampler(STEPS), settings(forecast=1), CACHED, weight)
    found = window.run(sample(half, seed=3), sample(half, seed=4), 15, make_call, [torch.Generator() for _ in range(half)])
    x = found.kwargs["hidden_states"]
    assert torch.equal(x[:half], x[half:]), "both halves see one sample"
    with torch.no_grad():
        expected = model_of("dit")(**found.kwargs, return_dict=False)[0][:, : x.shape[1]]
        assert torch.equal(found.output, expected)
        predictor = make_predictor(model_of("dit"))
        logits = stack_of("dit").logits(predictor, found.first)[:, :CACHED]
        mean = (logits[:half] + logits[half:]) / 2
        gates = shifted(torch.cat([mean, mean]), 0.25)

        def error(alpha: Tensor | None) -> Tensor:
            output = gated_stream(blocks, found, alpha)[1]
            wrong = output - expected
            return (wrong[half:] + weight * (wrong[:half] - wrong[half:])).square().mean()

        result = GatedPass(blocks, predictor, weight, pair=True)(found, 0.25)
        apart = GatedPass(blocks, predictor, weight, pair=False)(found, 0.25)
    assert float(result.cache_loss) == pytest.approx(float(error(gates) / error(None)), rel=1e-4)
    assert float(apart.cache_loss) != pytest.approx(float(result.cache_loss), rel=1e-3)


# --- whole runs --------------------------------------------------------------------------------------------------------

NULL = {"class_labels": torch.tensor(1000)}


class Items:
    """Sixteen noise images with the labels 0 … 15; with ``reads`` the run is interrupted after that many."""

    def __init__(self, reads: int | None = None) -> None:
        self.images = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        self.left = reads

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.images[index], {"class_labels": torch.tensor(index)}


def configured(**changes: Any) -> TrainingConfig:
    defaults: dict[str, Any] = dict(
        steps=6, batch=4, lr=1e-3, cost_weight=1e-3, label_dropout=0.25, sampling_steps=10, checkpoint_every=2, ema_decay=0.9
    )
    return TrainingConfig(**defaults | changes)


def train(
    out: Path,
    data: Any = None,
    config: CacheConfig | None = None,
    model: Model = None,
    null: Mapping[str, Tensor] | None = NULL,
    scheduler: Any = None,
    **changes: Any,
) -> CachePredictor:
    """A run on a DiT of three blocks, two of them cached, with ``changes`` to :func:`configured`."""
    config = config or settings(schedule=Schedule(every=2))
    model = build("dit", layers=3) if model is None else model
    return train_predictor(model, Items() if data is None else data, scheduler or sampler(10), config, configured(**changes), out, null)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_model_stays_as_it_is_and_the_predictor_learns(tmp_path: Path) -> None:
    model = build("dit", layers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    requires = [p.requires_grad for p in model.parameters()]
    predictor = train(tmp_path, model=model, ema_decay=None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and requires == [p.requires_grad for p in model.parameters()]
    assert not predictor.training and all(not p.requires_grad for p in predictor.parameters())
    assert bool(predictor.head.weight.any()) and bool(predictor.head.bias.any())
    block = dict(model.transformer_blocks[0].named_parameters())
    moved = [name for name, p in predictor.block.named_parameters() if not torch.equal(p, block[name])]
    assert set(moved) >= {"attn1.to_q.weight", "ff.net.2.weight", "norm1.linear.weight"}


def test_the_run_returns_and_saves_the_weight_average(tmp_path: Path) -> None:
    """From the weights after each step, which runs of 1 and of 2 steps without an average return."""
    decay, weights = 0.2, []  # the first step's is 2 / 11, the second's is capped
    for steps in (1, 2):
        weights.append(train(tmp_path / str(steps), steps=steps, ema_decay=None).head.bias)
    average = torch.zeros_like(weights[0])
    for step, value in enumerate(weights):
        rate = min(decay, (2 + step) / (11 + step))
        average = rate * average + (1 - rate) * value
    predictor = train(tmp_path / "average", steps=2, ema_decay=decay)
    torch.testing.assert_close(predictor.head.bias, average)
    saved = load_file(tmp_path / "average" / CHECKPOINT)
    assert torch.equal(saved["average.head.bias"], predictor.head.bias) and torch.equal(saved["predictor.head.bias"], weights[-1])


@pytest.mark.parametrize(("cost_weight", "low", "high"), [(1e-9, 0.9, 1.0), (10.0, 0.0, 0.1)])
def test_the_cost_weight_decides_between_computing_and_reusing(tmp_path: Path, cost_weight: float, low: float, high: float) -> None:
    train(tmp_path, steps=40, lr=0.03, cost_weight=cost_weight, label_dropout=0.0, ema_decay=None)
    log = log_of(tmp_path)
    assert log[0]["alpha"] == [0.5, 0.5]
    assert all(low <= sum(row["alpha"]) / 2 <= high for row in log[-5:])


def test_without_a_cost_weight_the_budget_holds_from_the_first_step(tmp_path: Path) -> None:
    train(tmp_path, config=settings(schedule=Schedule(every=2), ratio=0.75), cost_weight=None, lr=0.05)
    log = log_of(tmp_path)
    assert all(row["alpha"] == pytest.approx([0.25, 0.25], abs=1e-3) and row["cost_loss"] == 0 for row in log)


def test_the_log_has_a_row_a_step(tmp_path: Path) -> None:
    train(tmp_path, steps=12)
    log = log_of(tmp_path)
    assert [row["step"] for row in log] == list(range(1, 13))
    assert all(row["p_step"] in (1, 3, 5, 7, 9) for row in log) and len({row["p_step"] for row in log}) > 2
    for row in log:
        assert row["cost_loss"] == pytest.approx(1e-3 * sum(row["alpha"]) * TOKENS, abs=1e-3 * 1e-4 * TOKENS)


# --- interrupted and resumed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """An uninterrupted run: its folder, the folder of its first four steps, and what it returned."""

    folder: Path
    begun: Path
    predictor: CachePredictor

    def is_of(self, out: Path, predictor: CachePredictor) -> None:
        """Assert that the run in ``out`` is this one, bit for bit."""
        ours, theirs = load_file(out / CHECKPOINT), load_file(self.folder / CHECKPOINT)
        assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
        ours, theirs = predictor.state_dict(), self.predictor.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert (out / "log.jsonl").read_text() == (self.folder / "log.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, begun = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("begun")
    train(begun, steps=4)
    return Run(folder, begun, train(folder, steps=7))


def test_a_run_of_fewer_steps_goes_on_as_the_whole_one(tmp_path: Path, whole: Run) -> None:
    """Stopped where a checkpoint was not due."""
    train(tmp_path, steps=3)
    assert len(log_of(tmp_path)) == 3
    whole.is_of(tmp_path, train(tmp_path, steps=7))


@pytest.mark.parametrize("reads", [1 + 2, 5 + 4 * 3, 5 + 4 * 5 + 2])
def test_a_killed_run_resumes_from_its_checkpoint(tmp_path: Path, reads: int, whole: Run) -> None:
    """In the capture, and with rows in the log that no checkpoint has.

    A run reads item 0, a batch of 4 for the capture, and 4 a step.
    """
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Items(reads), steps=7)
    whole.is_of(tmp_path, train(tmp_path, steps=7))


def test_what_a_crash_leaves_half_written_does_no_harm(tmp_path: Path, whole: Run) -> None:
    """A row of the log, and a checkpoint aside of the last one."""
    shutil.copytree(whole.begun, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "p_s')
    (tmp_path / "checkpoint.partial").write_bytes(b"half a file")
    whole.is_of(tmp_path, train(tmp_path, steps=7))


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path, whole: Run) -> None:
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    whole.is_of(tmp_path, train(tmp_path, steps=7))


# --- several processes -------------------------------------------------------------------------------------------------

def runs_of_processes(out: Path) -> None:
    """What one process, or each of several, trains: with a cost term, and with a budget under a stochastic solver."""
    train(out / "cost", steps=20, lr=1e-4)
    stochastic = DDPMScheduler(num_train_timesteps=1000, clip_sample=False, prediction_type="v_prediction")
    train(out / "budget", steps=10, lr=1e-4, cost_weight=None, scheduler=stochastic)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """The same global batch, on gloo: the same losses, gates and weights but for rounding."""
    with two_processes("test_training", "runs_of_processes", tmp_path / "two"):
        runs_of_processes(tmp_path / "one")
    for name in ("cost", "budget"):
        one, two = log_of(tmp_path / "one" / name), log_of(tmp_path / "two" / name)
        assert len(two) == len(one) == (20 if name == "cost" else 10)
        for ours, theirs in zip(two, one, strict=True):
            assert ours["p_step"] == theirs["p_step"]
            assert ours["cache_loss"] == pytest.approx(theirs["cache_loss"], rel=1e-4), f"{name}, step {ours['step']}"
            assert ours["alpha"] == pytest.approx(theirs["alpha"], abs=2e-4)
        weights = load_file(tmp_path / "one" / name / CHECKPOINT)
        head = "predictor.head.weight"  # in the body AdamW makes steps of gradients that are 0 but for rounding
        torch.testing.assert_close(load_file(tmp_path / "two" / name / CHECKPOINT)[head], weights[head], rtol=1e-3, atol=1e-5)
        assert float(weights[head].abs().max()) > 5e-4


# --- what a step sees --------------------------------------------------------------------------------------------------


def labels_seen(monkeypatch: pytest.MonkeyPatch, out: Path, steps: int, label_dropout: float, null: Any = NULL) -> list[list[Tensor]]:
    """The labels of every model call, step by step of the run."""
    seen: list[list[Tensor]] = []
    window, flatten = Window.run, BlockStack.flatten

    def on_window(self: Window, *args: Any) -> GatedStep:
        seen.append([])
        return window(self, *args)

    def on_call(self: BlockStack, kwargs: Mapping[str, Any]) -> list[Tensor]:
        seen[-1].append(kwargs["class_labels"].clone())
        return flatten(self, kwargs)

    monkeypatch.setattr(Window, "run", on_window)
    monkeypatch.setattr(BlockStack, "flatten", on_call)
    train(out, steps=steps, batch=8, label_dropout=label_dropout, null=null, config=settings(forecast=1))
    return seen


def test_one_drop_mask_for_all_passes_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of a window and the gated pass see the same rows dropped; 3 in 10 rows are."""
    seen = labels_seen(monkeypatch, tmp_path, 25, 0.3)
    assert len(seen) == 25 and all(len(calls) >= 3 for calls in seen)
    assert all(torch.equal(labels, calls[0]) for calls in seen for labels in calls)
    dropped = torch.stack([calls[0] == 1000 for calls in seen])
    assert len(dropped.unique(dim=0)) > 10
    assert abs(float(dropped.float().mean()) - 0.3) < 3 * (0.3 * 0.7 / dropped.numel()) ** 0.5


def test_what_is_drawn_depends_on_seed_and_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of two runs of one seed and of one of another; a solver's own noise has no value in common with it."""
    window, drawn = Window.run, list[tuple[Tensor, Tensor]]()

    def on_window(self: Window, clean: Tensor, noise: Tensor, step: int, make_call: Any, generators: list[torch.Generator]) -> GatedStep:
        copies = [torch.Generator() for _ in generators]
        for ours, theirs in zip(copies, generators, strict=True):
            ours.set_state(theirs.get_state())
        drawn.append((noise, randn_tensor(noise.shape, copies)))
        return window(self, clean, noise, step, make_call, generators)

    monkeypatch.setattr(Window, "run", on_window)
    for number, seed in enumerate([0, 0, 1]):
        train(tmp_path / str(number), steps=2, batch=8, seed=seed)
    first, again, other = drawn[:2], drawn[2:4], drawn[4:]
    assert all(torch.equal(x, y) for a, b in zip(first, again, strict=True) for x, y in zip(a, b, strict=True))
    different = [row for noise, solver in (*first, *other) for row in (*noise, *solver)]
    assert len(different) == 4 * 2 * 8
    values = torch.stack(different).flatten(1)
    correlation = values @ values.T / values.shape[1] - torch.eye(len(values))
    assert float(correlation.fill_diagonal_(0).abs().max()) < 0.4  # of 256 independent values: 0.06 on average
    for noise, solver in drawn:
        assert torch.isin(noise, solver).float().mean() < 0.01


@pytest.mark.parametrize(("share", "null"), [(0.0, None), (1.0, NULL)])
def test_no_row_and_every_row_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, null: Any) -> None:
    seen = labels_seen(monkeypatch, tmp_path, 4, share, null)
    assert all(bool(((labels == 1000) == (share == 1.0)).all()) for calls in seen for labels in calls)


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"steps": True}, "steps=True"),
        ({"batch": 0}, "batch=0"),
        ({"sampling_steps": 0}, "sampling_steps=0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"label_dropout": -0.1}, "label_dropout=-0.1"),
        ({"label_dropout": 1.1}, "label_dropout=1.1"),
        ({"label_dropout": float("nan")}, "label_dropout=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"cost_weight": -1e-4}, "cost_weight=-0.0001"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"ema_decay": -0.5}, "ema_decay=-0.5"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8'"),
    ],
)
def test_training_config_ranges(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**changes)


@pytest.mark.parametrize(("schedule", "steps"), [(Schedule(every=1), 10), (Schedule(every=4), 1), (Schedule(full=(0, 1, 2, 3)), 4)])
def test_a_schedule_without_p_steps_is_refused(tmp_path: Path, schedule: Schedule, steps: int) -> None:
    with pytest.raises(ConfigError, match=f"has no P-step among {steps} steps"):
        train(tmp_path, config=settings(schedule=schedule), sampling_steps=steps)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    class Three:
        num_processes, process_index = 3, 0

    with pytest.raises(ConfigError, match="batch=4 was asked for on 3 processes"):
        train_predictor(model_of("dit"), Items(), sampler(10), settings(), configured(batch=4), tmp_path, NULL, Three())


def test_label_dropout_without_null_conditions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label_dropout=0.25 .* without null conditions"):
        train(tmp_path, null=None)


def test_guidance_without_null_conditions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guidance=2.5 .* without null conditions"):
        train(tmp_path, null=None, label_dropout=0.0, guidance=2.5)
    with pytest.raises(ConfigError, match=r"guidance=2.5 and label_dropout=0.25"):
        configured(guidance=2.5)


def test_a_guided_run_trains(tmp_path: Path) -> None:
    """On pairs with one selection: the predictor changes, and so does what it learns from what a run of single rows does."""
    pairs = settings(forecast=1, selection="pair")
    guided = train(tmp_path / "guided", config=pairs, label_dropout=0.0, guidance=2.5, cost_weight=None)
    single = train(tmp_path / "single", config=pairs, label_dropout=0.0, cost_weight=None)
    assert float(guided.head.weight.detach().norm()) > 0
    assert not torch.equal(guided.head.weight, single.head.weight)


def test_a_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DiTTransformer2DModel is in training mode"):
        train(tmp_path, model=build("dit", layers=3).train())


def test_a_model_of_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has weights of \['torch.bfloat16'\].* Load it in float32"):
        train(tmp_path, model=build("dit", layers=3).bfloat16())


def test_a_model_on_another_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DiTTransformer2DModel is on meta, and the run on (\S+)\. Call model\.to\('\1'\)"):
        train(tmp_path, model=build("dit", layers=3).to("meta"))
    assert not list(tmp_path.iterdir())


def test_too_few_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="last_k=3"):
        train(tmp_path, config=settings(last_k=3))


@pytest.mark.parametrize("change", [{"lr": 1e-4}, {"batch": 8}, {"config": settings(ratio=0.5)}])
def test_the_checkpoint_of_another_run_is_refused(change: dict[str, Any], whole: Run) -> None:
    before = {file.name: file.read_bytes() for file in whole.begun.iterdir()}
    with pytest.raises(ConfigError, match="is the checkpoint of another run"):
        train(whole.begun, steps=7, **change)
    assert {file.name: file.read_bytes() for file in whole.begun.iterdir()} == before


def saved_checkpoint(folder: Path) -> tuple[Path, dict[str, torch.nn.Module], torch.optim.Optimizer]:
    """A small module and its optimizer after one step, saved."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = folder / "new" / CHECKPOINT
    save_checkpoint(path, {"predictor": module}, optimizer, {"step": 3, "identity": "é"})
    return path, {"predictor": module}, optimizer


def test_a_checkpoint_gives_back_weights_optimizer_and_progress(tmp_path: Path) -> None:
    path, modules, optimizer = saved_checkpoint(tmp_path)
    module = torch.nn.Linear(3, 2)
    other = torch.optim.AdamW(module.parameters(), lr=0.1)
    assert load_checkpoint(path, {"predictor": module}, other) == {"step": 3, "identity": "é"}
    assert all(torch.equal(value, modules["predictor"].state_dict()[name]) for name, value in module.state_dict().items())
    ours, theirs = other.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys() == {0, 1}
    for index, state in theirs["state"].items():
        assert state.keys() == ours["state"][index].keys()
        assert all(torch.equal(value, ours["state"][index][key]) for key, value in state.items())
    assert [file.name for file in path.parent.iterdir()] == [CHECKPOINT]


def test_a_checkpoint_of_other_modules_is_refused(tmp_path: Path) -> None:
    path, modules, optimizer = saved_checkpoint(tmp_path)
    wider, without_bias = {"predictor": torch.nn.Linear(3, 4)}, {"predictor": torch.nn.Linear(3, 2, bias=False)}
    for others in (wider, without_bias, {**modules, "average": modules["predictor"]}):
        with pytest.raises(ConfigError, match="of another shape than this run's"):
            load_checkpoint(path, others, optimizer)


def test_a_corrupt_checkpoint_is_refused(tmp_path: Path) -> None:
    path, modules, optimizer = saved_checkpoint(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint at all", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read as a checkpoint"):
            load_checkpoint(path, modules, optimizer)


@pytest.mark.parametrize("metadata", [None, {"format": "2", "progress": "{}"}])
def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path, modules, optimizer = saved_checkpoint(tmp_path)
    save_file(load_file(path), path, metadata)
    with pytest.raises(ConfigError, match=r"is of checkpoint format (None|2); this version reads 1"):
        load_checkpoint(path, modules, optimizer)


def test_a_run_refuses_the_checkpoint_of_a_wider_model(whole: Run) -> None:
    with pytest.raises(ConfigError, match="predictor of another shape"):
        train(whole.begun, steps=7, model=build("dit", layers=3, heads=3))


class Without(Items):
    """Items that lack their label after so many reads."""

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert self.left is not None
        self.left -= 1
        return self.images[index], {"class_labels": torch.tensor(index)} if self.left >= 0 else {}


@pytest.mark.parametrize("first", [3, 5])
def test_an_item_without_a_condition_is_refused_by_name(tmp_path: Path, first: int) -> None:
    """In the middle of the batch that the model is captured with, and all of a later one."""
    with pytest.raises(InputError, match=r"item \d+ of the data has {'sample': \(4, 8, 8\)}, and item 0 has .*'class_labels'"):
        train(tmp_path, Without(first), label_dropout=0.0, null=None)


def test_data_without_the_models_conditions_is_refused_by_the_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="DiTTransformer2DModel itself refused this call"):
        train(tmp_path, Without(0), label_dropout=0.0, null=None)


def test_items_of_another_size_are_refused(tmp_path: Path) -> None:
    class Growing(Items):
        def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            return self.images[index, :, : 4 + 4 * (index == 0)], {"class_labels": torch.tensor(index)}

    with pytest.raises(InputError, match=r"has {'sample': \(4, 4, 8\).* item 0 has {'sample': \(4, 8, 8\)"):
        train(tmp_path, Growing())


def test_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the data is empty"):
        train(tmp_path, [])


def test_a_condition_the_model_does_not_take_is_refused_by_name(tmp_path: Path) -> None:
    class Named(Items):
        def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            return self.images[index], {"labels": torch.tensor(index)}

    with pytest.raises(InputError, match="labels"):
        train(tmp_path, Named(), label_dropout=0.0, null=None)


def test_null_conditions_of_another_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"null conditions \['encoder_hidden_states'\] were given"):
        train(tmp_path, null={"encoder_hidden_states": torch.zeros(7, 20)})
