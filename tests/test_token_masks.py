"""Self-attention masked by pairs of tokens: what a kept token attends to, and groups that an I-step takes apart.

The block of these tests lets tokens of one group number see each other; the numbers are a side input of the block. Tolerance: 1e-5 of the
output's largest value where that is above 1, else 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_run import assert_close
from torch import Tensor
from toy import CHANNELS, HEADS, TOKENS, ToyBlock, ToyModel, toy_inputs

import tokencache_compile
from tokencache_compile import Dispatcher, Schedule
from tokencache_compile.grouped_attention import attend_in_groups, same_group_mask

Mask = Callable[[Tensor], Tensor]
GROUPS = 4


def equal(group: Tensor) -> Tensor:
    return (group[:, :, None] == group[:, None])[:, None]


def added(group: Tensor) -> Tensor:
    return torch.where(group.unsqueeze(2) == group.unsqueeze(1), 0.0, float("-inf")).unsqueeze(1)


def filled(group: Tensor) -> Tensor:
    queries, keys = group[:, None, :, None], group[:, None, None, :]
    apart = (queries < keys) | ((queries - keys) > 0)
    return torch.zeros_like(apart, dtype=torch.float32).masked_fill(apart, -1e9)


def expanded(group: Tensor) -> Tensor:
    return (group[:, None, :, None] == group[:, None, None, :]).expand(-1, HEADS, -1, -1)


def both_expanded(group: Tensor) -> Tensor:
    tokens = group.shape[1]
    return group[:, None, :, None].expand(-1, HEADS, tokens, tokens) == group[:, None, None, :].expand(-1, HEADS, tokens, tokens)


def symmetric(group: Tensor) -> Tensor:
    """Made by a transposition, which mixes up queries and keys."""
    later = group[:, :, None] > group[:, None]
    return ~(later | later.transpose(1, 2))[:, None]


class MaskedBlock(ToyBlock):
    """Tokens attend to those that ``mask`` allows, by the numbers ``group`` [B, N]."""

    def __init__(self, mask: Mask = equal) -> None:
        super().__init__()
        self.mask = mask

    def heads_of(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]

    def attention(self, x: Tensor, group: Tensor, all_tokens: bool) -> Tensor:
        query, key, value = self.heads_of(x)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask(group))

    def forward(self, x: Tensor, condition: Tensor, group: Tensor) -> Tensor:  # type: ignore[override]
        normed = F.layer_norm(x, (CHANNELS,)) * (1 + condition[:, None])
        x = x + self.out(self.attention(normed, group, not torch.compiler.is_exporting()).transpose(1, 2).flatten(2))
        return self.add_mlp(x)


class GroupedBlock(MaskedBlock):
    """The same, but all tokens at once go group by group, as a model would run that is sparse to be fast."""

    def attention(self, x: Tensor, group: Tensor, all_tokens: bool) -> Tensor:
        query, key, value = self.heads_of(x)
        if all_tokens:
            return attend_in_groups(query, key, value, group, GROUPS)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=same_group_mask(group))


class MaskedModel(ToyModel):
    """Blocks that know the group of each token: the same for every input, or those given."""

    def __init__(self, block: Callable[[], MaskedBlock], group: Tensor | None = None) -> None:
        super().__init__(block)
        self.group = group

    def numbers(self, x: Tensor) -> Tensor:
        return (torch.arange(x.shape[1], device=x.device) // 3 % GROUPS).expand(x.shape[0], -1)

    def forward(self, x: Tensor, t: Tensor, group: Tensor | None = None) -> Tensor:
        group = self.numbers(x) if group is None else group
        x, condition = self.inner(x), self.embed(t)
        for block in self.blocks:
            x = block(x, condition, group)
        result: Tensor = self.outer(x)
        return result


class EvenGroups(MaskedModel):
    """Groups of one size."""

    def numbers(self, x: Tensor) -> Tensor:
        return (torch.arange(x.shape[1], device=x.device) % GROUPS).expand(x.shape[0], -1)


def transformed(model: MaskedModel, given: dict[str, Any], **settings: Any) -> Dispatcher:
    common: dict[str, Any] = {"ratio": 0.5, "last_k": 0, "forecast": 0, "scorer": "random", "schedule": Schedule(full=(0,))}
    dispatcher: Dispatcher = tokencache_compile.transform(model, **common | settings, backend="eager", example_inputs=given)
    return dispatcher


@torch.no_grad()
def two_steps(dispatcher: Dispatcher, given: dict[str, Any]) -> list[Tensor]:
    """An I-step, and a P-step on the same inputs."""
    steps = dispatcher.steps
    device = torch.device("cpu")
    full = steps.full.module(*given.values(), *steps.step_inputs(0, device), *steps.initial_caches(device))
    return [full[0], steps.cached[0].module(*given.values(), *steps.step_inputs(1, device), *full[1:])[0]]


@pytest.mark.parametrize(
    ("context", "mask"),
    [
        *(("full", mask) for mask in (equal, added, filled, expanded, both_expanded)),
        ("cached", equal),
        *((context, symmetric) for context in ("full", "cached")),  # a transpose: not made anew, but cut out of the whole mask
    ],
)
def test_on_the_same_inputs_a_p_step_changes_nothing(context: Any, mask: Mask) -> None:
    """Every token's keys and values being at hand, a kept token's update is the one in its cache."""
    given = toy_inputs()
    model = MaskedModel(lambda: MaskedBlock(mask))
    full, cached = two_steps(transformed(model, given, context=context), given)
    with torch.no_grad():
        assert torch.equal(full, model(**given))
        apart = model(**given, group=torch.zeros(2, TOKENS, dtype=torch.long))
    assert_close([cached], [full])
    assert float((full - apart).abs().max()) > 0.1, "the mask changes nothing, so a wrong one would pass"


@pytest.mark.parametrize("mask", [equal, symmetric])
def test_kept_tokens_keep_their_groups(mask: Mask) -> None:
    """Context ``kept``, by hand: each block on the kept tokens alone, with their own numbers."""
    given = toy_inputs()
    model = MaskedModel(lambda: MaskedBlock(mask))
    dispatcher = transformed(model, given, context="kept")
    _, cached = two_steps(dispatcher, given)
    scores = dispatcher.steps.step_inputs(1, torch.device("cpu"))[1]
    with torch.no_grad():
        x, condition = model.inner(given["x"]), model.embed(given["t"])
        stream = x
        for number, block in enumerate(model.blocks):
            index = scores[0, number].topk(TOKENS // 2).indices
            kept = block(stream[:, index], condition, model.numbers(x)[:, index])
            moved = block(x, condition, model.numbers(x))  # of the I-step
            stream, x = stream + (moved - x), moved
            stream[:, index] = kept
        assert_close([cached], [model.outer(stream)])


# --- groups ---------------------------------------------------------------------------------------------------------------


def many_tokens() -> dict[str, Any]:
    """So many that the two forms of attention differ in the last bits."""
    return {"x": torch.randn(2, 512, CHANNELS, generator=torch.Generator().manual_seed(1)), "t": torch.full((2,), 500)}


def test_both_forms_are_the_same_mathematics() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, HEADS, TOKENS, 4, generator=draw, dtype=torch.float64)
    for group in (torch.arange(TOKENS) % GROUPS, torch.arange(TOKENS) // 4, torch.randperm(TOKENS, generator=draw) % GROUPS):
        numbers = torch.stack([group, group.flip(0)])
        for bias in (None, torch.randn(2, TOKENS, generator=draw, dtype=torch.float64)):
            got = attend_in_groups(query, key, value, numbers, GROUPS, bias)
            expected = F.scaled_dot_product_attention(query, key, value, attn_mask=same_group_mask(numbers, bias))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
            for row, head, token in ((0, 0, 0), (1, 1, 7)):  # and once more by hand
                same = (numbers[row] == numbers[row, token]).nonzero()[:, 0]
                logits = key[row, head, same] @ query[row, head, token] / 2 + (0 if bias is None else bias[row, same])
                torch.testing.assert_close(got[row, head, token], logits.softmax(0) @ value[row, head, same], rtol=0, atol=1e-12)


def test_an_i_step_takes_equal_groups_apart() -> None:
    """Its pairs are those of the groups, and its bits those of the model that does the same. With all tokens a P-step equals it."""
    given = many_tokens()
    model, masked = EvenGroups(GroupedBlock), MaskedModel(MaskedBlock)
    dispatcher = transformed(model, given, context="cached", keep=((512,) * 3,))
    full, cached = two_steps(dispatcher, given)
    with torch.no_grad():
        assert torch.equal(full, model(**given))
    assert_close([cached], [full])
    pairs = 3 * 2 * HEADS * 2 * (CHANNELS // HEADS) * 512  # blocks, batch, heads, two products, their depth, queries
    plain = transformed(masked, given, context="cached", keep=((512,) * 3,))
    assert plain.steps.macs_full - dispatcher.steps.macs_full == pairs * (512 - 512 // GROUPS)
    assert dispatcher.steps.macs_cached == plain.steps.macs_cached


@pytest.mark.parametrize("model", [MaskedModel(MaskedBlock), EvenGroups(lambda: MaskedBlock(added))], ids=["sizes differ", "other mask"])
def test_what_is_not_taken_apart(model: MaskedModel) -> None:
    attentions = [a for body in transformed(model, toy_inputs()).steps.program.bodies for a in body.known_roles.attentions]
    assert [a.groups for a in attentions] == [None]


def test_groups_that_are_given_are_not_taken_apart() -> None:
    """They may be of other sizes at the next call."""
    given = {**toy_inputs(), "group": (torch.arange(TOKENS) % GROUPS).repeat(2, 1)}
    attentions = [a for body in transformed(EvenGroups(MaskedBlock), given).steps.program.bodies for a in body.known_roles.attentions]
    assert [a.groups for a in attentions] == [None]
