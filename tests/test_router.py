"""Learning-to-Cache's router: what its gates mix, against the eager model; what training moves, keeps and resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LAYERS, Model, build, inputs, sample, sampler
from torch import Tensor

from tokencache_compile import ConfigError, baselines
from tokencache_compile.learn.loop import TrainingConfig
from tokencache_compile.learn.router import RoutedStack, train_router
from tokencache_compile.learn.stack import BlockStack

NULL = {"class_labels": torch.tensor(1000)}


class Items:
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(index)), {"class_labels": torch.tensor(index)}


def train(out: Path, model: Model | None = None, **changes: Any) -> Tensor:
    settings: dict[str, Any] = dict(steps=6, batch=4, lr=0.1, cost_weight=0.0, label_dropout=0.0, sampling_steps=10, checkpoint_every=2)
    return train_router(model or build("dit"), Items(), sampler(10), TrainingConfig(**settings | changes), out, NULL)


@torch.no_grad()
def mixed_by_hooks(model: Model, held: list[list[Tensor]], gates: Tensor, **call: Any) -> Tensor:
    """The eager model with every attention's and feed-forward's output mixed with what it gave before."""
    handles = []
    for number, block in enumerate(model.transformer_blocks):
        for part, module in enumerate((block.attn1, block.ff)):

            def mix(_: Any, __: Any, value: Tensor, number: int = number, part: int = part) -> Tensor:
                return gates[number, part] * value + (1 - gates[number, part]) * held[number][part]

            handles.append(module.register_forward_hook(mix))
    output: Tensor = model(**call).sample
    for handle in handles:
        handle.remove()
    return output


def test_what_gates_mix() -> None:
    model, earlier, now = build("dit"), inputs("dit"), inputs("dit", timestep=300)
    now = now | {"hidden_states": sample(seed=9)}
    routed = RoutedStack(BlockStack(model, earlier))
    gates = torch.rand(LAYERS, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, held = routed.run(earlier)
        torch.testing.assert_close(first, model(**earlier).sample)
        got, _ = routed.run(now, gates, held)
    torch.testing.assert_close(got, mixed_by_hooks(model, held, gates, **now), atol=1e-4, rtol=1e-4)


def test_training_moves_the_gates_and_nothing_else(tmp_path: Path) -> None:
    model = build("dit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    free, dear = train(tmp_path / "free", model, steps=20), train(tmp_path / "dear", model, steps=20, cost_weight=1e3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert free.shape == (5, LAYERS, 2) and float(dear.max()) < 0 < float(free.mean())
    config = baselines.learning_to_cache(dear, threshold=0.5)
    assert config.fresh == (((False, False),) * LAYERS,) and config.groups == (0,) * 10


def test_a_run_resumes(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", steps=4)
    assert torch.equal(train(tmp_path / "parts"), whole)
    with pytest.raises(ConfigError, match="another run"):
        train(tmp_path / "parts", lr=0.2)
