"""CPU lowering: linears through oneDNN, which beats torch's general matmul most where a P-step is: few rows, cold weights.

Measured on two cores of a Zen 5, float32: 2 rows by [6912, 1152] 4.0 → 1.1 ms, 52 rows by [4608, 1152] 3.7 → 1.8 ms. Compiled
steps take it, and P-steps always; an eager I-step keeps torch's own kernels, because it is the model's own result bit for bit.
Other devices and dtypes are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from tokencache_compile.macs import count_as
from tokencache_compile.passes.regions import Region

_LINEAR = torch.ops.aten.linear.default


# An operator of its own, because inductor takes oneDNN's only for constant weights. Defined by hand and not as a `custom_op`,
# whose checks take as long at every call as a small linear.
_LIBRARY = torch.library.Library("tokencache_compile", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return result


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("linear", onednn_linear, "CPU")
torch.library.register_fake("tokencache_compile::linear", _linear_shape, lib=_LIBRARY)


@count_as(torch.ops.tokencache_compile.linear)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    return x.numel() * weight.shape[0]


def available() -> bool:
    """Whether this torch has oneDNN's linear for plain, unpacked weights; autocast, which chooses dtypes itself, knows nothing of it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not torch.is_autocast_enabled("cpu")


def lower_linears(module: GraphModule) -> GraphModule:
    """A copy of a step graph, weights shared, whose linears and whose regions' linears are oneDNN's."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=_LINEAR):
        x, weight, *bias = node.args
        node.target = torch.ops.tokencache_compile.linear.default
        node.args = (x, weight, bias[0] if bias else None)
    lowered = GraphModule(module, graph)
    for name, region in list(module.named_children()):
        if isinstance(region, Region):
            setattr(lowered, name, Region(lower_linears(region.graph_module)))
    return lowered
