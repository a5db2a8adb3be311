"""The inductor backend: one ``torch.compile`` frame a step graph, without a break.

The regions of the graph are nested compile regions, so compile time follows the number of distinct block bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule


def compile_step(module: GraphModule) -> Callable[..., Any]:
    """Compile a step graph; shapes are static, a graph break is an error."""
    compiled: Callable[..., Any] = torch.compile(module, fullgraph=True, dynamic=False)
    return compiled
