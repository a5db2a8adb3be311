"""``tokencache report`` in a real browser: nothing on its console, every chart, table and picture laid out, in light and dark."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from typer.testing import CliRunner

from tokencache_compile.cli import app
from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence import chart
from tokencache_compile.evidence.chart import LIGHT, Series
from tokencache_compile.evidence.methods import FEWER, OURS, RANDOM
from tokencache_compile.evidence.report import write_report

STEPS, BLOCKS = 12, 4
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "<script>console.error('named')</script> & <b>peer</b>"
# Runs in the page of the test alone: the report itself has no script.
MEASURE = """<script>addEventListener("load", () => {
  const box = (element) => { const b = element.getBoundingClientRect(); return [b.width, b.height]; };
  const boxes = (what) => [...document.querySelectorAll(what)].map(box);
  const style = getComputedStyle(document.body);
  const found = {charts: boxes("svg.chart"), marks: boxes("svg.chart path.mark"), lines: boxes("svg.chart path.line"),
    pictures: [...document.images].map((i) => i.naturalWidth), width: document.documentElement.scrollWidth, view: innerWidth,
    text: [style.color, style.backgroundColor], scripts: document.scripts.length};
  const out = document.createElement("pre"); out.id = "measured"; out.textContent = JSON.stringify(found); document.body.append(out);
});</script>"""


def browser() -> str:
    """Chromium. `make test` installs it where it can; without one the test is skipped, but not where tests decide about a change."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None and "CI" in os.environ:
        pytest.fail("no Chromium is here, which the report must be looked at in: apt-get install chromium")
    return found or pytest.skip("no Chromium is here: apt-get install chromium")


def row(folder: Path, name: str, family: str, steps: int, speed: float, psnr: float) -> dict[str, Any]:
    picture = f"samples/{re.sub('[^a-z0-9]+', '-', name.lower())}.png"
    Image.new("L", (160, 32), int(psnr)).save(folder / picture)
    quality: dict[str, Any] = {"psnr_db": psnr, "ssim": 0.9, "macs": 2e9 / speed, "paper_macs": 2.1e9 / speed, "macs_share": 1 / speed}
    quality |= {"plan": None, "picture": picture}
    if steps == STEPS:
        means = [0.01 * abs(math.sin(step)) * speed for step in range(STEPS)]
        quality |= {"deviation": {"mean": means, "std": [0.2 * mean for mean in means]}, "pred_x0_mae": sum(means) / STEPS}
    if family == OURS:
        kinds = "IPP" * (STEPS // 3)
        quality["plan"] = {"config": {}, "tokens": 64, "profiles": [[6] * BLOCKS], "kinds": kinds, "cache_bytes": 1e6}
    timed = {"seconds": 1 / speed, "p90": 1.1 / speed, "speed_up": speed, "compile_seconds": 3.0, "peak_bytes": 2**20}
    note = "by hand" if family == HOSTILE else ""
    return {"family": family, "steps": steps, "note": note, "quality": quality, "latency": {"inductor": timed}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench's folder as ``run_bench`` leaves it, with a name that would be markup and a method that failed."""
    path = tmp_path_factory.mktemp("bench")
    (path / "samples").mkdir()
    Image.new("L", (160, 32), 90).save(path / "samples" / "uncached.png")
    rows = {f"fewer steps: {n}": row(path, f"fewer steps: {n}", FEWER, n, STEPS / n, 44.0 - 2 * STEPS / n) for n in (3, 4, 6, 8)}
    for every in (2, 3, 4):
        rows[f"random, every {every}"] = row(path, f"random, every {every}", RANDOM, STEPS, 0.8 * every, 40.0 - every)
        rows[f"ours: every {every}"] = row(path, f"ours: every {every}", OURS, STEPS, 0.9 * every, 46.0 - 2 * every)
    rows[HOSTILE] = row(path, HOSTILE, HOSTILE, STEPS, 1.7, 30.0)
    failed = {"failed": "RuntimeError: <img src=x onerror=console.error(1)>"}
    rows["failed"] = {"family": "failed", "steps": STEPS, "note": "", "quality": failed, "latency": {"eager": failed}}
    settings = {"quality": {"samples": 8, "backend": "eager"}, "latency": {"batch": 2, "rounds": 3}}
    content: dict[str, Any] = {"format": 1, "settings": {"subject": {"model": "tiny", "steps": STEPS}} | settings, "rows": rows}
    content |= {"environment": {"quality": {"cpu": "one"}, "latency": {"cpu": "one"}}}
    content |= {"uncached": {"picture": "samples/uncached.png"}, "floors": {}}
    (path / "bench.json").write_text(json.dumps(content))
    result = CliRunner().invoke(app, ["report", str(path)])
    assert result.exit_code == 0, result.output
    return path


def opened(page: Path, scratch: Path, width: int, dark: bool) -> tuple[dict[str, Any], list[str]]:
    """What the browser laid out of ``page``, and what it wrote to its console."""
    copy = scratch / "page.html"
    copy.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={scratch / 'profile'}",
        "--enable-logging=stderr", "--v=0", f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=2000", "--dump-dom",
    ]  # fmt: skip
    run = subprocess.run([browser(), *options, copy.as_uri()], check=False, capture_output=True, text=True, timeout=240)
    measured = re.search(r'<pre id="measured">(.*?)</pre>', run.stdout)
    assert measured, run.stderr[-2000:]
    return json.loads(measured[1]), [line for line in run.stderr.splitlines() if ":CONSOLE" in line]


def test_the_console_is_read(tmp_path: Path) -> None:
    """The next tests would see an error on the console, and a page without charts."""
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><body><script>console.error('seen')</script></body>")
    found, console = opened(page, tmp_path, 1100, dark=False)
    assert len(console) == 1 and "seen" in console[0] and not found["charts"]


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (600, True)])
def test_the_report_opens_in_a_browser(folder: Path, tmp_path: Path, width: int, dark: bool) -> None:
    found, console = opened(folder / "report.html", tmp_path, width, dark)
    assert console == []
    assert found["scripts"] == 1  # the test's own: neither the page's nor one out of a method's name
    assert len(found["charts"]) == 4 and all(w > 0.8 * (width - 60) and h > 150 for w, h in found["charts"])  # three metrics, and the steps
    methods = 4 + 3 + 3 + 1  # marks: PSNR and SSIM of all, deviation of those with all steps
    assert len(found["marks"]) == 2 * methods + (methods - 4) and all(w > 3 and h > 3 for w, h in found["marks"])
    assert found["lines"] and found["pictures"] and all(found["pictures"])
    assert found["width"] <= found["view"]
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in found["text"]]
    assert (lightness[0] > lightness[1] + 300) if dark else (lightness[1] > lightness[0] + 300)


class Links(HTMLParser):
    """Every address that a page loads or leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data", "action")]


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert links.found and all(link.startswith("data:") for link in links.found)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    for name in ("RuntimeError", "by hand", "ours: every 2", "&lt;script&gt;"):
        assert name in text


def test_marks_stand_where_the_figures_are(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    drawing = re.search(r'<svg class="chart" id="quality-psnr-db".*?</svg>', text, re.DOTALL)
    assert drawing
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    places: dict[str, tuple[float, float]] = {}
    for mark in ElementTree.fromstring(drawing[0]).iter("path"):
        title = mark.find("title")
        if mark.get("class", "").startswith("mark") and title is not None and title.text:
            name = title.text.rpartition(": ")[0]
            x, y = map(float, re.findall(r"[-\d.]+", mark.get("transform", "")))
            places[name] = (x, y)
    known = {name: row for name, row in rows.items() if "psnr_db" in row["quality"]}
    assert places.keys() == known.keys()
    first, second = "fewer steps: 3", "ours: every 2"
    figures = {name: (row["latency"]["inductor"]["speed_up"], row["quality"]["psnr_db"]) for name, row in known.items()}
    for axis in (0, 1):  # one straight scale for all marks; up is better
        scale = (places[second][axis] - places[first][axis]) / (figures[second][axis] - figures[first][axis])
        assert scale > 0 if axis == 0 else scale < 0
        for name, place in places.items():
            assert place[axis] == pytest.approx(places[first][axis] + scale * (figures[name][axis] - figures[first][axis]), abs=0.2)


def test_charts_are_written_as_pictures_too(folder: Path) -> None:
    names = {path.stem for path in folder.glob("*.png")}
    assert names == set(re.findall(r'<svg class="chart" id="([^"]+)"', (folder / "report.html").read_text())) and len(names) == 4
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            colours = picture.convert("RGB").getcolors(1 << 20)
            assert min(picture.size) > 400 and colours is not None and len(colours) > 50


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Measure first"):
        write_report(tmp_path)
    empty = {"settings": {"subject": {"model": "tiny", "steps": 2}}, "environment": {}, "rows": {}}
    (tmp_path / "bench.json").write_text(json.dumps(empty))
    with pytest.raises(ConfigError, match="no method with figures"):
        write_report(tmp_path)


def test_no_two_of_many_series_look_alike() -> None:
    looks = [(series.colour, series.shape) for series in (Series(str(i), i) for i in range(40))]
    assert len(set(looks)) == 40 and len({colour for colour, _ in looks[: len(LIGHT)]}) == len(LIGHT)
    style = Path(chart.__file__).with_name("page.css").read_text()
    assert all(f"--c{i}: {colour}" in style for i, colour in enumerate(LIGHT)), "page and PNGs have the same colours"
    assert style.count(f"--c{len(LIGHT) - 1}:") == 2, "light and dark"
