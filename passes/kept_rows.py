"""Kept rows: the rows of a tensor that a P-step's block works on: the selected tokens, and every row that is not a cached token's."""

from __future__ import annotations

from typing import Any

import torch

from tokencache_compile.ir import Layout, Stream
from tokencache_compile.passes.cache_ops import put_tokens, take_tokens, token_rows


class KeptRows:
    """Takes and puts rows by ``index`` [B, n] into the N cached tokens, whatever else stands on a tensor's token axis.

    Built on ``torch.fx`` proxies: every distinct layout makes its row numbers once.
    """

    def __init__(self, index: Any, stream: Stream, count: int) -> None:
        self.index, self.stream, self.count = index, stream, count
        self._positions: dict[Layout, Any] = {}
        self._rows: dict[Layout, Any] = {}

    def positions(self, layout: Layout) -> Any:
        """Positions [B, before + n + after] on an axis of ``layout``."""
        if layout not in self._positions:
            if not layout.others:
                self._positions[layout] = self.index
            else:
                first, tokens = layout.before, self.stream.tokens
                spans = [(0, first), (first + tokens, first + tokens + layout.after)]
                before, after = (torch.arange(*span, device=self.index.device).expand(self.stream.batch, -1) for span in spans)
                self._positions[layout] = torch.cat([before, self.index + first, after], 1)
        return self._positions[layout]

    def _flat_rows(self, layout: Layout) -> Any:
        if layout not in self._rows:
            self._rows[layout] = token_rows(self.positions(layout), self.stream.batch, self.stream.tokens + layout.others)
        return self._rows[layout]

    def take(self, value: Any, layout: Layout) -> Any:
        """The kept rows [B, before + n + after, …] of ``value`` [B, before + N + after, …]."""
        return take_tokens(value, self._flat_rows(layout), self.stream.batch, self.count + layout.others)

    def put(self, value: Any, new: Any, layout: Layout) -> Any:
        """``value`` with the kept rows replaced by ``new``; the others are bit-identical."""
        return put_tokens(value, self._flat_rows(layout), new, self.stream.batch, self.stream.tokens + layout.others)

    def take_along(self, value: Any, axis: int, has_batch: bool, layout: Layout) -> Any:
        """The kept rows of a tensor whose token axis is ``axis``; without a batch axis those of the first sample."""
        if has_batch:
            return self.take(value.transpose(1, axis), layout).transpose(1, axis)
        return value.index_select(axis, self.positions(layout)[0])
