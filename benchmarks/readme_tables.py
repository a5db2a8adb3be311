# ruff: noqa: E501  the text below is prose with figures in it
"""Write the README's results between its markers from the JSON files of the benchmarks, so that no figure is typed by hand.

    python benchmarks/readme_tables.py          # after benchmarks/results/*.json and docs/demo.json are new
    python benchmarks/readme_tables.py --check  # exit code 1 if the README says something else
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from choose_defaults import BASE

from tokencache_compile.evidence.compare import METRICS, at_speed_ups, best_at, failures, points
from tokencache_compile.evidence.methods import OURS, RANDOM, SPEED_UPS

ROOT = Path(__file__).resolve().parent.parent
TABLES, FRECHET = "benchmarks/results/learned_tables.json", "benchmarks/results/frechet.json"
EQUAL_COST = "benchmarks/results/equal_cost.json"
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
    for run in result["runs"].values():
        psnr = "–" if run["psnr_db"] is None else f"{run['psnr_db']:.1f} dB"
        rows.append([run["title"], str(run["steps"]), f"{run['latency_seconds']:.2f} s", f"{run['speed_up']:.2f}×", f"{run['macs'] / 1e9:.1f}", psnr])
    return table(["run", "steps", "latency", "speed-up", "GMACs", "PSNR to uncached"], rows)


def settings() -> str:
    """The grid of settings: every 4th step, what changes it singly, the defaults, and what the paper does."""
    result = read("benchmarks/results/choose_defaults.json")
    paper = {"context": "kept", "forecast": 0, "history": "computed"}
    rows = []
    for row in sorted(result["rows"], key=lambda r: -r["margin_db"]):
        changed = {k: v for k, v in row["config"].items() if v != BASE.get(k)}
        if len(changed) > 1 and not (changed.keys() <= {"ratio", "last_k", "every"} or changed == paper):
            continue
        name = "**the defaults**" if changed == {"every": None} else ", ".join(f"{k}={v}" for k, v in changed.items()) or "every=4"
        rows.append([name, f"{row['full_step_equivalents']:.1f}", f"{row['psnr_db']:.1f}", f"{row['margin_db']:+.1f}"])
    return table(["setting", "MACs, in full steps of 50", "PSNR (dB)", "margin over fewer steps of the same MACs (dB)"], rows)


def learned_rows(prefix: str, by: str = "full_step_equivalents") -> str:
    """The rows of one of the tables in the shape of the paper's VI to IX, sorted by a field."""
    found = {name.removeprefix(prefix): row for name, row in read(TABLES)["rows"].items() if name.startswith(prefix)}
    distances = {name: row for name, row in frechet_rows().items() if name.startswith(prefix)}
    rows = []
    for name, row in sorted(found.items(), key=lambda item: item[1][by]):
        deviation = f"{row['pred_x0_mae']:.4f}" if "pred_x0_mae" in row else "–"
        distance = [f"{distances[prefix + name]['frechet']:.2f}" if prefix + name in distances else "–"] if distances else []
        figures = [f"{row['mse']:.3e}", f"{row['psnr_db']:.2f}", deviation, f"{row['accuracy']:.1%}", *distance]
        rows.append([name, f"{row['full_step_equivalents']:.1f}", *figures])
    head = ["setting", "MACs, in full steps of 50", "MSE", "PSNR (dB)", "deviation of pred_x0", "classified right"]
    return table([*head, "Fréchet"] if distances else head, rows)


def frechet_rows() -> dict[str, Any]:
    """The rows that were measured on 2,000 samples too; none where that run was not made."""
    rows: dict[str, Any] = read(FRECHET)["rows"] if (ROOT / FRECHET).exists() else {}
    return rows


def frechet_note() -> str:
    """What the Fréchet column is, with its floor."""
    if not frechet_rows():
        return ""
    result = read(FRECHET)
    return (
        f"Fréchet is the distance to real images (`benchmarks/frechet.py`, no FID) at {result['settings']['samples']:,} samples of the same settings: "
        f"**{result['floor']['frechet']:.2f}** for as many held-out real images (the floor), {result['rows']['uncached']['frechet']:.2f} for the "
        "uncached model; – was not measured."
    )


def orderings() -> str:
    """Which of the paper's orderings the tables show, and which they do not."""
    rows = read(TABLES)["rows"]

    def field(start: str, name: str = "mse") -> dict[str, float]:
        return {key.removeprefix(start): row[name] for key, row in rows.items() if key.startswith(start)}

    def falls(values: list[float]) -> bool:
        return all(later < earlier for earlier, later in itertools.pairwise(values))

    selector, schedule = field("VI selector: "), field("VIII schedule: ")
    selector_x0 = field("VI selector: ", "pred_x0_mae")
    ratios = ("0.9", "0.8", "0.7", "0.6", "0.5")
    by_ratio, by_ratio_x0 = ([rows[f"VII ratio {r}: predictor"][name] for r in ratios] for name in ("mse", "pred_x0_mae"))
    by_k, by_k_x0 = ([rows[f"IX K = {k}"][name] for k in range(5)] for name in ("mse", "pred_x0_mae"))
    mass = [value for name, value in schedule.items() if name.startswith("Eq. 13")]
    refined = [k for k in range(1, 5) if f"IX K = {k}, LoRA" in rows]
    trained_for = f"trained for K = {', '.join(map(str, refined))}"
    most_k, half = rows["IX K = 4"], rows["VII ratio 0.5: predictor"]
    random = sorted((rows[f"VII ratio {r}: random"]["full_step_equivalents"], rows[f"VII ratio {r}: random"]["psnr_db"]) for r in ratios)

    def pays(ratio: str) -> bool:
        """Whether the predictor's row is above the line through random rows of lower and higher MACs."""
        cost, psnr = (rows[f"VII ratio {ratio}: predictor"][name] for name in ("full_step_equivalents", "psnr_db"))
        (low, first), (high, second) = next(pair for pair in itertools.pairwise(random) if pair[0][0] <= cost <= pair[1][0])
        return bool(psnr > first + (second - first) * (cost - low) / (high - low))

    inside = [r for r in ratios if random[0][0] <= rows[f"VII ratio {r}: predictor"]["full_step_equivalents"] <= random[-1][0]]
    paying = [r for r in inside if pays(r)]
    claims = {
        "the learned predictor before every other selector": min(selector, key=selector.__getitem__) == "predictor" == min(selector_x0, key=selector_x0.__getitem__),
        f"the predictor before random at equal MACs, its own counted (it is at {len(paying)} of the {len(inside)} ratios that compare)": paying == inside,
        "more recomputed tokens always closer in pred_x0": falls(by_ratio_x0),
        "more recomputed tokens always closer in the images": falls(by_ratio),
        "a larger K closer": falls(by_k) and falls(by_k_x0),
        "K worth its MACs (K = 4 closer than ratio 0.5, which costs less)": most_k["mse"] < half["mse"],
        "Eq. 13 before uniform": min(mass) < schedule["uniform"],
        "the optimal schedule before uniform": schedule["optimal (interval errors)"] < schedule["uniform"],
        f"LoRA on the last K blocks closer than without it ({trained_for})": all(
            rows[f"IX K = {k}, LoRA"][name] < rows[f"IX K = {k}"][name] for k in refined for name in ("mse", "pred_x0_mae")
        ),
    }
    holds, fails = ([text for text, held in claims.items() if held is wanted] for wanted in (True, False))
    return f"Of what the paper orders, these hold here: {'; '.join(holds)}. These do not: {'; '.join(fails)}."


def contexts() -> str:
    """Contexts and forecasts at equal MACs and, where it was measured, at equal latency: guided and not."""
    result = read(EQUAL_COST)
    rows = []
    settings = [(f"{context}, forecast {forecast}", context, forecast) for context in ("reuse", "full", "cached", "kept") for forecast in (2, 1, 0)]
    for setting, context, forecast in [*settings, ("nothing recomputed, forecast 2", "nothing recomputed", 2)]:
        cells = [context, str(forecast)]
        for guidance in ("2.5", "1"):
            clock = result["latency"].get(f"guidance {guidance}: {setting}")
            row = result["rows"].get(f"guidance {guidance}: {setting}")
            if row is None:  # with nothing recomputed the context does not matter
                row = {**clock, "margin_db": clock["margin_at_macs_db"]}
            cells += [f"{row['full_step_equivalents'] / 50:.3f}"] if guidance == "2.5" else []
            cells += [f"{row['psnr_db']:.1f}", f"{row['margin_db']:+.1f}"]
            cells += [f"{clock['latency_ratio']:.3f}", f"{clock['margin_db']:+.1f}"] if clock else ["–", "–"]
        rows.append(cells)
    margins = ["margin at equal MACs", "latency", "margin at equal latency"]
    return table(["context", "forecast", "MACs", "PSNR, guided (dB)", *margins, "PSNR, unguided", *margins], rows)


def spending() -> str:
    """What MACs buy: recomputed tokens or more I-steps, for three step counts."""
    measured = read(EQUAL_COST)["rows"]
    rows = []
    for steps, ratio in itertools.product((20, 50, 100), ("1", "0.9", "0.7", "0.5")):
        found = [measured[f"{steps} steps: ratio {ratio}, every {every}"] for every in (4, 3, 2)]
        cells = [f"{row['full_step_equivalents'] / steps:.2f}: {row['psnr_db']:.1f} ({row['margin_db']:+.1f})" for row in found]
        rows.append([str(steps), ratio, *cells])
    return table(["steps", "ratio", "I-step every 4th", "every 3rd", "every 2nd"], rows)


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


def engines() -> str:
    """I- and P-step of the reference DiT in every engine of this machine."""
    rows = []
    for backend, measured in read("benchmarks/results/bench_engines.json")["backends"].items():
        steps = [f"{measured[step]['seconds'] * 1e3:.1f}" if step in measured else "–" for step in ("model", "I", "P")]
        rows.append([backend, *steps, f"{measured['I_over_P']:.2f}×"])
    return table(["backend", "the model itself, ms", "I-step, ms", "P-step, ms", "I over P"], rows)


def exported() -> str:
    """What exporting DiT-XL/2 took, and what it left."""
    result = read("benchmarks/results/export_dit_xl.json")
    built = [(name.removeprefix("engine "), row) for name, row in result["stages"].items() if name.startswith("engine ")]
    times = ", ".join(f"{name} {row['seconds']:.0f} s and {row['nbytes'] / 2**30:.2f} GiB" for name, row in built)
    return (
        f"{result['model']} in {result['dtype']}: the ONNX files took {result['stages']['onnx']['seconds']:.0f} s on one busy core (load average "
        f"{result['load_average'][0]:.1f}); beside {result['files']['weights.safetensors'] / 2**30:.2f} GiB of shared weights the P-graph is "
        f"{result['files']['cached_0.onnx'] / 2**20:.1f} MiB, **{result['p_graph_share_of_weights']:.2%}** of them. TensorRT-RTX {built[0][1]['version']} engines for "
        f"{built[0][1]['capabilities'].replace(',', ' and ')}, built without a GPU: {times}, at a peak of {max(row['peak_gib'] for _, row in built):.1f} GiB of memory."
    )


def pareto(model: str) -> str:
    """All methods on a reference model at equal speed: the table of its report, and what it says; empty before benchmarks/pareto.py timed any."""
    file = f"benchmarks/results/pareto_{model}/bench.json"
    if not (ROOT / file).exists():
        return ""
    result = read(file)
    found, measured = points(result), result["settings"]
    if "latency" not in measured:
        return ""
    threads = result["environment"]["latency"]["threads"]
    metrics = [metric for metric in METRICS if metric.key != "ssim" and any(p.value(metric) is not None for p in found)]
    parts = [
        f"**Beside peers on the {measured['subject']['model']}**: {measured['subject']['steps']} guided {measured['subject']['sampler']} steps, {measured['quality']['samples']} samples, "
        f"whole runs of {measured['latency']['batch']} sample{'s' * (measured['latency']['batch'] > 1)} in turn with the compiled uncached model, medians of {measured['latency']['rounds']} "
        f"(cache-dit {measured['subject']['cache-dit']}, diffusers {result['environment']['quality']['diffusers']}; each peer in torch.compile or eager, "
        f"whichever is faster; {threads} thread{'s' * (threads != 1)}). Each method's best setting that is at least about so fast; the best of all in bold."
        + (f" The Fréchet distance is that of `benchmarks/frechet.py` at {measured['judges']['samples']:,} samples of the settings that the other tables show." if "judges" in measured else "")
    ]
    for metric in metrics:
        best = {speed: best_at(found, metric, speed) for speed in SPEED_UPS}
        rows = []
        for family, chosen in at_speed_ups(found, metric):
            shown = ["–" if p is None else ("**{}**" if p is best[s] else "{}").format(metric.show(p.quality[metric.key])) for s, p in zip(SPEED_UPS, chosen, strict=True)]
            if any(chosen):
                rows.append([family, *shown])
        floor = result.get("floors", {}).get(metric.key)
        title = metric.title + (f"; floor {metric.show(floor)}, uncached {metric.show(result['uncached'][metric.key])}" if floor is not None else "")
        parts.append(table([title, *(f"{speed:g}×" for speed in SPEED_UPS)], rows))
        won = [f"{speed:g}×" for speed, p in best.items() if p is not None and p.family in (OURS, RANDOM)]
        lost = [f"{p.family} at {speed:g}×" for speed, p in best.items() if p is not None and p.family not in (OURS, RANDOM)]
        parts.append(f"By {metric.title}, this package is best at {', '.join(won) or 'no speed'}" + (f"; better are {', '.join(lost)}." if lost else "."))
    if untimed := [row["family"] for row in result["rows"].values() if row["quality"] and not row["latency"]]:
        families = ", ".join(sorted(set(untimed)))
        parts.append(f"Not timed, and so in none of the tables: {len(untimed)} of {len(result['rows'])} settings, of {families}; their quality is in {file}.")
    parts.append(f"![Quality over speed](benchmarks/results/pareto_{model}/quality-psnr-db.png)")
    if failed := failures(result):
        parts.append("Failed: " + "; ".join(failed) + ".")
    return "\n\n".join(parts)


def step_weights() -> str:
    """What forecasts fitted to whole runs gain, on the models where benchmarks/fit_step_weights.py was run."""
    rows = []
    for model in ("pixart", "dit"):
        file = f"benchmarks/results/step_weights_{model}.json"
        result = read(file) if (ROOT / file).exists() else {"rows": {}}
        for name, row in result["rows"].items():
            full = len(row["config"]["schedule"]["full"])
            steps = result["settings"]["steps"]
            by, fitted = row["polynomial_db"], row["fitted_db"]
            rows.append([result["settings"]["model"], name, f"{full} of {steps}", f"{by:.1f}", f"{fitted:.1f}", f"{fitted - by:+.1f}"])
    return table(["model", "I-steps", "how many", "by step numbers, best order (dB)", "fitted (dB)", "gain"], rows)


def section() -> str:
    """The README's results."""
    judged, grid, steps = (read(f"benchmarks/results/{n}.json") for n in ("judge_reference", "choose_defaults", "step_latency_cpu"))
    shown = read("docs/demo.json")
    transform = steps["transform"]["default"]
    ahead = steps["backends"]["inductor"]["rows"]["P, default"]
    tuned, clock = (read(f"benchmarks/results/{name}.json") for name in ("tune_reference", "tune_reference_clock"))
    learned, equal = read(TABLES)["settings"], read(EQUAL_COST)
    return f"""**The demo** (reference DiT, 50 guided DDIM steps, ratio 0.9, the shipped predictor and plan, compiled, {shown["machine"]["threads"]} CPU threads, torch \
{steps["torch"]}, load average {shown["machine"]["load_average"]}; latency of whole runs in turn). At equal MACs the cached run is **{shown["margin_db"]:+.1f} dB** ahead of the run with fewer steps. \
The row with LoRA is a plan of its own (`reference/cache_lora`) and not the default: it costs more than K = 0, see docs/learning.md.

{demo()}

**Settings**, on {grid["settings"]["samples"]} other noises; an I-step every 4th step and the defaults but for what a row names (the default schedule has the last step full too). Forecasting decides: holding updates (the paper) loses to fewer
steps at this scale, attention among kept tokens alone most of all, and extrapolating from P-step values amplifies their error. More I-steps buy more than
recomputed tokens for the same MACs, and K buys next to nothing.

{settings()}

{pareto("dit")}

{pareto("pixart")}

{pareto("video")}

**Who chooses the tokens?** {learned["samples"]} fixed noises, guidance {learned["guidance"]}, {learned["full_steps"]} I-steps of {learned["steps"]}, ratio 0.9, equal keep counts and one selection a \
guidance pair for all, MACs of the predictor left out. The learned predictor is closest to the uncached run by both measures of deviation; it was trained on guidance pairs and the guided \
output's error. {frechet_note()}

{learned_rows("VI selector: ", by="mse")}

**Ratio, schedule and K** (the paper's Tables VII, VIII, IX), same noises, the trained predictor unless named, K = 0 and 12 I-steps spread evenly but for what the row names; the predictor's own \
MACs are counted. {orderings()}

{learned_rows("VII ")}

{learned_rows("fewer ")}

{learned_rows("VIII ")}

{learned_rows("IX ")}

**Contexts and forecasts at equal cost**: the trained predictor at ratio 0.9, an I-step every 4th of 50 steps, {equal["settings"]["samples"]} noises. MACs and latency are shares of the uncached run's (latency: whole \
compiled runs on one thread in turn, in CPU seconds); a margin (dB) is over the best of the plain sampler with no more steps than that pays for.

{contexts()}

**Tokens or I-steps?** What recomputed tokens (ratio, chosen by the predictor) and denser I-steps buy, guided, context `reuse`, forecast 2, for three step counts: share of the MACs, PSNR in dB and in brackets the margin at equal MACs. \
Nothing recomputed (ratio 1) and denser I-steps buy more nearly everywhere, see docs/learning.md. The model has 64 tokens, so their number was not varied.

{spending()}

**A plan by `tune`**: asked for the fastest plan at least as close as half the steps ({tuned["half_the_steps_psnr_db"]:.1f} dB), guided, it found {tuned["best"]["macs_speedup"]:.2f}× fewer MACs at \
{tuned["best"]["psnr_db"]:.1f} dB (ratio {tuned["best"]["ratio"]:g}, K = {tuned["best"]["last_k"]}, an I-step {tuned["best"]["schedule"]}, forecast {tuned["best"]["forecast"]}), and **{clock["best"]["latency_speedup"]:.2f}× on the clock**, both compiled.

**A forecast fitted to the run.** An extrapolation by step numbers knows nothing of the sampler's times. `tokencache tune --fit` (`learn/step_weights.py`) fits the weights of every P-step, three each, to \
the images at the end of the run, by Gauss-Newton on a dozen noises; the P-step costs what it did. Nothing recomputed; PSNR of noises that the fit did not see, over the range of the samples as the sampler leaves them:

{step_weights()}

**Does the clock follow the MACs?** DiT-XL/2 at 256², batch {steps["batch"]}, {steps["dtype"].removeprefix("torch.")}, random weights, ratio 0.9, K = 4, {steps["threads"]} CPU threads, medians of \
{steps["rounds"]} rounds in turn. Transforming took {transform["seconds"]:.0f} s and {max(transform["rss_growth_bytes"], 0) / 2**20:.0f} MiB beside weights of \
{steps["weight_bytes"] / 2**30:.1f} GiB. A P-step's seconds include its share of what is made ahead (the modulation of all {ahead["ahead_steps"]} P-steps of a 50-step run, in {ahead["ahead_seconds"]:.2f} s); its MACs are those of the whole step.

{latency()}

An eager I-step keeps torch's own kernels, because it is the model's own result bit for bit; P-steps and everything compiled take oneDNN's linears. So the compiled I-step is
itself twice as fast as the eager model, and what the P-step cannot drop (weights that
must be read for few rows) weighs more beside it: its time over MACs is above 1.

**Engines**: the reference DiT with the shipped plan, {read("benchmarks/results/bench_engines.json")["inputs"]["0"][0][0]} rows, medians of {read("benchmarks/results/bench_engines.json")["rounds"]} rounds in turn on {read("benchmarks/results/bench_engines.json")["threads"]} CPU threads. \
(TensorRT engines are built here and not run.)

{engines()}

{exported()}

**The reference DiT**: a classifier that is right on {judged["overall"]["classifier_accuracy"]:.1%} of the real test images names the requested class for \
**{judged["overall"]["agreement"]:.1%}** of {judged["settings"]["samples"]} guided 50-step samples. These figures are a CPU's; docs/gpu.md has what was measured on a GPU."""


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
