"""LoRA on the last blocks: where it acts, how it comes and goes, and the path it learns on, which is that of inference."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapters import CONFIG, DIT_LINEARS, PIXART_LINEARS, ROWS, Hard, draw_adapter, names_of, shape_of
from plain_loop import PlainLoop
from plain_run import first_block_call, make_predictor
from tiny import LAYERS, build, call_of, conditions, ddim, inputs, parameters_unchanged, same_bits, sample, transformed
from torch import Tensor, nn
from toy import CHANNELS, ToyModel, toy_inputs

from tokencache_compile import CacheConfig, Schedule
from tokencache_compile.errors import ConfigError
from tokencache_compile.learn.lora import added_lora, lora_targets
from tokencache_compile.learn.stack import BlockStack

peft = pytest.importorskip("peft")


# -- where it acts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, layers", [("dit", DIT_LINEARS), ("pixart", PIXART_LINEARS), ("pixart_masked", PIXART_LINEARS)])
def test_targets_are_attention_and_mlp_of_the_last_blocks(kind: str, layers: tuple[str, ...]) -> None:
    model = build(kind)
    program = BlockStack(model, inputs(kind)).program
    assert set(lora_targets(model, program, 1)) == names_of(layers, 3)
    assert set(lora_targets(model, program, 2)) == names_of(layers, 2, 3)


def test_targets_of_a_model_of_no_known_class() -> None:
    model = ToyModel()
    found = lora_targets(model, BlockStack(model, toy_inputs()).program, 1)
    assert set(found) == {"blocks.2.qkv", "blocks.2.out", "blocks.2.mlp.0", "blocks.2.mlp.2"}


class BareBlock(nn.Module):
    """Its only weight is a parameter of its own; the one linear works on the conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CHANNELS, CHANNELS))
        self.modulation = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + nn.functional.linear(x, self.weight) * self.modulation(condition)[:, None]


def test_without_a_linear_on_tokens_it_is_refused() -> None:
    model = ToyModel(BareBlock)
    with pytest.raises(ConfigError, match=r"no torch.nn.Linear works on the tokens in blocks\.2;"):
        lora_targets(model, BlockStack(model, toy_inputs()).program, 1)


def test_no_last_block_is_refused() -> None:
    model = build("dit")
    with pytest.raises(ConfigError, match="last_k=0 was asked for"):
        lora_targets(model, BlockStack(model, inputs("dit")).program, 0)


# -- the adapter comes and goes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_the_adapter_begins_as_nothing_and_leaves_no_trace(kind: str) -> None:
    model = build(kind)
    model.transformer_blocks[0].requires_grad_(False)
    before, call = shape_of(model), call_of(model, conditions(kind))
    plain = call(0, sample(), torch.full((4,), 500))
    random_state = torch.get_rng_state()
    with parameters_unchanged(model):
        with added_lora(model, sorted(names_of(("attn1.to_q", "ff.net.2"), 3)), rank=3):
            trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
            assert torch.equal(call(0, sample(), torch.full((4,), 500)), plain)
            draw_adapter(model, 1.0)
            assert not torch.equal(call(0, sample(), torch.full((4,), 500)), plain)
            assert not any(module.training for module in model.modules())
        assert trainable == {
            "transformer_blocks.3.attn1.to_q.lora_A.default.weight": (3, 32),
            "transformer_blocks.3.attn1.to_q.lora_B.default.weight": (32, 3),
            "transformer_blocks.3.ff.net.2.lora_A.default.weight": (3, 128),
            "transformer_blocks.3.ff.net.2.lora_B.default.weight": (32, 3),
        }
        assert shape_of(model) == before
        assert torch.equal(call(0, sample(), torch.full((4,), 500)), plain)
        with pytest.raises(KeyError), added_lora(model, ["transformer_blocks.3.attn1.to_q"]):
            raise KeyError
        assert shape_of(model) == before
        with pytest.raises(ValueError, match="not found"), added_lora(model, ["no.such.module"]):
            pass
        assert shape_of(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_update_is_b_times_a() -> None:
    name, x, model = "transformer_blocks.3.attn1.to_q", torch.randn(2, 32), build("dit")
    plain = model.get_submodule(name)(x)
    with added_lora(model, [name], rank=3), torch.no_grad():
        a, b = draw_adapter(model)
        assert torch.allclose(model.get_submodule(name)(x), plain + x @ a.T @ b.T, atol=1e-5)


def test_one_seed_draws_one_adapter() -> None:
    def first(seed: int) -> Tensor:
        model = build("dit")
        with added_lora(model, ["transformer_blocks.3.attn1.to_q"], seed=seed):
            return next(p.detach().clone() for p in model.parameters() if p.requires_grad)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_rank_that_is_none_is_refused(rank: Any) -> None:
    model = build("dit")
    with pytest.raises(ConfigError, match=f"rank={rank!r} was asked for"), added_lora(model, ["transformer_blocks.3.ff.net.2"], rank):
        pass


def test_a_model_with_an_adapter_is_refused() -> None:
    model, target = build("dit"), ["transformer_blocks.3.ff.net.2"]
    with added_lora(model, target):
        with pytest.raises(ConfigError, match=r"an adapter already, at transformer_blocks\.3\.ff\.net\.2"), added_lora(model, target):
            pass
        assert any(".lora_A." in name for name, _ in model.named_parameters())


def test_without_peft_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install 'tokencache-compile"), added_lora(build("dit"), ["transformer_blocks.3.ff.net.2"]):
        pass


# -- the hard path ----------------------------------------------------------------------------------------------------


class Recorded(PlainLoop):
    """The plain loop, which keeps the stream after the last block."""

    last: Tensor

    def _epilogue(self, x: Tensor, cond: Any, sample: Tensor) -> Tensor:
        self.last = x
        return super()._epilogue(x, cond, sample)


@pytest.mark.parametrize(
    "config, index, guidance",
    [
        (CONFIG, 4, 1.0),
        (replace(CONFIG, scorer="random", context="full", last_k=2, keep=((3, 6),)), 5, 1.0),
        (replace(CONFIG, scorer="change", context="cached", forecast=0), 5, 1.0),
        (
            replace(CONFIG, scorer="norm", context="kept", history="computed", keep=((3, 0, 6), (5, 1, 2)), groups=(0, 0, 0, 0, 0, 1)),
            5,
            1.0,
        ),
        (replace(CONFIG, selection="pair"), 4, 2.5),
        (replace(CONFIG, scorer="change", context="cached", last_k=2), 5, 0.5),
    ],
)
def test_the_hard_path_is_that_of_inference(config: CacheConfig, index: int, guidance: float) -> None:
    """Against the plain loop over the eager modules: adapter on in P-steps, off in I-steps and for the target.

    Without guidance the error is the last stream's, with it the guided output's, and the sampler steps by that output.
    """
    base = build("dit")
    predictor = make_predictor(base) if config.scorer == "predictor" else None
    hard = Hard(config, build("dit"), predictor, guidance)
    rows = ROWS if guidance == 1.0 else 2 * ROWS

    def noise_of(output: Tensor) -> Tensor:
        """w · cond + (1 − w) · uncond, without the learned variance."""
        return output[:, :4] if guidance == 1.0 else guidance * output[:ROWS, :4] + (1 - guidance) * output[ROWS:, :4]

    with added_lora(hard.model, hard.targets, rank=3):
        window, loss_of, _ = hard.window()
        step = hard.step(window, index)
        loss = float(loss_of(step).detach())

        profiles = hard.original.plan.profiles
        scorer = config.scorer if config.scorer in ("change", "norm") else "external"
        last_k = hard.original.plan.last_k
        loop = Recorded(base, profiles[0], last_k, config.context, config.forecast, scorer, config.selection, config.history)
        x = hard.scheduler.add_noise(hard.clean, hard.noise, hard.scheduler.timesteps[:1].expand(ROWS))
        for i in range(index + 1):  # every window here begins at step 0
            timestep, full = hard.scheduler.timesteps[i], i % 3 == 0
            given = hard.make_call(x, timestep)
            scores = None
            if config.scorer == "random":
                scores = torch.rand(1, LAYERS - last_k, 16, generator=torch.Generator().manual_seed(i)).expand(rows, -1, -1)
            elif predictor is not None:
                args, kwargs = first_block_call(base, **given)
                with torch.no_grad():
                    scores = predictor(*args, **kwargs)[:, : LAYERS - last_k]
            loop.model = base if full else hard.model
            loop.keep = list(profiles[config.groups[i] if config.groups else 0])
            output = loop.step(i, full, None if full else scores, **given)
            if i < index:
                x = hard.scheduler.step(noise_of(output), timestep, x).prev_sample
    streams: list[Tensor] = []
    handle = base.transformer_blocks[-1].register_forward_hook(lambda _, __, result: streams.append(result))
    with torch.no_grad():
        exact = base(**given).sample
    handle.remove()
    assert torch.allclose(step.inputs[0], given["hidden_states"], atol=1e-5)
    got, wanted = (loop.last, streams[0]) if guidance == 1.0 else (noise_of(output), noise_of(exact))
    assert torch.allclose(step.target, wanted, atol=1e-4)
    expected = float((got - wanted).square().mean())
    assert expected > 1e-3
    assert loss == pytest.approx(expected, rel=1e-3)


def test_the_windows_start_moves_with_the_step() -> None:
    """The same P-step, of a window that begins at step 3, noised to there."""
    config = replace(CONFIG, forecast=0)
    hard = Hard(config, build("dit"), make_predictor(build("dit")))
    with added_lora(hard.model, hard.targets, rank=3):
        window, _, _ = hard.window()
        step = hard.step(window, 4)
    x = hard.scheduler.add_noise(hard.clean, hard.noise, hard.scheduler.timesteps[3].expand(ROWS))
    output = call_of(hard.model, {"class_labels": hard.labels})(0, x, hard.scheduler.timesteps[3].expand(ROWS))
    x = hard.scheduler.step(output[:, :4], hard.scheduler.timesteps[3], x).prev_sample
    assert torch.allclose(step.inputs[0], x, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_gradients_reach_the_adapter_alone_and_are_right(guidance: float) -> None:
    hard = Hard(
        replace(CONFIG, last_k=2, selection="sample" if guidance == 1.0 else "pair"), build("dit"), make_predictor(build("dit")), guidance
    )
    with added_lora(hard.model, hard.targets, rank=3):
        window, loss_of, weights = hard.window()
        step = hard.step(window, 4)
        assert not any(tensor.requires_grad for tensor in (*step.inputs, step.target))
        loss_of(step).backward()
        assert {n for n, p in hard.model.named_parameters() if p.grad is not None} == {
            n for n, _ in hard.model.named_parameters() if ".lora_" in n
        }
        assert all(float(w.grad.abs().max()) > 0 for w in weights if w.grad is not None)
        draw, eps = torch.Generator().manual_seed(8), 2e-3
        directions = [torch.randn(w.shape, generator=draw) for w in weights]
        expected = sum(float((w.grad * d).sum()) for w, d in zip(weights, directions, strict=True) if w.grad is not None)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                torch._foreach_add_(weights, directions, alpha=sign * eps)
                values.append(float(loss_of(step)))
                torch._foreach_add_(weights, directions, alpha=-sign * eps)
        torch._foreach_zero_([w.detach() for w in weights])
        assert float(step.without_lora) == pytest.approx(float(loss_of(step).detach()), rel=1e-5)
        assert (values[0] - values[1]) / (2 * eps) == pytest.approx(expected, rel=2e-2)


# -- structures ---------------------------------------------------------------------------------------------------------


def test_layers_that_differ_in_a_dictionary_are_two_structures() -> None:
    """peft keeps an adapter's scale in one: blocks of unequal scale must not share a graph."""
    model = build("dit")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=sorted(names_of(("ff.net.2",), 2, 3)))
    config.alpha_pattern = {"transformer_blocks.3.ff.net.2": 20}
    peft.inject_adapter_in_model(config, model)
    draw_adapter(model.eval(), 0.5)
    dispatcher = transformed(model, last_k=2, schedule=Schedule(1))
    call, plain = (call_of(m, conditions("dit")) for m in (dispatcher, model))
    assert same_bits(ddim(call, sample(), 3), ddim(plain, sample(), 3))
    assert [block.body for block in dispatcher.steps.program.blocks] == [0, 0, 1, 2]
