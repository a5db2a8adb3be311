"""Models and blocks that need more: values that are read, tokens first, counts and grids told, modules called as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import CHANNELS, TOKENS, ToyBlock, ToyModel, toy_inputs

from tokencache_compile import CacheConfig, Dispatcher, InputError, Schedule, UnsupportedModelError, export_onnx, load, transform
from tokencache_compile.passes.pipeline import StepPrograms, build_steps


class CutsText(ToyModel):
    """Text beside the image, cut to the length that its mask tells, and one branch on a number of the call."""

    def __init__(self) -> None:
        super().__init__(WithText)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, strength: Tensor) -> Tensor:  # type: ignore[override]
        condition = self.embed(t)
        text = text[:, mask[0].bool()] if strength > 0 else text[:, : mask.sum(1).max()] + 1
        x = torch.cat([self.inner(x), text], 1)
        for block in self.blocks:
            x = block(x, condition)
        result: Tensor = self.outer(x[:, :TOKENS])
        return result


class WithText(ToyBlock):
    """A block for text and image in one stream."""


class ReadsTheSample(ToyModel):
    """Goes by the sample's own values."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x if float(x.mean()) > 0 else -x, t)


def text_inputs(length: int, seed: int = 1, t: int = 500, strength: float = 1.0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(7)
    mask = (torch.arange(6) < length).long().expand(2, -1)
    text = torch.randn(2, 6, CHANNELS, generator=draw)
    return {**toy_inputs(seed, t), "text": text, "mask": mask, "strength": torch.tensor(strength)}


def test_values_that_are_read_have_graphs_of_their_own() -> None:
    """A changed mask in the middle of a run begins its branch anew, and a value that was seen before captures nothing."""
    model = CutsText()
    dispatcher = transform(model, 0.5, schedule=Schedule(every=3), context="full", backend="eager")
    kinds: list[str] = []
    dispatcher.step_callback = lambda report: kinds.append(report.kind)
    for number, (length, strength) in enumerate([(6, 1.0), (6, 1.0), (4, 1.0), (4, 1.0), (4, -1.0), (6, 1.0)]):
        call = text_inputs(length, t=500 - number, strength=strength)
        with torch.no_grad():
            got, expected = dispatcher(**call), model(**call)
        assert torch.equal(got, expected) or kinds[-1] == "P"
    assert kinds == ["I", "P", "I", "I", "I", "I"]
    assert len(dispatcher._compiled) == 3
    layouts = {c.steps.program.bodies[0].known_roles.layout.after for c in dispatcher._compiled.values()}
    assert layouts == {6, 4}
    assert {c.steps.read_inputs for c in dispatcher._compiled.values()} == {(3, 4)}  # mask and strength, not text


def test_what_changes_at_every_step_is_not_read() -> None:
    with pytest.raises(UnsupportedModelError, match="ReadsTheSample: its forward reads values made from x"):
        transform(ReadsTheSample(), 0.5, example_inputs=toy_inputs())


def test_an_exported_model_refuses_other_values(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    dispatcher = transform(CutsText(), 0.5, context="full", backend="eager", example_inputs=text_inputs(4))
    loaded = load(export_onnx(dispatcher, tmp_path / "bundle", example_inputs=text_inputs(4)))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**text_inputs(4)), dispatcher.model(**text_inputs(4)), atol=1e-5, rtol=0)
        with pytest.raises(InputError, match=r"mask is \(2, 6\) torch.int64 with values of SHA-256 \w+ and not"):
            loaded(**text_inputs(5))


class TokensFirst(ToyBlock):
    """[N, B, C]."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1), condition).transpose(0, 1)


class TokensFirstModel(ToyModel):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1), t).transpose(0, 1)


class Counted(ToyBlock):
    """Is told how many tokens it has, and uses it."""

    def forward(self, x: Tensor, condition: Tensor, tokens: int = TOKENS) -> Tensor:
        first, second = super().forward(x, condition).split([tokens - 1, 1], dim=1)
        return torch.cat([first, second], 1)


class CountedModel(ToyModel):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, condition = self.inner(x), self.embed(t)
        for block in self.blocks:
            x = block(x, condition, TOKENS)
        result: Tensor = self.outer(x)
        return result


class Experts(nn.Module):
    """Each token to one of two layers, rows sorted by values."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.one, self.other = (nn.Linear(CHANNELS, size) for size in (2, CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.gate(x).argmax(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate((self.one, self.other)):
            if bool((choice == number).any()):
                result[choice == number] = expert(x[choice == number])
        return result


class Routed(ToyBlock):
    """A mixture of experts in the place of the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Experts()  # type: ignore[assignment]


class OnGrid(ToyBlock):
    """A convolution over the grid whose sizes it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor, height: int = 2, width: int = 8) -> Tensor:
        x = super().forward(x, condition)
        mixed: Tensor = self.mix(x.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return x + mixed.flatten(2).transpose(1, 2)


class OnGridModel(ToyModel):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, condition = self.inner(x), self.embed(t)
        for block in self.blocks:
            x = block(x, condition, 2, 8)
        result: Tensor = self.outer(x)
        return result


def run(steps: StepPrograms, cached: bool, call: dict[str, Any], caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    step = steps.cached[0] if cached else steps.full
    with torch.no_grad():
        output, *after = step.module(*call.values(), *steps.step_inputs(int(cached), torch.device("cpu")), *caches)
    return output, after


@pytest.mark.parametrize(
    ("model", "block"), [(TokensFirstModel, TokensFirst), (CountedModel, Counted), (ToyModel, Routed), (OnGridModel, OnGrid)]
)
def test_steps(model: type[ToyModel], block: type[ToyBlock]) -> None:
    """I is the model's step, P of all tokens too; a P-step leaves out some of it, and its MACs are fewer."""
    toy, first, then = model(block), toy_inputs(1, 500), toy_inputs(2, 480)
    settings: dict[str, Any] = dict(ratio=0.5, context="kept", scorer="random", forecast=0)
    every = build_steps(toy, first, CacheConfig(**settings, keep=((TOKENS,) * 3,)), None)
    some = build_steps(toy, first, CacheConfig(**settings), None)
    with torch.no_grad():
        expected = toy(**first), toy(**then)
    for steps in (every, some):
        output, caches = run(steps, False, first, steps.initial_caches(torch.device("cpu")))
        assert torch.equal(output, expected[0])
        got, _ = run(steps, True, then, caches)
        assert torch.allclose(got, expected[1], atol=1e-5) == (steps is every)
    assert some.macs_cached[0] < every.macs_cached[0] <= some.macs_full or model is OnGridModel


def test_neighbours_are_known_to_kept_tokens_alone() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks.0: its tokens mix with their neighbours on the grid, which context='full'"):
        transform(OnGridModel(OnGrid), 0.5, context="full", example_inputs=toy_inputs())


def test_a_new_dispatcher_shares_the_structures() -> None:
    """Models of one structure are registered once."""
    from tokencache_compile import opaque_modules

    transform(ToyModel(Routed), 0.5, context="kept", example_inputs=toy_inputs(), backend="eager")
    known = len(opaque_modules._KNOWN)
    assert isinstance(transform(ToyModel(Routed), 0.5, context="kept", example_inputs=toy_inputs(), backend="eager"), Dispatcher)
    assert len(opaque_modules._KNOWN) == known
