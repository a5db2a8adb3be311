"""A quick subset of benchmarks/coverage.py: blocks of one stream and of two, text beside image and joined with it, and refusals."""

from __future__ import annotations

import pytest
from check_family import CONTEXTS, check
from families import FAMILIES


@pytest.mark.parametrize(
    ("key", "streams"),
    [
        ("DiTTransformer2DModel", "1"),
        ("PixArtTransformer2DModel", "1"),
        ("SD3Transformer2DModel", "2"),
        ("FluxTransformer2DModel", "2"),
        ("QwenImageTransformer2DModel", "2"),
        ("CogVideoXTransformer3DModel (rotary)", "2"),
    ],
)
def test_right_in_every_context(key: str, streams: str) -> None:
    """The I-step bit for bit, a P-step of all tokens, and one at ratio 0.9 against the independent reference."""
    result = check(FAMILIES[key])
    assert result.streams == streams
    assert {name: context.ok for name, context in result.contexts.items()} == dict.fromkeys(CONTEXTS, True), result.line()


@pytest.mark.parametrize(("key", "where", "reason"), [("SanaTransformer2DModel", "transformer_blocks.0", "fixes its token count")])
def test_refused_by_name(key: str, where: str, reason: str) -> None:
    (context,) = check(FAMILIES[key], ("kept",)).contexts.values()
    assert context.refusal.startswith(f"{where}: ") and reason in context.refusal, context
