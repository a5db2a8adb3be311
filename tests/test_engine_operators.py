"""What engine graphs say otherwise than torch because engines cannot: complex tables, masks filled where another says so."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from tokencache_compile.passes.logical_fills import logical_fills
from tokencache_compile.passes.real_tables import real_tables

aten = torch.ops.aten


class Rotated(nn.Module):
    """Tokens turned by rows of a complex table, which is cut and joined first, as Qwen-Image does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(9, 2), torch.randn(9, 2)))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        first, last = self.turns.split([4, 5])
        table = torch.cat([first[:3], last[-3:]], 0)
        rows = table.index_select(-2, kept).unsqueeze(-3)
        turned = torch.view_as_complex(x.unflatten(-1, (2, 2))) * rows
        again = torch.view_as_real(turned * table[:1]).flatten(-2)
        return again + table.shape[0]


def traced(module: nn.Module, *inputs: Tensor) -> GraphModule:
    graph: GraphModule = make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    return graph


def test_complex_tables_become_real() -> None:
    torch.manual_seed(0)
    module, x, kept = Rotated(), torch.randn(2, 3, 4), torch.tensor([5, 0, 2])
    graph = traced(module, x, kept)
    real_tables(graph)
    graph.recompile()
    assert torch.equal(graph(x, kept), module(x, kept))
    tables = {n.target: getattr(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    assert [tuple(table.shape) for table in tables.values()] == [(6, 2, 2), (1, 2, 2)]
    assert not any(table.is_complex() for table in tables.values())
    arithmetic = {n.target for n in graph.graph.nodes if any(u.is_complex() for u in _values(n))}
    assert arithmetic == {aten.view_as_complex.default, aten.mul.Tensor}
    again = traced(module, x, kept)
    real_tables(again)
    assert {n.target for n in again.graph.nodes if n.op == "get_attr"} == set(tables), "graphs of one model share their tables by name"


def _values(node: torch.fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [value] if isinstance(value, Tensor) else []


def test_a_table_that_is_written_is_no_constant() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.ones(3, 2, dtype=torch.complex64).clone()
            table.mul_(x[0, 0])
            return torch.view_as_real(table * x[0, 1])

    x = torch.randn(2, 2)
    graph = traced(Written(), x)
    real_tables(graph)
    graph.recompile()
    assert torch.equal(graph(x), Written()(x)) and torch.equal(graph(2 * x), Written()(2 * x))


def test_masks_are_filled_in_logic() -> None:
    class Filled(nn.Module):
        def forward(self, a: Tensor, m: Tensor) -> list[Tensor]:
            return [a.masked_fill(m, True), a.masked_fill(m, False), a.float().masked_fill(m, 2.0)]

    a, m = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    graph = traced(Filled(), a, m)
    logical_fills(graph.graph)
    graph.recompile()
    assert all(torch.equal(got, expected) for got, expected in zip(graph(a, m), Filled()(a, m), strict=True))
    assert len(graph.graph.find_nodes(op="call_function", target=aten.masked_fill.Scalar)) == 1
