# ruff: noqa: E501  the text below is prose with figures in it
"""Write the README's results between its markers from the JSON files of the benchmarks, so that no figure is typed by hand.

    python benchmarks/readme_tables.py          # after benchmarks/results/*.json and docs/demo.json are new
    python benchmarks/readme_tables.py --check  # exit code 1 if the README says something else
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from choose_defaults import BASE

PAPER_ORDER = (
    "Of the paper's orderings, these hold here: the learned predictor before the other selectors, more recomputed tokens closer (in pred_x0), a larger K closer. "
    "These do not: Eq. 13 before uniform (on these scores it loses by far, see docs/learning.md; measured interval errors do a little better than uniform, "
    "and one more I-step that makes the spacing regular much better than all), and K paying for its MACs."
)
ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: benchmarks/readme_tables.py -->", "<!-- end of results -->"


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / path).read_text())
    return content


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def demo() -> str:
    """The demo's own run."""
    result = read("docs/demo.json")
    rows = []
    for name, run in result["runs"].items():
        psnr = "–" if run["psnr_db"] is None else f"{run['psnr_db']:.1f} dB"
        rows.append([name, str(run["steps"]), f"{run['latency_seconds']:.2f} s", f"{run['speed_up']:.2f}×", f"{run['macs'] / 1e9:.1f}", psnr])
    return table(["run", "steps", "latency", "speed-up", "GMACs", "PSNR to uncached"], rows)


def settings() -> str:
    """The grid of settings: the defaults, what changes them singly, and what the paper does."""
    result = read("benchmarks/results/choose_defaults.json")
    paper = {"context": "kept", "forecast": 0, "history": "computed"}
    rows = []
    for row in sorted(result["rows"], key=lambda r: -r["margin_db"]):
        changed = {k: v for k, v in row["config"].items() if v != BASE[k]}
        if len(changed) > 1 and not (changed.keys() <= {"ratio", "last_k", "every"} or changed == paper):
            continue
        name = ", ".join(f"{k}={v}" for k, v in changed.items()) or "**defaults**"
        rows.append([name, f"{row['full_step_equivalents']:.1f}", f"{row['psnr_db']:.1f}", f"{row['margin_db']:+.1f}"])
    return table(["setting", "MACs, in full steps of 50", "PSNR (dB)", "margin over fewer steps of the same MACs (dB)"], rows)


def selectors() -> str:
    """Who chooses the tokens, everything else equal (the paper's Table VI)."""
    prefix = "VI selector: "
    rows = []
    for name, row in sorted(read("benchmarks/results/learned_tables.json")["rows"].items(), key=lambda item: item[1].get("mse", 0.0)):
        if name.startswith(prefix):
            figures = [f"{row['mse']:.3e}", f"{row['psnr_db']:.2f}", f"{row['pred_x0_mae']:.4f}", f"{row['accuracy']:.1%}"]
            rows.append([name.removeprefix(prefix), *figures])
    return table(["selector", "MSE of the images", "PSNR (dB)", "mean abs. deviation of pred_x0", "classified right"], rows)


def learned_rows(prefix: str) -> str:
    """The rows of one of the tables in the shape of the paper's VII to IX."""
    rows = []
    for name, row in read("benchmarks/results/learned_tables.json")["rows"].items():
        if name.startswith(prefix):
            deviation = f"{row['pred_x0_mae']:.4f}" if "pred_x0_mae" in row else "–"
            figures = [f"{row['full_step_equivalents']:.1f}", f"{row['mse']:.2e}", f"{row['psnr_db']:.2f}", deviation, f"{row['accuracy']:.1%}"]
            rows.append([name.removeprefix(prefix), *figures])
    return table(["setting", "MACs, in full steps of 50", "MSE", "PSNR (dB)", "deviation of pred_x0", "classified right"], rows)


def latency() -> str:
    """I- and P-step of DiT-XL/2 on this machine."""
    result = read("benchmarks/results/step_latency_cpu.json")
    rows = []
    for backend, measured in result["backends"].items():
        for name, row in measured["rows"].items():
            ratios = [f"{row[k]:.3f}" if k in row else "–" for k in ("macs_ratio", "time_ratio", "time_over_macs")]
            gmacs = f"{row['gmacs']:.1f}" if "gmacs" in row else "–"
            rows.append([backend, name if name != "model" else "the eager model itself", f"{row['seconds']:.2f}", gmacs, *ratios])
    return table(["backend", "step", "seconds", "GMACs", "MACs, P/I", "seconds, P/I", "time over MACs"], rows)


def section() -> str:
    """The README's results."""
    judged, grid, steps = (read(f"benchmarks/results/{n}.json") for n in ("judge_reference", "choose_defaults", "step_latency_cpu"))
    shown = read("docs/demo.json")
    transform = steps["transform"]["default"]
    tuned, clock = (read(f"benchmarks/results/{name}.json") for name in ("tune_reference", "tune_reference_clock"))
    learned = read("benchmarks/results/learned_tables.json")["settings"]
    return f"""**The demo** (reference DiT, 50 guided DDIM steps, ratio 0.9, the shipped predictor and plan, compiled, {shown["machine"]["threads"]} CPU threads, torch \
{steps["torch"]}, load average {shown["machine"]["load_average"]}; latency of whole runs in turn). At equal MACs the cached run is **{shown["margin_db"]:+.1f} dB** ahead of the run with fewer steps.

{demo()}

**Settings**, on {grid["settings"]["samples"]} other noises; every row keeps the defaults but for what it names. Forecasting decides: holding updates (the paper) loses to fewer
steps at this scale, attention among kept tokens alone most of all, and extrapolating from P-step values amplifies their error. Recomputing more tokens
brings the images closer (ratio 1.0, 0.9, 0.7, 0.5: each step ahead of the last), but at this scale more I-steps buy more for the same MACs, and K buys nothing.

{settings()}

**Who chooses the tokens?** {learned["samples"]} fixed noises, guidance {learned["guidance"]}, {learned["full_steps"]} I-steps of {learned["steps"]}, ratio 0.9, equal keep counts and one selection a \
guidance pair for all, MACs of the predictor left out. The learned predictor is closest by both measures; it was trained on guidance pairs and the guided \
output's error.

{selectors()}

**Ratio, schedule and K** (the paper's Tables VII, VIII, IX), same noises, the trained predictor unless named, K = 0 and 12 I-steps spread evenly but for what the row names; the predictor's own \
MACs are counted. {PAPER_ORDER}

{learned_rows("VII ")}

{learned_rows("VIII ")}

{learned_rows("IX ")}

**A plan by `tune`**: asked for the fastest plan at least as close as half the steps ({tuned["half_the_steps_psnr_db"]:.1f} dB), guided, it found {tuned["best"]["macs_speedup"]:.2f}× fewer MACs at \
{tuned["best"]["psnr_db"]:.1f} dB (ratio {tuned["best"]["ratio"]:g}, K = {tuned["best"]["last_k"]}, every {tuned["best"]["every"]}, forecast {tuned["best"]["forecast"]}), and **{clock["best"]["latency_speedup"]:.2f}× on the clock**, both compiled.

**Does the clock follow the MACs?** DiT-XL/2 at 256², batch {steps["batch"]}, {steps["dtype"].removeprefix("torch.")}, random weights, ratio 0.9, K = 4, {steps["threads"]} CPU threads, medians of \
{steps["rounds"]} rounds in turn. Transforming took {transform["seconds"]:.0f} s and {max(transform["rss_growth_bytes"], 0) / 2**20:.0f} MiB beside weights of \
{steps["weight_bytes"] / 2**30:.1f} GiB.

{latency()}

An eager I-step keeps torch's own kernels, because it is the model's own result bit for bit; P-steps and everything compiled take oneDNN's linears. So the compiled I-step is
itself twice as fast as the eager model, and what the P-step cannot drop (weights that
must be read for few rows) weighs more beside it: its time over MACs is above 1.

**The reference DiT**: a classifier that is right on {judged["overall"]["classifier_accuracy"]:.1%} of the real test images names the requested class for \
**{judged["overall"]["agreement"]:.1%}** of {judged["settings"]["samples"]} guided 50-step samples. No GPU was at hand for these figures; `step_latency.py --device cuda` is ready for one."""


def main(check: Annotated[bool, typer.Option(help="Compare instead of writing.")] = False) -> None:
    """Fill in the README."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    text = f"{before}{BEGIN}\n{section()}\n{END}{after}"
    if check:
        sys.exit(0 if text == path.read_text() else "README.md differs from the JSON files: run benchmarks/readme_tables.py")
    path.write_text(text)


if __name__ == "__main__":
    typer.run(main)
