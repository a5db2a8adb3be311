# ruff: noqa: E501  the text below is prose with figures in it
"""Recompute the MACs columns of the paper's Tables II to V, VII and IX from the models' configurations, row by row.

    python benchmarks/paper_tables.py          # → benchmarks/results/paper_tables.json, docs/paper_tables.md; about two minutes on one core
    python benchmarks/paper_tables.py --check  # exit code 1 if the page says something else than the JSON file

The convention is that of ``tokencache_compile/paper_macs.py``. Models are on the meta device; P-steps are the compiler's own graphs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from paper_figures import TABLES, Printed
from paper_models import OPEN_SORA_FRAMES, OPEN_SORA_SIZE, OPEN_SORA_TEXT, PIXART_TEXT, paper_model, pixart
from peer_costs import interval_steps, learning_to_cache, skipping_steps, thresholds, toca_dit, toca_pixart

from tokencache_compile.paper_macs import GUIDANCE, run_macs

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE = ROOT / "benchmarks" / "results" / "paper_tables.json", ROOT / "docs" / "paper_tables.md"
NEAR = 1.0  # percent


@dataclass(frozen=True)
class Reading:
    """A row's figure by one set of settings.

    Attributes:
        settings: what is assumed, in words.
        stated: whether this paper states them, or the method's own publication does; if not, they were found by fitting.
    """

    settings: str
    tmacs: float
    residual_percent: float
    printed_digits: bool
    stated: bool


def prints_as(tmacs: float, printed: str) -> bool:
    """Whether a figure, rounded or cut at the printed digits, is the printed one. (The paper cuts 11.8689 to 11.86 and rounds 19.9397 to 19.94.)"""
    unit = Decimal(1).scaleb(Decimal(printed).as_tuple().exponent)  # type: ignore[arg-type]
    return Decimal(printed) in [Decimal(tmacs).quantize(unit, rounding) for rounding in (ROUND_HALF_UP, ROUND_DOWN)]


def reading(row: Printed, settings: str, macs: float, stated: bool = True) -> Reading:
    """``macs``: of the whole guided sample."""
    tmacs = macs / 1e12
    return Reading(settings, tmacs, 100 * (tmacs / float(row.tmacs) - 1), prints_as(tmacs, row.tmacs), stated)


def uncached(row: Printed) -> list[Reading]:
    model = paper_model(row.model)
    text = f", {PIXART_TEXT} text tokens" if row.method == "PixArt-α" else ""
    return [reading(row, f"{row.steps} steps{text}", run_macs(model.full, 0, row.steps, row.steps))]


def token_cache(row: Printed) -> list[Reading]:
    model, full_steps = paper_model(row.model), row.full_steps
    settings = f"{full_steps} I-steps, K = {row.last_k}, r = {row.ratio}"
    found = []
    for predictor in (False, True):
        macs = run_macs(model.full, model.p_step(row.last_k, row.ratio, predictor), row.steps, full_steps)
        found.append(reading(row, f"{settings}, {'with' if predictor else 'without'} the predictor", macs, stated=not predictor))
    if row.table == "IX":
        macs = run_macs(model.full, model.p_step(row.last_k, row.ratio, False), row.steps, full_steps - 1)
        found.append(reading(row, f"{full_steps - 1} I-steps, otherwise the same, without the predictor", macs, stated=False))
    return found


def fitting_full_steps(row: Printed) -> float:
    """I-steps with which TokenCache would have the printed MACs, without the predictor."""
    model = paper_model(row.model)
    cached = model.p_step(row.last_k, row.ratio, False)
    return (float(row.tmacs) * 1e12 / GUIDANCE - row.steps * cached) / (model.full - cached)


def fora(row: Printed) -> list[Reading]:
    """FORA's own interval for 250 steps is 3; others are not stated, and 2 is the least."""
    model = paper_model(row.model)
    interval = 3 if row.steps == 250 else 2
    full_steps = interval_steps(row.steps, interval)
    macs = GUIDANCE * skipping_steps(model, row.steps, full_steps)
    found = [reading(row, f"interval {interval}: {full_steps} I-steps", macs, stated=row.steps == 250)]
    if row.model.startswith("PixArt"):
        printed = next(r.tmacs for r in TABLES if r.model == row.model and r.steps == row.steps)
        scaled = float(printed) * 1e12 * macs / run_macs(model.full, 0, row.steps, row.steps)
        found.append(reading(row, f"the same, as a share of the printed uncached {printed}", scaled, stated=False))
    elif not found[0].printed_digits:
        nearest = min(range(row.steps), key=lambda n: abs(GUIDANCE * skipping_steps(model, row.steps, n) - float(row.tmacs) * 1e12))
        by_interval = nearest in {interval_steps(row.steps, every) for every in range(1, row.steps)}
        macs = GUIDANCE * skipping_steps(model, row.steps, nearest)
        found.append(reading(row, f"{nearest} I-steps" + ("" if by_interval else ", which no interval gives"), macs, stated=False))
    return found


def routed(row: Printed) -> list[Reading]:
    model, steps = paper_model(row.model), row.steps
    other = "" if row.model.endswith("256²") else "the router for 256², "
    published = "0.1" if not other else "0.9"
    found = [
        reading(row, f"{other}threshold {t}", GUIDANCE * learning_to_cache(model, steps, t), stated=t == published)
        for t in dict.fromkeys((published, *thresholds(steps)))
    ]
    found.append(reading(row, "nothing computed in every second step", GUIDANCE * skipping_steps(model, steps, steps // 2), stated=False))
    unstated = min((r for r in found if not r.stated), key=lambda r: abs(r.residual_percent))
    return [found[0], unstated]


def toca(row: Printed) -> list[Reading]:
    model = paper_model(row.model)
    if row.model.startswith("DiT"):
        own = "" if row.model.endswith("256²") and row.steps in (50, 250) else " for 50 steps of 256²"
        return [reading(row, f"ToCa's published settings{own}", GUIDANCE * toca_dit(model, row.steps), stated=not own)]
    if row.model.startswith("PixArt"):
        return [reading(row, "ToCa's published settings for 20 steps of 256²", GUIDANCE * toca_pixart(model, row.steps), row.steps == 20)]
    return []


METHODS: dict[str, Callable[[Printed], list[Reading]]] = {
    "FORA": fora,
    "ToCa": toca,
    "Learning-to-Cache": routed,
    "Ours": token_cache,
}


@cache
def readings(row: Printed) -> tuple[Reading, ...]:
    """The row's figure, by the stated settings first."""
    return tuple(METHODS.get(row.method, uncached)(row))


def verdict(found: tuple[Reading, ...]) -> str:
    """How well the row follows from the stated settings, or else from others."""
    for stated, suffix in ((True, ""), (False, ", settings not stated")):
        considered = [r for r in found if r.stated is stated]
        if any(r.printed_digits for r in considered):
            return f"printed digits{suffix}"
        if any(abs(r.residual_percent) <= NEAR for r in considered):
            return f"within {NEAR:g} %{suffix}"
    return "no"


@cache
def macs_of_a_text_token(model: str) -> int:
    """MACs that one more text token adds to a forward of PixArt-α."""
    size = 32 if model.endswith("256²") else 128
    return pixart(size, PIXART_TEXT + 1).full - paper_model(model).full


def fitting_text_tokens(row: Printed) -> float:
    """Text tokens with which PixArt-α would have the printed MACs."""
    forward = float(row.tmacs) * 1e12 / GUIDANCE / row.steps
    return PIXART_TEXT + (forward - paper_model(row.model).full) / macs_of_a_text_token(row.model)


def why(row: Printed) -> str:
    """Where the first reading is not the printed figure: why, as far as it can be told."""
    if readings(row) and readings(row)[0].printed_digits:
        return ""
    if row.method == "PixArt-α":
        tokens = fitting_text_tokens(row)
        return f"The number of text tokens is not stated; {PIXART_TEXT} is PixArt-α's own, and the figure would need {tokens:.0f}."
    if row.method == "FORA":
        return "The interval is not stated." + (" The count is as far off as the uncached row's." if row.model.startswith("PixArt") else "")
    if row.method == "Learning-to-Cache":
        unpublished = "" if row.model.endswith("256²") else " No router for 512² is published."
        return "The threshold is not stated; at the published one the published router computes far more." + unpublished
    if row.method == "ToCa":
        return "Its settings are not stated." + ("" if readings(row) else " ToCa published none for this model.")
    fits = f"The figure would need {fitting_full_steps(row):.2f} I-steps, not {row.full_steps}."
    if row.table == "II":
        return fits + " The keep counts of the blocks are not stated; unequal ones cost more, as attention grows with their squares."
    return fits


def differences(figures: list[float]) -> str:
    return ", ".join(f"{after - before:.2f}" for before, after in pairwise(figures))


def note(table: str) -> str:
    """What is to be said of a table as a whole."""
    rows = [row for row in TABLES if row.table == table]
    printed, ours = [float(row.tmacs) for row in rows], [readings(row)[0].tmacs for row in rows if readings(row)]
    if table == "III":
        needed = ", ".join(f"{fitting_text_tokens(r):.0f} ({r.model})" for r in TABLES if r.method == "PixArt-α")
        return f"No one number of text tokens gives PixArt-α's uncached rows of Tables III and IV; they would need {needed}."
    if table == "VII":
        return (
            f"From row to row the paper's figures grow by {differences(printed)}; at equal I-steps they would grow by {differences(ours)}."
        )
    if table == "IX":
        same = next(
            row for row in TABLES if row.table == "II" and (row.model, row.method, row.steps) == (rows[-1].model, "Ours", rows[-1].steps)
        )
        fewer = ", ".join(f"{fitting_full_steps(row):.2f}" for row in rows)
        return (
            f"The column fits {same.full_steps - 1} I-steps, not Table I's {same.full_steps} (K = 1 to 4 would need {fewer}). For the same run, K = 4, Table II prints {same.tmacs} "
            f"and this table {rows[-1].tmacs}."
        )
    return ""


def recompute(row: Printed) -> dict[str, Any]:
    """One row of the result."""
    found = readings(row)
    return asdict(row) | {"readings": [asdict(r) for r in found], "follows": verdict(found), "why": why(row)}


def signed(percent: float, digits: int) -> str:
    """A percentage with its sign; none is written as +0."""
    return f"{round(percent, digits) + 0.0:+.{digits}f} %"


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = result["rows"]
    ours = [r for r in rows if r["method"] == "Ours" and r["table"] == "II"]
    residuals = [r["readings"][0]["residual_percent"] for r in ours]
    parts = [
        f"""# The paper's MACs, recomputed

Generated by `benchmarks/paper_tables.py`; only the paper's own figures are typed (`benchmarks/paper_figures.py`). All figures are tera-MACs of one guided
sample (the paper heads its columns "TFLOPs").

**Convention**: {GUIDANCE} forwards a step; MACs of linears, convolutions and both products of every attention, and 4 an element for each LayerNorm without weights
(fvcore's rule). TokenCache's rows leave its predictor out; the row with the predictor says what a run costs. Keep counts are equal over the
blocks, by largest remainders for a budget of (1 − r)(L − K)N tokens, attention among kept tokens (`kept`); P-steps are counted on the compiler's own graphs.

**Fits**: "printed digits" if our figure, rounded or cut, is the printed one. Of {len(rows)} rows {sum(r["follows"] == "printed digits" for r in rows)} do by the settings that the paper or the method's publication states, and
{sum(r["follows"] == "printed digits, settings not stated" for r in rows)} more by others, which were found by fitting. TokenCache's six DiT rows lie {signed(min(residuals), 1)} … {signed(max(residuals), 1)} off.

Models: DiT as its authors published it (diffusers embeds the timestep anew in each block), PixArt-α with {PIXART_TEXT} text tokens, Open-Sora-Plan v1.3 with {OPEN_SORA_TEXT} text tokens and
{OPEN_SORA_FRAMES} frames of {OPEN_SORA_SIZE}². In steps that skip all blocks (FORA), the text's projection is not counted again."""
    ]
    for table, group in groupby(rows, key=lambda r: r["table"]):
        lines = ["| model | method | steps | paper | settings | ours | residual | fits | why not |", "| --- " * 9 + "|"]
        for row in group:
            first = [row["model"], row["method"], str(row["steps"]), row["tmacs"]]
            digits = len(row["tmacs"].partition(".")[2]) + 1
            last = [row["follows"], row["why"]]
            for r in row["readings"]:
                mark = "**" if r["printed_digits"] else ""
                figures = [r["settings"], f"{mark}{r['tmacs']:.{digits}f}{mark}", signed(r["residual_percent"], 2)]
                lines.append("| " + " | ".join([*first, *figures, *last]) + " |")
                first, last = [""] * 4, [""] * 2
            if not row["readings"]:
                lines.append("| " + " | ".join([*first, "–", "–", "–", *last]) + " |")
        parts += [f"## Table {table}", *filter(None, [result["notes"][table]]), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def main(check: Annotated[bool, typer.Option(help="Compare the page with the JSON file, and compute nothing.")] = False) -> None:
    """Write the result and the page."""
    if check:
        sys.exit(
            0
            if page(json.loads(RESULT.read_text())) == PAGE.read_text()
            else "docs/paper_tables.md differs: run benchmarks/paper_tables.py"
        )
    rows = [recompute(row) for row in TABLES]
    result = {"unit": "tera-MACs of one guided sample", "notes": {row.table: note(row.table) for row in TABLES}, "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(result))


if __name__ == "__main__":
    typer.run(main)
