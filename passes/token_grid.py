"""Token grid: how the cached tokens lie in the image, which scores that compare neighbours need to know."""

from __future__ import annotations

from math import isqrt

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import Capture, Stream


def image_grid(captured: Capture, tokens: int) -> tuple[int, int] | None:
    """Rows and columns of ``tokens`` square patches of the sample; None where that is no batch of images [B, C, H, W]."""
    shapes = [captured.example_inputs[position].shape for position in captured.sample_inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        return None
    height, width = shapes[0][2:]
    patch = max(1, isqrt(height * width // tokens))
    return (height // patch, width // patch) if height * width == tokens * patch**2 and not (height % patch or width % patch) else None


def grid_of_cells(where: str, stream: Stream, cell: int, scorer: str) -> tuple[int, int]:
    """The grid of ``stream``, which ``scorer`` divides into cells of ``cell`` × ``cell`` tokens, at the block called ``where``.

    Raises:
        UnsupportedModelError: the grid is not known, or cannot be divided so.
    """
    if stream.grid is None or any(length % cell for length in stream.grid):
        found = "on no known grid" if stream.grid is None else f"on a grid of {stream.grid[0]} × {stream.grid[1]}"
        raise UnsupportedModelError(
            where,
            f'scorer="{scorer}" divides an image into cells of {cell} × {cell} tokens, and its {stream.tokens} tokens lie {found}',
            'Use scorer="random" or another.',
        )
    return stream.grid
