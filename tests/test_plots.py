"""The pictures of a calibration: what is drawn is read back from the axes, or from the pixels."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.plots import alpha_figure, keep_figure, schedule_figure, token_figure, write_figures
from tokencache_compile.schedule import Schedule

STEPS, BLOCKS, LAST_K = 7, 5, 2
CACHED = BLOCKS - LAST_K


@dataclass(frozen=True)
class Measured:
    alpha: Tensor
    share: Tensor
    examples: Tensor
    images: Tensor
    steps: int = STEPS
    samples: int = 256
    ratio: float = 0.75
    last_k: int = LAST_K

    @property
    def mean_alpha(self) -> Tensor:
        return self.alpha[:, :CACHED].mean(1)


def measured(samples: int = 2, tokens: int = 16, channels: int = 3, height: int = 8, width: int = 8) -> Measured:
    """Random values throughout, so that nothing drawn in the wrong place is right by chance."""
    draw = torch.Generator().manual_seed(0)
    return Measured(
        torch.rand(STEPS, BLOCKS, generator=draw, dtype=torch.float64),
        torch.rand(STEPS, CACHED, generator=draw, dtype=torch.float64) / 2,
        torch.rand(samples, STEPS, BLOCKS, tokens, generator=draw).half(),
        torch.rand(samples, channels, height, width, generator=draw) * 2 - 1,
    )


def drawn(image: Any) -> list[Any]:
    rows: list[Any] = np.asarray(image.get_array()).tolist()
    return rows


def pixels(figure: Figure) -> Callable[[Any, float, float], list[int]]:
    """Draws the figure; the RGB that stands in it at a share ``x`` from the left and ``y`` from the top of the given axes."""
    canvas: Any = FigureCanvasAgg(figure)  # parts of it have no types
    canvas.draw()
    buffer = np.asarray(canvas.buffer_rgba())

    def at(axes: Any, x: float, y: float) -> list[int]:
        box = axes.get_window_extent()
        colour: list[int] = buffer[round(buffer.shape[0] - box.y1 + y * box.height), round(box.x0 + x * box.width), :3].tolist()
        return colour

    return at


def test_alpha_is_drawn_with_steps_to_the_right_and_blocks_upwards() -> None:
    alpha = torch.full((STEPS, BLOCKS), 0.25)
    alpha[4, 1] = 0.75
    figure = alpha_figure(replace(measured(), alpha=alpha))
    axes = figure.axes[0]
    assert drawn(axes.images[0]) == alpha.T.tolist()
    at = pixels(figure)
    found = {(s, b): at(axes, (s + 0.5) / STEPS, 1 - (b + 0.5) / BLOCKS) for s in range(STEPS) for b in range(BLOCKS)}
    hot = found.pop((4, 1))
    cold = list(found.values())
    assert hot != cold[0] and all(colour == cold[0] for colour in cold)
    assert "step" in axes.get_xlabel() and "block" in axes.get_ylabel() and "α" in figure.axes[1].get_ylabel()
    assert "block 1 at step 4" in axes.get_title()


def test_a_line_parts_the_blocks_never_cached_and_the_colours_span_the_others() -> None:
    alpha = torch.rand(STEPS, BLOCKS, generator=torch.Generator().manual_seed(0)) * 0.01
    alpha[2, 0], alpha[5, 2] = 0.0, 0.015
    alpha[:, CACHED:] = 0.5
    axes = alpha_figure(replace(measured(), alpha=alpha)).axes[0]
    assert [np.asarray(line.get_ydata()).tolist() for line in axes.lines] == [[CACHED - 0.5] * 2] * 2
    assert axes.images[0].get_clim() == pytest.approx((0.0, 0.015))
    assert "block 2 at step 5" in axes.get_title() and f"last {LAST_K}" in axes.get_title()

    axes = alpha_figure(replace(measured(), alpha=alpha, last_k=0)).axes[0]
    assert not len(axes.lines) and axes.images[0].get_clim() == (0.0, 0.5) and "never" not in axes.get_title()


def test_the_colour_bar_says_whether_blocks_never_cached_lie_beyond_it() -> None:
    within = torch.rand(STEPS, BLOCKS, generator=torch.Generator().manual_seed(0)) * 0.5
    within[0, 0], within[0, 1] = 0.0, 0.5
    beyond = within.clone()
    beyond[3, BLOCKS - 1] = 0.9
    bars = [alpha_figure(replace(measured(), alpha=alpha)).axes[0].images[0].colorbar for alpha in (within, beyond)]
    assert [bar.extend for bar in bars if bar] == ["neither", "both"]


def test_bars_are_the_shares_averaged_over_steps_and_whiskers_their_range() -> None:
    given = measured()
    figure = keep_figure(given, None, 16)
    axes = figure.axes[0]
    columns = [[float(given.share[step, block]) for step in range(STEPS)] for block in range(CACHED)]
    bars: list[Any] = list(axes.patches)
    assert [bar.get_height() for bar in bars] == pytest.approx([sum(column) / STEPS for column in columns])
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1, 2])
    whiskers: Any = axes.collections[0]
    ends = [value for segment in whiskers.get_segments() for point in segment for value in point]
    assert ends == pytest.approx([value for block, column in enumerate(columns) for value in (block, min(column), block, max(column))])
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [0.25, 0.25]  # 1 − r
    assert "%" in axes.get_ylabel()


def test_every_profile_is_a_step_line_of_its_counts_by_n() -> None:
    figure = keep_figure(measured(), [(0, 4, 8), (16, 2, 1)], 16)
    stairs: list[Any] = [patch for patch in figure.axes[0].patches if hasattr(patch, "get_data")]
    assert [patch.get_data().values.tolist() for patch in stairs] == [[0.0, 0.25, 0.5], [1.0, 0.125, 0.0625]]
    assert all(patch.get_data().edges.tolist() == [-0.5, 0.5, 1.5, 2.5] for patch in stairs)
    assert stairs[0].get_edgecolor() != stairs[1].get_edgecolor()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 5 and "profile 0" in texts[3] and "profile 1" in texts[4]


@pytest.mark.parametrize(
    ("keep", "tokens", "said"),
    [
        ([(1, 2)], 16, r"keep=\(1, 2\).* 3 cached blocks of 16 tokens"),
        ([(1, 2, 3), (1, 2, 3, 4, 5)], 16, r"keep=\(1, 2, 3, 4, 5\)"),
        ([(1, 2, 17)], 16, "counts from 0 to 16"),
        ([(1, 2, -1)], 16, "counts from 0 to 16"),
        (None, 0, "tokens=0 was asked for"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(keep: list[tuple[int, ...]] | None, tokens: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        keep_figure(measured(), keep, tokens)


def test_the_schedule_is_the_curve_with_a_row_of_full_steps_below_for_each_name() -> None:
    given = measured()
    figure = schedule_figure(given, {"listed": Schedule(9, (0, 1, 5)), "every third": Schedule(3)})
    curve, rows = figure.axes
    (line,) = curve.lines
    assert np.asarray(line.get_xdata()).tolist() == list(range(STEPS))
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([sum(row[:CACHED]) / CACHED for row in given.alpha.tolist()])
    marks = [(np.asarray(line.get_xdata()).tolist(), set(np.asarray(line.get_ydata()).tolist())) for line in rows.lines]
    assert marks == [([0, 1, 5], {0}), ([0, 3, 6], {1})]
    assert [label.get_text() for label in rows.get_yticklabels()] == ["listed (3 of 7)", "every third (3 of 7)"]
    first, second = (rows.transData.transform((0, y))[1] for y in (0, 1))
    assert first > second  # the first named stands on top
    assert curve.get_xlim() == rows.get_xlim()  # a mark is below its point of the curve


def test_no_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="no schedule was given"):
        schedule_figure(measured(), {})


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 8), (6, 3)])
def test_a_hot_token_lies_over_its_patch_of_the_image(rows: int, columns: int) -> None:
    row, column = rows - 2, columns - 1
    examples = torch.zeros(1, STEPS, BLOCKS, rows * columns)
    examples[..., row * columns + column] = 1.0
    images = torch.zeros(1, 3, rows * 4, columns * 4)
    images[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 1.0
    figure = token_figure(replace(measured(), examples=examples.half(), images=images), steps=[3])
    at = pixels(figure)
    for axes in figure.axes[:2]:
        box = axes.get_window_extent()
        assert box.height / box.width == pytest.approx(rows / columns, rel=0.02)
        cells = {(r, c): at(axes, (c + 0.5) / columns, (r + 0.5) / rows) for r in range(rows) for c in range(columns)}
        hot = cells.pop((row, column))
        cold = next(iter(cells.values()))
        assert hot != cold and all(colour == cold for colour in cells.values())


@pytest.mark.parametrize("channels", [1, 3])
def test_each_row_is_an_image_and_its_tokens_at_the_steps_on_one_scale(channels: int) -> None:
    given = measured(channels=channels)
    steps = [5, 0, 6]
    figure = token_figure(given, steps)
    axes = figure.axes[:8]
    assert [a.get_title() for a in axes[:4]] == ["image", "step 5", "step 0", "step 6"]
    lowest, highest = math.inf, -math.inf
    for sample in range(2):
        picture, *maps = axes[4 * sample : 4 * sample + 4]
        rgb = [c if channels == 3 else 0 for c in range(3)]
        wanted = torch.stack([(given.images[sample, c] + 1) / 2 for c in rgb], -1)
        torch.testing.assert_close(torch.tensor(drawn(picture.images[0])), wanted)
        for step, over in zip(steps, maps, strict=True):
            grey, heat = over.images
            torch.testing.assert_close(torch.tensor(drawn(grey)), wanted.mean(-1))
            values = [sum(float(given.examples[sample, step, block, n]) for block in range(CACHED)) / CACHED for n in range(16)]
            assert drawn(heat) == [pytest.approx(values[r * 4 : r * 4 + 4], rel=1e-5) for r in range(4)]
            lowest, highest = min(lowest, *values), max(highest, *values)
    scales = {over.images[1].get_clim() for a in (axes[1:4], axes[5:8]) for over in a}
    assert len(scales) == 1 and scales.pop() == pytest.approx((lowest, highest), rel=1e-5)


def test_six_even_steps_are_drawn_by_default() -> None:
    def titles(steps: int) -> list[str]:
        given = replace(measured(1), steps=steps, examples=torch.zeros(1, steps, BLOCKS, 16))
        return [axes.get_title() for axes in token_figure(given).axes[1:-1]]

    assert titles(51) == ["step 0", "step 10", "step 20", "step 30", "step 40", "step 50"]
    assert titles(3) == ["step 0", "step 1", "step 2"]
    assert titles(1) == ["step 0"]


def test_the_scores_of_an_untrained_head_are_drawn_on_the_colour_that_the_bar_gives_them() -> None:
    given = replace(measured(1), examples=torch.full((1, STEPS, BLOCKS, 16), 0.5), images=torch.zeros(1, 1, 8, 8))
    figure = token_figure(given, [0])
    at = pixels(figure)
    _, over, bar = figure.axes
    lowest, highest = bar.get_ylim()
    assert lowest < 0.5 < highest
    colours = np.array([at(over, 0.5, 0.5), at(bar, 0.5, (highest - 0.5) / (highest - lowest))])
    assert np.abs(colours[0] - colours[1]).max() <= 4  # of 255


@pytest.mark.parametrize("steps", [[], [7], [-1], [1.5], [True]])
def test_steps_that_were_not_calibrated_are_refused(steps: Sequence[int]) -> None:
    with pytest.raises(ConfigError, match=r"steps=.* was asked for; the calibration has steps 0 to 6"):
        token_figure(measured(), steps)


@pytest.mark.parametrize(
    ("tokens", "height", "width"),
    [(15, 8, 8), (32, 8, 8), (16, 8, 16), (12, 8, 16), (3, 1, 64)],  # the last: not a whole row of tokens
)
def test_tokens_that_do_not_tile_the_image_are_refused(tokens: int, height: int, width: int) -> None:
    with pytest.raises(ConfigError, match=rf"{tokens} tokens over an image of {height} × {width}.*does not factor"):
        token_figure(measured(1, tokens, 1, height, width))


def test_a_calibration_without_examples_has_no_token_maps() -> None:
    with pytest.raises(ConfigError, match="keeps no example sample"):
        token_figure(measured(samples=0))


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 2, 8, 8), (2, 3, 5, 8, 8), (2, 8, 8)])
def test_latents_and_videos_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"images \(2, .*C = 1 \(grey\) or 3 \(RGB\).*Decode latents"):
        token_figure(replace(measured(), images=torch.zeros(shape)))


def write(out: Path, given: Measured | None = None) -> list[Path]:
    return write_figures(given or measured(), [(2, 4, 8)], 16, {"every third": Schedule(3)}, out)


def test_four_pictures_of_the_figures_size_are_written(tmp_path: Path) -> None:
    paths = write(tmp_path / "a" / "b")
    assert paths == [tmp_path / "a" / "b" / f"{name}.png" for name in ("alpha", "keep", "schedule", "tokens")]
    inches = [(8.0, 4.8), (8.0, 4.6), (8.0, 3.8 + 0.32), (1.35 * 7 + 1, 1.35 * 2 + 1)]
    for path, size in zip(paths, inches, strict=True):
        with Image.open(path) as image:
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert image.size == pytest.approx([150 * side for side in size], abs=60)  # a tight box moves the edges a little
            extrema: Any = image.convert("RGB").getextrema()
            assert all(low < high for low, high in extrema)


def test_the_same_calibration_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    first, again = write(tmp_path / "first"), write(tmp_path / "again")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    given = measured()
    halved = replace(given, alpha=given.alpha / 2, share=given.share / 2, examples=given.examples / 2)
    others = write(tmp_path / "others", halved)
    assert all(path.read_bytes() != other.read_bytes() for path, other in zip(first, others, strict=True))


def test_pictures_are_made_without_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    assert len(write(tmp_path)) == 4


def test_no_pyplot_figure_is_left_open(tmp_path: Path) -> None:
    from matplotlib import pyplot

    write(tmp_path)
    assert pyplot.get_fignums() == []


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_is_written_where_a_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not factor"):
        write(tmp_path / "out", measured(tokens=15))
    assert not (tmp_path / "out").exists()
