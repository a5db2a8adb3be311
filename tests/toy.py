"""Small transformers that are no diffusers classes: one that can be cached, and some that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, TOKENS, HEADS = 8, 16, 2


class ToyBlock(nn.Module):
    """Residual attention and MLP, modulated by the timestep's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 16), nn.GELU(), nn.Linear(16, CHANNELS))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attend(F.layer_norm(x, (CHANNELS,)) * (1 + condition[:, None]))
        return self.add_mlp(x)

    def add_mlp(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.mlp(x)
        return added


class Positional(ToyBlock):
    """A learned value for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(TOKENS, CHANNELS))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x, condition) + self.position


class Cumulative(ToyBlock):
    """Each token adds up the ones before it."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x, condition) + x.cumsum(1)


class Shifted(ToyBlock):
    """Each token takes some of its neighbour."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x, condition) + 0.5 * x.roll(1, dims=1)


class Convolved(ToyBlock):
    """A convolution over the grid of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        grid = x.transpose(1, 2).unflatten(-1, (4, 4))
        moved: Tensor = super().forward(x, condition)
        moved += self.convolution(grid).flatten(2).transpose(1, 2)
        return moved


class ExplicitAttention(ToyBlock):
    """Its attention is written out, so no ``scaled_dot_product_attention`` is to be found in it."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended: Tensor = self.out(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return attended


class Pooled(ToyBlock):
    """Every token sees the mean of all, beside its attention."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x, condition) + x.mean(1, keepdim=True)


class AddsInPlace(ToyBlock):
    """Adds the attention to the stream it was given, in place."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x += self.attend(F.layer_norm(x, (CHANNELS,)) * (1 + condition[:, None]))
        return self.add_mlp(x)


class WritesToAView(ToyBlock):
    """Writes to some channels of what it was given."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x[:, :, :4] += 1
        return super().forward(x, condition)


class AddsInPlaceToItsOwn(ToyBlock):
    """In-place additions, but to a tensor of its own: nothing against that."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attend(F.layer_norm(x, (CHANNELS,)) * (1 + condition[:, None]))
        x += self.mlp(x)
        return x


class Branching(ToyBlock):
    """What it does depends on the values."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        moved: Tensor = super().forward(x, condition)
        return moved if float(x.mean()) > 0 else moved + 1


class Counting(ToyBlock):
    """Keeps state between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    calls: Tensor

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, condition) + self.calls


class Noisy(ToyBlock):
    """Random, in eval mode too."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x, condition) + torch.randn_like(x)


class TwoStreams(ToyBlock):
    """Carries a second stream of tokens along."""

    def forward(self, x: Any, condition: Tensor) -> Any:
        image, text = x if isinstance(x, tuple) else (x, x[:, :5])
        image = super().forward(image, condition)
        return image, super().forward(text, condition)


class ToyModel(nn.Module):
    """Blocks between two linear layers; forward(x [B, N, C], t [B]) without ``return_dict``, its timestep named ``t``."""

    def __init__(self, block: Callable[[], nn.Module] = ToyBlock, layers: int = 3, std: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(CHANNELS, CHANNELS)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.outer = nn.Linear(CHANNELS, CHANNELS)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)
        self.eval()

    def embed(self, t: Tensor) -> Tensor:
        return torch.sin(t.float()[:, None] * torch.arange(1, CHANNELS + 1) / 100)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, condition = self.inner(x), self.embed(t)
        for block in self.blocks:
            x = block(x, condition)
        result: Tensor = self.outer(x[0] if isinstance(x, tuple) else x)
        return result


class CallsTwice(ToyModel):
    """Goes through its blocks twice."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, condition = self.inner(x), self.embed(t)
        for block in [*self.blocks, *self.blocks]:
            x = block(x, condition)
        result: Tensor = self.outer(x)
        return result


class WithoutList(ToyModel):
    """Its blocks stand side by side, in no ``ModuleList``."""

    def __init__(self) -> None:
        super().__init__(layers=0)
        self.first, self.second = ToyBlock(), ToyBlock()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        condition = self.embed(t)
        result: Tensor = self.second(self.first(x, condition), condition)
        return result


class WithoutTimestep(ToyModel):
    """Does not know what time it is."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.zeros(x.shape[0]))


class ReturnsNumber(ToyModel):
    """Returns a value that is not a tensor beside its result."""

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return super().forward(x, t), 1


class TakesMore(ToyModel):
    """Takes whatever keywords there are, among them a scale."""

    def forward(self, x: Tensor, t: Tensor, **more: Any) -> Tensor:
        scaled: Tensor = super().forward(x, t) * more.get("scale", 1)
        return scaled


def toy_inputs(seed: int = 1, t: int = 500) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, TOKENS, CHANNELS, generator=draw), "t": torch.full((2,), t)}
