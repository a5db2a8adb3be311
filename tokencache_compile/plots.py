"""Pictures of a calibration (the paper's Figs. 3, 8, 9 and 11): where, when and on what the predictor spends the budget.

Every function returns a matplotlib Figure of its own; pyplot's state is neither read nor changed. Blocks and steps count from 0, as
in a :class:`~tokencache_compile.schedule.Schedule`. matplotlib is imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.schedule import Schedule, is_ints

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "viridis"  # perceptually uniform, also in grey
DPI = 150
STEP_LABEL = "sampling step (0 = noisiest)"
BLOCK_LABEL = "block (0 = first)"


class Calibrated(Protocol):
    """What is drawn: statistics of the scores α in (0, 1) over T sampling steps of a model with L blocks and N tokens."""

    @property
    def steps(self) -> int:
        """T."""

    @property
    def samples(self) -> int:
        """Over how many samples the means are."""

    @property
    def ratio(self) -> float:
        """The cache ratio r at which ``share`` was measured."""

    @property
    def last_k(self) -> int:
        """K, the last blocks, never cached."""

    @property
    def alpha(self) -> Tensor:
        """[T, L], mean over samples and tokens."""

    @property
    def share(self) -> Tensor:
        """[T, L - K], keep ratio of every cached block (Eq. 12)."""

    @property
    def examples(self) -> Tensor:
        """[n, T, L, N], α of a few samples."""

    @property
    def images(self) -> Tensor:
        """[n, C, H, W] in [-1, 1], what those samples became; grey (C = 1) or RGB (C = 3)."""

    @property
    def mean_alpha(self) -> Tensor:
        """ᾱ [T] (SPEC section 5)."""


def _array(values: Tensor) -> Any:
    return values.detach().float().cpu().numpy()


def _figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """An empty figure of ``width`` × ``height`` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def _whole_ticks(axis: Any, most: int = 14) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def alpha_figure(calibration: Calibrated) -> Figure:
    """α [T, L] as a heat map, blocks over steps (Fig. 8 e).

    The last K blocks, whose scores decide nothing, stand above a line; the colour scale spans the cached ones.
    """
    from matplotlib.colors import Normalize

    alpha = calibration.alpha
    steps, blocks = alpha.shape
    cached = blocks - calibration.last_k
    deciding = alpha[:, :cached]
    step, block = divmod(int(deciding.argmax()), cached)
    scale = Normalize(float(deciding.min()), float(deciding.max()))
    figure = _figure(8.0, 4.8)
    axes = figure.subplots()
    drawn = axes.imshow(_array(alpha.T), origin="lower", aspect="auto", interpolation="nearest", cmap=COLOURS, norm=scale)
    if calibration.last_k:
        axes.axhline(cached - 0.5, color="white", linewidth=2.0)
        axes.axhline(cached - 0.5, color="black", linewidth=1.0, linestyle="--")
    axes.set(xlabel=STEP_LABEL, ylabel=BLOCK_LABEL)
    never = f" (the last {calibration.last_k}, above the line, are never cached)" if calibration.last_k else ""
    axes.set_title(
        f"Score α of {blocks} blocks over {steps} steps{never}:\n"
        f"highest in cached block {block} at step {step} (mean over {calibration.samples} samples)"
    )
    _whole_ticks(axes.xaxis)
    _whole_ticks(axes.yaxis)
    beyond = not bool(((alpha >= deciding.min()) & (alpha <= deciding.max())).all())
    figure.colorbar(drawn, ax=axes, label="α, mean over samples and tokens (0 to 1)", extend="both" if beyond else "neither")
    return figure


def keep_figure(calibration: Calibrated, keep: Sequence[tuple[int, ...]] | None, tokens: int) -> Figure:
    """Keep ratio of every cached block (Fig. 9 b seen from the other side): measured, and in the static graphs.

    Bars are the shares averaged over steps, whiskers their smallest and largest step; a line is a profile's n_l / N.

    Args:
        keep: keep profiles, each a count n_l of every cached block; None where there are none yet.
        tokens: N, which the counts are of.

    Raises:
        ConfigError: a profile does not fit the calibrated blocks or the tokens.
    """
    share = calibration.share
    blocks = share.shape[1]
    if tokens < 1:
        raise ConfigError(f"tokens={tokens} was asked for; it is the number of tokens of the model, 1 or more.")
    for profile in keep or ():
        if len(profile) != blocks or any(not 0 <= count <= tokens for count in profile):
            raise ConfigError(
                f"keep={profile} was asked for; the calibration has {blocks} cached blocks of {tokens} tokens, "
                f"so a profile is {blocks} counts from 0 to {tokens}. Pass the profiles that were made from this calibration."
            )
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    mean = share.float().mean(0)
    figure = _figure(8.0, 4.6)
    axes = figure.subplots()
    at = range(blocks)
    bars = axes.bar(at, _array(mean), color="#9fb8d0", label="measured, mean over steps")
    ends = _array(share.amin(0)), _array(share.amax(0))
    span = axes.vlines(at, *ends, color="#4a6580", linewidth=1.2, label="measured, range over steps")
    budget = 1.0 - calibration.ratio
    line = axes.axhline(budget, color="black", linewidth=1.0, linestyle=":", label=f"budget 1 − r, {budget:.1%}")
    edges = [block - 0.5 for block in range(blocks + 1)]
    handles: list[Any] = [bars, span, line]
    for index, profile in enumerate(keep or ()):
        colour = colormaps["plasma"](0.6 * index / max(1, len(keep or ()) - 1) + 0.15)
        ratios = [count / tokens for count in profile]
        label = f"profile {index}, static"
        # Unclipped, for half of a line at 0 would be cut off.
        handles.append(axes.stairs(ratios, edges, baseline=None, color=colour, linewidth=2.0, zorder=3, clip_on=False, label=label))
    most, least = int(mean.argmax()), int(mean.argmin())
    axes.set_title(
        f"Kept tokens of each block at cache ratio {calibration.ratio:g}:\n"
        f"{float(mean[least]):.1%} in block {least} to {float(mean[most]):.1%} in block {most} (mean over {calibration.samples} samples)"
    )
    axes.set(xlabel=BLOCK_LABEL, ylabel="keep ratio (% of the block's tokens)", xlim=(-0.75, blocks - 0.25))
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _whole_ticks(axes.xaxis, 28)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def schedule_figure(calibration: Calibrated, schedules: Mapping[str, Schedule]) -> Figure:
    """ᾱ over the steps, and below it one row a schedule with a mark at each of its I-steps (Fig. 3 e, Eq. 13).

    Raises:
        ConfigError: no schedule is given.
    """
    if not schedules:
        raise ConfigError("no schedule was given to draw; name one at least, such as {'every 4': Schedule(4)}.")
    steps, mean = calibration.steps, calibration.mean_alpha
    figure = _figure(8.0, 3.8 + 0.32 * len(schedules))
    curve, rows = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 0.32 * len(schedules) + 0.1])
    curve.plot(range(steps), _array(mean), color="#26547c", marker="o", markersize=3.0)
    curve.set_ylabel("ᾱ (0 to 1)")
    curve.ticklabel_format(axis="y", useOffset=False)
    curve.grid(alpha=0.3)
    curve.set_title(
        f"Mean score ᾱ over cached blocks and tokens is highest at step {int(mean.argmax())}, lowest at step {int(mean.argmin())};\n"
        f"below it the I-steps of each schedule (mean over {calibration.samples} samples)"
    )
    labels = []
    for row, (name, schedule) in enumerate(schedules.items()):
        full = [step for step in range(steps) if schedule.is_full(step)]
        labels.append(f"{name} ({len(full)} of {steps})")
        rows.plot(full, [row] * len(full), "|", color="#c2410c", markersize=13.0, markeredgewidth=2.0)
    rows.set_yticks(range(len(labels)), labels)
    rows.set(xlabel=STEP_LABEL, ylim=(len(labels) - 0.5, -0.5))
    rows.grid(axis="x", alpha=0.3)
    rows.tick_params(axis="y", length=0)
    _whole_ticks(rows.xaxis)
    return figure


def _grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of N tokens that tile an image of ``height`` × ``width`` in square patches."""
    rows = math.isqrt(tokens * height // width)
    columns = tokens // max(1, rows)
    if rows * columns != tokens or rows * width != columns * height:
        raise ConfigError(
            f"a heat map of {tokens} tokens over an image of {height} × {width} was asked for, and {tokens} does not factor into "
            f"rows × columns of that aspect. Only models whose tokens are square patches of the whole image can be drawn so."
        )
    return rows, columns


def _drawn_steps(steps: Sequence[int] | None, of: int) -> tuple[int, ...]:
    if steps is None:
        return tuple(sorted({round(j * (of - 1) / 5) for j in range(6)}))
    drawn = tuple(steps)
    if not drawn or not is_ints(drawn) or not all(0 <= step < of for step in drawn):
        raise ConfigError(f"steps={drawn} was asked for; the calibration has steps 0 to {of - 1}, and one at least is drawn.")
    return drawn


def token_figure(calibration: Calibrated, steps: Sequence[int] | None = None) -> Figure:
    """α of each token, mean over the cached blocks, over the image that its sample became (Figs. 8 d, 11): one row a sample.

    Tokens fill the image's grid row by row. All maps share one colour scale.

    Args:
        steps: the steps to draw; None draws six, evenly spaced from the first to the last.

    Raises:
        ConfigError: there is no example, what the samples became is no grey or RGB image, a step is not a calibrated one, or the
            tokens do not tile the image.
    """
    examples, images = calibration.examples, calibration.images
    drawn = _drawn_steps(steps, calibration.steps)
    if not len(examples):
        raise ConfigError("token heat maps were asked for and the calibration keeps no example sample; calibrate with one at least.")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ConfigError(
            f"token heat maps over images {tuple(images.shape)} were asked for; [n, C, H, W] with C = 1 (grey) or 3 (RGB) can be shown. "
            "Decode latents first: dataclasses.replace(calibration, images=decoded)."
        )
    from matplotlib.colors import Normalize

    height, width = images.shape[-2:]
    rows, columns = _grid(examples.shape[-1], height, width)
    cached = examples.shape[2] - calibration.last_k
    maps = examples[:, list(drawn), :cached].float().mean(2).unflatten(-1, (rows, columns))
    coloured = (images.float() + 1.0).div(2.0).clamp(0.0, 1.0)
    grey = coloured.mean(1)
    scale = Normalize(float(maps.min()), float(maps.max()))
    whole = (0.0, float(width), float(height), 0.0)

    side = 1.35
    figure = _figure(side * (1 + len(drawn)) + 1.0, side * height / width * len(examples) + 1.0, "compressed")
    grid = figure.subplots(len(examples), 1 + len(drawn), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for sample, row in enumerate(grid):
        picture = coloured[sample].permute(1, 2, 0).expand(-1, -1, 3)
        row[0].imshow(_array(picture), extent=whole)
        row[0].set_ylabel(f"sample {sample}")
        for axes, values in zip(row[1:], maps[sample], strict=True):
            # Black to white would drown the map: a range of mid greys shows the shapes.
            axes.imshow(_array(grey[sample]), extent=whole, cmap="gray", vmin=-0.5, vmax=1.5)
            heat = axes.imshow(_array(values), extent=whole, interpolation="nearest", cmap=COLOURS, norm=scale, alpha=0.7)
    for axes, title in zip(grid[0], ["image", *(f"step {step}" for step in drawn)], strict=True):
        axes.set_title(title, fontsize=10)
    bar = figure.colorbar(heat, ax=grid, label="α (0 to 1)", pad=0.02)
    bar.ax.set_facecolor("0.5")  # the bar lies over mid grey, as the maps do
    figure.suptitle(f"Score α of the {rows} × {columns} tokens over the image, mean over the {cached} cached blocks")
    return figure


def write_figures(
    calibration: Calibrated, keep: Sequence[tuple[int, ...]] | None, tokens: int, schedules: Mapping[str, Schedule], out: Path
) -> list[Path]:
    """Write ``alpha.png``, ``keep.png``, ``schedule.png`` and ``tokens.png`` into the folder ``out``; the same input, the same bytes.

    Returns:
        The paths written. Nothing is written where one of the pictures cannot be drawn.

    Raises:
        ConfigError: as the functions above, or ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={str(out)!r} was asked for and is a file; name a folder for the pictures.")
    figures = {
        "alpha": alpha_figure(calibration),
        "keep": keep_figure(calibration, keep, tokens),
        "schedule": schedule_figure(calibration, schedules),
        "tokens": token_figure(calibration),
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return paths
