"""The CPU lowering of linears: same numbers, same weights, nothing left behind, and never in an eager I-step."""

from __future__ import annotations

import torch
from tiny import build, inputs

from tokencache_compile.engine import TorchEngine
from tokencache_compile.export import cpu_kernels
from tokencache_compile.passes.pipeline import build_steps
from tokencache_compile.passes.regions import Region
from tokencache_compile.plan import CacheConfig

LINEAR = torch.ops.aten.linear.default


def _graphs(module: torch.fx.GraphModule) -> list[torch.fx.Graph]:
    regions = [child.graph_module for child in module.children() if isinstance(child, Region)]
    return [module.graph, *(region.graph for region in regions)]


def _count(module: torch.fx.GraphModule, target: object) -> int:
    return sum(len(graph.find_nodes(op="call_function", target=target)) for graph in _graphs(module))


def test_lowered_step_gives_the_same_numbers() -> None:
    steps = build_steps(build("dit"), inputs("dit"), CacheConfig(scorer="norm", context="cached"), None)
    given = list(inputs("dit").values())
    device = torch.device("cpu")
    with torch.no_grad():
        caches = steps.full.module(*given, torch.tensor(0.0), *steps.initial_caches(device))[1:]
        plain = steps.cached[0].module(*given, torch.tensor(1.0), *caches)
        lowered = cpu_kernels.lower_linears(steps.cached[0].module)
        results = lowered(*given, torch.tensor(1.0), *caches)
    for got, expected in zip(results, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    linears = _count(steps.cached[0].module, LINEAR)
    assert linears > 0 and _count(lowered, LINEAR) == 0
    assert _count(lowered, torch.ops.tokencache_compile.linear.default) == linears
    assert {p.data_ptr() for p in lowered.parameters()} == {p.data_ptr() for p in steps.cached[0].module.parameters()}


def test_which_steps_are_lowered() -> None:
    """P-steps in float32; an eager I-step never, and nothing in bfloat16."""
    for dtype, expected in ((torch.float32, True), (torch.bfloat16, False)):
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs("dit").items()}
        steps = build_steps(build("dit").to(dtype), given, CacheConfig(), None)
        full, cached = TorchEngine(steps.full, compiled=False), TorchEngine(steps.cached[0], compiled=False)
        assert full.run is steps.full.module
        assert (cached.run is not steps.cached[0].module) == expected
