"""One description of a chart, drawn twice: as inline SVG that follows the page's light or dark colours, and as a PNG by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By series, on white (page.css has them for dark too); the shapes differ too, so that colour is never all that tells two series apart.
LIGHT = (
    "#1f5fbf", "#c9382f", "#1d7f4f", "#a66f00", "#7443b8", "#0b7c8c", "#b83b8a", "#5d6675", "#855021",
    "#5c7a00", "#00559a", "#d0590f", "#4b3b8f",
)  # fmt: skip
_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "d", "p", "h", "8")  # matplotlib's names
_PATHS = {  # the same in SVG, about the origin
    "o": "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0Z",
    "s": "M-4,-4H4V4H-4Z",
    "^": "M0,-5L5,4H-5Z",
    "D": "M0,-5.5L5,0L0,5.5L-5,0Z",
    "v": "M0,5L5,-4H-5Z",
    "P": "M-1.8,-5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5V-1.8H-1.8Z",
    "X": "M-4.5,-2.5L-2.5,-4.5L0,-2L2.5,-4.5L4.5,-2.5L2,0L4.5,2.5L2.5,4.5L0,2L-2.5,4.5L-4.5,2.5L-2,0Z",
    "<": "M-5,0L4,-5V5Z",
    ">": "M5,0L-4,-5V5Z",
    "d": "M0,-5.5L3,0L0,5.5L-3,0Z",
    "p": "M0,-5L4.8,-1.5L2.9,4H-2.9L-4.8,-1.5Z",
    "h": "M0,-5L4.3,-2.5V2.5L0,5L-4.3,2.5V-2.5Z",
    "8": "M-2,-4.8H2L4.8,-2V2L2,4.8H-2L-4.8,2V-2Z",
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 420, 80, 16, 12, 46


@dataclass(frozen=True)
class Series:
    """One colour and shape.

    Attributes:
        index: which colour and shape; where the colours begin anew, each goes with another shape.
        marks: x, y and a title that shows under the pointer.
        line: x and y of a line, in order.
        band: x, lower and upper end of a band behind it.
    """

    name: str
    index: int
    marks: tuple[tuple[float, float, str], ...] = ()
    line: tuple[tuple[float, float], ...] = ()
    band: tuple[tuple[float, float, float], ...] = ()

    @property
    def colour(self) -> int:
        return self.index % len(LIGHT)

    @property
    def shape(self) -> str:
        return _SHAPES[(self.index + self.index // len(LIGHT)) % len(_SHAPES)]


@dataclass(frozen=True)
class Chart:
    """Series over two linear axes.

    Attributes:
        name: of the PNG and of the SVG's id.
        front: a line behind all series, with its name.
        verticals: x of dotted lines, with their labels; ``horizontal`` is y of one.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    front: tuple[tuple[float, float], ...] = ()
    verticals: tuple[tuple[float, str], ...] = ()
    horizontal: tuple[float, str] | None = None
    y_from_zero: bool = False

    @property
    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Ends of both axes: of marks, lines and bands, with a margin."""
        bands = [(x, y) for s in self.series for x, *ends in s.band for y in ends]
        drawn = [(x, y) for s in self.series for x, y in (*((x, y) for x, y, _ in s.marks), *s.line)] + bands
        xs, ys = [x for x, _ in drawn], [y for _, y in drawn]
        ys += [self.horizontal[0]] if self.horizontal else []
        low, high = _padded(ys)
        return _padded(xs), (0.0 if self.y_from_zero else low, high)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers between ``low`` and ``high``, some ``about`` of them."""
    raw = (high - low) / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = scale * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def svg(chart: Chart) -> str:
    """The chart as an SVG element; colours are the page's classes ``c0`` … ``c8``."""
    (x_low, x_high), (y_low, y_high) = chart.limits
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> str:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT)
        return f"{across:.1f},{bottom - (y - y_low) / (y_high - y_low) * (bottom - _TOP):.1f}"

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(at(x, y) for x, y in points)

    def across(x: float) -> str:
        return at(x, y_low).partition(",")[0]

    def height(y: float) -> str:
        return at(x_low, y).partition(",")[2]

    frame = f'x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}"'
    parts = [
        f'<svg class="chart" id="{chart.name}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        f'<clipPath id="clip-{chart.name}"><rect {frame}/></clipPath>',
    ]
    for y in ticks(y_low, y_high):
        parts.append(f'<path class="grid" d="M{_LEFT},{height(y)}H{right}"/>')
        parts.append(_text("tick", _LEFT - 8, height(y), f"{y:g}", "end", 4))
    for x in ticks(x_low, x_high, 9):
        parts.append(f'<path class="grid" d="M{across(x)},{_TOP}V{bottom}"/>')
        parts.append(_text("tick", across(x), bottom + 18, f"{x:g}", "middle"))
    parts.append(_text("label", (_LEFT + right) / 2, _HEIGHT - 6, chart.x_label, "middle"))
    parts.append(f'<g transform="translate(16,{(_TOP + bottom) / 2}) rotate(-90)">{_text("label", 0, 0, chart.y_label, "middle")}</g>')
    parts.append(f'<g clip-path="url(#clip-{chart.name})">')
    for x, label in chart.verticals:
        parts.append(f'<path class="target" d="M{across(x)},{_TOP}V{bottom}"/>')
        parts.append(_text("tick", float(across(x)) + 4, _TOP + 12, label))
    if chart.horizontal:
        parts.append(f'<path class="target" d="M{_LEFT},{height(chart.horizontal[0])}H{right}"/>')
        parts.append(_text("tick", right - 6, height(chart.horizontal[0]), chart.horizontal[1], "end", -5))
    if chart.front:
        parts.append(f'<path class="front" d="{path(chart.front)}"/>')
    for series in chart.series:
        if series.band:
            outline = [(x, low) for x, low, _ in series.band] + [(x, high) for x, _, high in reversed(series.band)]
            parts.append(f'<path class="band c{series.colour}" d="{path(outline)}Z"/>')
    for series in chart.series:
        if series.line:
            parts.append(f'<path class="line c{series.colour}" d="{path(series.line)}"><title>{escape(series.name)}</title></path>')
    for series in chart.series:
        shape = _PATHS[series.shape]
        parts += [
            f'<path class="mark c{series.colour}" transform="translate({at(x, y)})" d="{shape}"><title>{escape(title)}</title></path>'
            for x, y, title in series.marks
        ]
    return "".join([*parts, "</g></svg>"])


def _text(style: str, x: float | str, y: float | str, words: str, anchor: str = "start", lower: int = 0) -> str:
    """``words`` at a place, ``lower`` pixels below it."""
    return f'<text class="{style}" x="{x}" y="{y}" dy="{lower}" text-anchor="{anchor}">{escape(words)}</text>'


def legend(chart: Chart) -> str:
    """The names of the series, in HTML."""
    entries = []
    for series in chart.series:
        key = f'<path class="mark c{series.colour}" d="{_PATHS[series.shape]}"/>'
        entries.append(f'<span><svg class="key" viewBox="-7 -7 14 14">{key}</svg>{escape(series.name)}</span>')
    if chart.front:
        entries.append('<span><svg class="key" viewBox="0 -7 14 14"><path class="front" d="M0,0H14"/></svg>Pareto front</span>')
    return f'<p class="legend">{"".join(entries)}</p>'


def figure(chart: Chart) -> Figure:
    """The chart as a matplotlib figure, in the light colours."""
    from matplotlib.figure import Figure as New

    drawn = New(figsize=(9.0, 5.2), layout="constrained")
    axes: Any = drawn.subplots()
    if chart.front:
        axes.plot(*zip(*chart.front, strict=True), color="#9aa3b0", linewidth=7, alpha=0.35, solid_capstyle="round", label="Pareto front")
    for series in chart.series:
        colour, shape = LIGHT[series.colour], series.shape
        if series.band:
            axes.fill_between(*zip(*series.band, strict=True), color=colour, alpha=0.12, linewidth=0)
        if series.line:
            axes.plot(*zip(*series.line, strict=True), color=colour, linewidth=1.6, label=None if series.marks else series.name)
        if series.marks:
            axes.scatter(
                [x for x, *_ in series.marks],
                [y for _, y, _ in series.marks],
                color=colour,
                marker=shape,
                s=34,
                zorder=3,
                label=series.name,
            )
    (x_low, x_high), (y_low, y_high) = chart.limits
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label, xlim=(x_low, x_high), ylim=(y_low, y_high))
    for x, label in chart.verticals:
        axes.axvline(x, color="#9aa3b0", linewidth=0.8, linestyle=":")
        axes.annotate(label, (x, y_high), (3, -10), textcoords="offset points", fontsize=8, color="#5d6675")
    if chart.horizontal:
        axes.axhline(chart.horizontal[0], color="#9aa3b0", linewidth=0.8, linestyle=":")
        axes.annotate(
            chart.horizontal[1], (x_high, chart.horizontal[0]), (-4, 4), textcoords="offset points", fontsize=8, color="#5d6675", ha="right"
        )
    axes.grid(alpha=0.25)
    drawn.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return drawn
