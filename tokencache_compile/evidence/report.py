"""The page of a bench: one self-contained HTML file, with its charts as PNGs beside it. Figures come from ``bench.json`` alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.chart import Chart, Series, figure, legend, svg
from tokencache_compile.evidence.compare import (
    METRICS,
    Metric,
    Point,
    at_speed_ups,
    best_at,
    failures,
    families,
    front,
    margin,
    points,
    warnings,
)  # fmt: skip
from tokencache_compile.evidence.methods import OURS, SPEED_UPS
from tokencache_compile.evidence.runs import FILE

_STYLE = Path(__file__).with_name("page.css")
_SHOWN_AT = 2.0  # speed-up of the runs whose steps and samples are shown
_DPI = 130


def write_report(folder: Path) -> list[Path]:
    """Write ``report.html`` and the PNGs into the folder of a bench; returns the paths.

    Raises:
        ConfigError: there is no bench, or nothing in it that could be drawn.
    """
    file = folder / FILE
    if not file.exists():
        raise ConfigError(f"{file} was looked for and is not there. Measure first: tokencache bench --out {folder}.")
    result = json.loads(file.read_text())
    found = points(result)
    if not found:
        raise ConfigError(f"{file} has no method with figures of quality yet. Run tokencache bench --out {folder} --phase quality.")
    drawn = charts(result, found)
    page = folder / "report.html"
    page.write_text(_page(result, found, drawn, folder))
    written = [page]
    for chart in drawn:
        written.append(folder / f"{chart.name}.png")
        figure(chart).savefig(written[-1], dpi=_DPI, metadata={"Software": None})
    return written


def charts(result: dict[str, Any], found: Sequence[Point]) -> list[Chart]:
    """Quality over speed by each metric that was measured, and the deviation at each step."""
    drawn = [_quality_chart(result, found, metric) for metric in METRICS if any(p.value(metric) is not None for p in found)]
    chosen = [point for point in shown(found) if "deviation" in point.quality]
    colours = families(found)
    lines = []
    for point in chosen:
        deviation = point.quality["deviation"]
        band = tuple((float(i), m - s, m + s) for i, (m, s) in enumerate(zip(deviation["mean"], deviation["std"], strict=True)))
        line = tuple((float(i), mean) for i, mean in enumerate(deviation["mean"]))
        lines.append(Series(f"{point.name} ({point.speed_up:.2f}×)", colours[point.family], (), line, band))
    if lines:
        title = "Distance from the uncached run at every step"
        drawn.append(Chart("deviation", title, "sampling step (0 = noisiest)", "mean |Δ pred_x0|", tuple(lines), y_from_zero=True))
    return drawn


def _quality_chart(result: dict[str, Any], found: Sequence[Point], metric: Metric) -> Chart:
    series = []
    for family, colour in families(found).items():
        known = [p for p in found if p.family == family and p.value(metric) is not None]
        marks = tuple(
            (p.speed_up, p.quality[metric.key], f"{p.name}: {p.speed_up:.2f}×, {metric.show(p.quality[metric.key])}") for p in known
        )
        if marks:
            line = tuple((p.speed_up, p.quality[metric.key]) for p in front(known, metric))
            series.append(Series(family, colour, marks, line))
    best = tuple((p.speed_up, p.quality[metric.key]) for p in front(found, metric))
    floor = result.get("floors", {}).get(metric.key)
    return Chart(
        f"quality-{metric.key.replace('_', '-')}",
        f"{metric.title} over speed-up ({'higher' if metric.higher else 'lower'} is better)",
        _speed_title(found),
        metric.title,
        tuple(series),
        best,
        tuple((value, f"{value:g}×") for value in SPEED_UPS),
        None if floor is None else (floor, f"floor: as many real images, {metric.show(floor)}"),
    )


def _speed_title(found: Sequence[Point]) -> str:
    measured = any(point.backend is not None for point in found)
    return (
        "measured speed-up over the compiled uncached run"
        if measured
        else "MACs of the uncached run over the method's (no latency measured)"
    )


def shown(found: Sequence[Point]) -> list[Point]:
    """Each family's closest run that is about twice as fast."""
    best = (best_at([p for p in found if p.family == family], METRICS[0], _SHOWN_AT) for family in families(found))
    return [point for point in best if point is not None]


# -- the page ---------------------------------------------------------------------------------------------------------


def _page(result: dict[str, Any], found: Sequence[Point], drawn: Sequence[Chart], folder: Path) -> str:
    subject = result["settings"]["subject"]
    title = f"{subject['model']}: caching methods measured side by side"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(_described(result))}</p>', "<h2>At equal speed</h2>"]
    parts.append(f'<p class="soft">Each method’s best setting that is at least about as fast; {escape(_speed_title(found))}.</p>')
    for metric in METRICS:
        if any(p.value(metric) is not None for p in found) and metric.key != "ssim":
            parts += [f"<h3>{escape(metric.title)}</h3>", _speed_table(found, metric)]
    parts += [f'<p class="warn">{escape(line)}</p>' for line in warnings(found)]
    parts.append("<h2>Quality over speed</h2>")
    for chart in drawn:
        if chart.name == "deviation":
            parts.append("<h2>Step by step</h2><p class='soft'>Mean over samples; the band is one standard deviation.</p>")
        parts += [f"<figure><h3>{escape(chart.title)}</h3>", svg(chart), legend(chart), "</figure>"]
    parts += ["<h2>What is recomputed</h2>", _plans(found), "<h2>Samples</h2>", _samples(result, found, folder)]
    parts += ["<h2>All methods</h2>", _all_rows(result, found), _failed(result), "<h2>Environment</h2>", _environment(result)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    head += f"<title>{escape(title)}</title><style>{_STYLE.read_text()}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _described(result: dict[str, Any]) -> str:
    settings = result["settings"]
    words = [f"{key} {value}" for key, value in settings["subject"].items() if key != "model" and not isinstance(value, dict)]
    if "quality" in settings:
        words.append(f"quality of {settings['quality']['samples']} samples, run {settings['quality']['backend']}")
    if "latency" in settings:
        timed = settings["latency"]
        words.append(f"latency of whole runs of {timed['batch']} samples, median of {timed['rounds']} in turn with the uncached run")
    if "judges" in settings:
        words.append(f"{', '.join(settings['judges']['of'])} of {settings['judges']['samples']} samples, for the settings at equal speed")
    return "; ".join(words) + "."


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{escape(cell)}</th>" for cell in head)}</tr>{"".join(rows)}</table></div>'


def _row(family: str, cells: Sequence[str]) -> str:
    return f'<tr class="{"ours" if family == OURS else "other"}">{"".join(cells)}</tr>'


def _speed_table(found: Sequence[Point], metric: Metric) -> str:
    table = at_speed_ups(found, metric)
    best = [best_at(found, metric, speed) for speed in SPEED_UPS]
    rows = []
    for family, chosen in table:
        cells = [f"<td>{escape(family)}</td>"]
        for point, winner in zip(chosen, best, strict=True):
            if point is None:
                cells.append("<td>–</td>")
                continue
            mark = ' class="best"' if point is winner else ""
            what = escape(point.name.removeprefix(f"{family}: "))
            cells.append(f"<td{mark}>{metric.show(point.quality[metric.key])}<small>{what}, {point.speed_up:.2f}×</small></td>")
        rows.append(_row(family, cells))
    return _table(["", *(f"{speed:g}×" for speed in SPEED_UPS)], rows)


def _plans(found: Sequence[Point]) -> str:
    """Keep ratio of every block, and which steps are full, for this package's methods that are shown."""
    rows = []
    for point in found:
        plan = point.quality.get("plan")
        if not plan or "P" not in plan["kinds"]:
            continue
        shares = [[count / plan["tokens"] for count in profile] for profile in plan["profiles"]]
        text = "; ".join("all blocks " + f"{p[0]:.1%}" if len(set(p)) == 1 else " ".join(f"{share:.0%}" for share in p) for p in shares)
        kinds = "".join("<b>I</b>" if kind == "I" else "·" for kind in plan["kinds"])
        rows.append(
            f'<tr><td>{escape(point.name)}</td><td class="text">{text}</td><td class="text"><span class="steps">{kinds}</span></td></tr>'
        )
    return _table(["", "tokens recomputed in a P-step, block by block", "steps: I in full, · cached"], rows)


def _samples(result: dict[str, Any], found: Sequence[Point], folder: Path) -> str:
    """Strips of the uncached run and of each family at about twice the speed, and their differences to it."""
    first = result.get("uncached", {}).get("picture")
    if not first:
        return '<p class="soft">The samples are no images of 1 or 3 channels.</p>'
    reference = _embedded(folder / first)
    cells = [f'<div>uncached</div><img src="{reference}" alt="uncached samples"><div class="soft">difference, 6 times as bright</div>']
    for point in shown(found):
        own = _embedded(folder / point.quality["picture"])
        psnr = METRICS[0].show(point.quality["psnr_db"]) if point.quality["psnr_db"] is not None else "∞"
        cells.append(f'<div>{escape(point.name)}<br><span class="soft">{point.speed_up:.2f}×, {psnr} dB</span></div>')
        cells.append(f'<img src="{own}" alt="samples of {escape(point.name)}">')
        cells.append(f'<div class="diff"><img src="{reference}" alt=""><img src="{own}" alt="difference to the uncached samples"></div>')
    return f'<div class="strips">{"".join(cells)}</div>'


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _all_rows(result: dict[str, Any], found: Sequence[Point]) -> str:
    metrics = [metric for metric in METRICS if any(p.value(metric) is not None for p in found)]
    head = ["method", "speed-up", *(m.title for m in metrics), "PSNR margin over fewer steps", "GMACs", "by the paper’s count"]
    head += ["backend", "median, s", "p90, s", "compiled in, s", "peak memory, MiB"]
    rows = []
    for point in sorted(found, key=lambda p: p.speed_up):
        by = margin(point, found, METRICS[0])
        values = [point.value(metric) for metric in metrics]
        cells = [f"{point.speed_up:.2f}×", *("–" if v is None else m.show(v) for m, v in zip(metrics, values, strict=True))]
        cells += ["–" if by is None else f"{by:+.1f}", f"{point.quality['macs'] / 1e9:.2f}", f"{point.quality['paper_macs'] / 1e9:.2f}"]
        note = result["rows"][point.name]["note"]
        name = f'<td title="{escape(note)}">{escape(point.name)}{" *" if note else ""}</td>'
        timings = {k: v for k, v in result["rows"][point.name]["latency"].items() if "failed" not in v}
        columns = [[], [], [], [], []]  # type: list[list[str]]
        for backend, timing in timings.items():
            peak = timing["peak_bytes"]
            texts = (
                backend,
                f"{timing['seconds']:.3f}",
                f"{timing['p90']:.3f}",
                f"{timing['compile_seconds']:.1f}",
                "–" if peak is None else f"{peak / 2**20:.1f}",
            )
            for column, text in zip(columns, texts, strict=True):
                column.append(text)
        cells += ["<br>".join(column) or "–" for column in columns]
        rows.append(_row(point.family, [name, *(f"<td>{cell}</td>" for cell in cells)]))
    return (
        _table(head, rows) + '<p class="soft">* switched on with help that its users would not need on a model it lists: see the title.</p>'
    )


def _failed(result: dict[str, Any]) -> str:
    found = failures(result)
    if not found:
        return ""
    rows = [f'<tr><td>{escape(name)}</td><td class="text">{escape(why[:200])}</td></tr>' for name, why in found.items()]
    return "<h3>Failed</h3>" + _table(["method", "error"], rows)


def _environment(result: dict[str, Any]) -> str:
    machines = result["environment"]
    rows = []
    for key in dict.fromkeys(key for machine in machines.values() for key in machine):
        cells = (f'<td class="text">{escape(str(machine.get(key, "–")))}</td>' for machine in machines.values())
        rows.append(f"<tr><td>{escape(key)}</td>{''.join(cells)}</tr>")
    return _table(["", *(f"{phase} phase" for phase in machines)], rows)
