"""Tables in the shape of the paper's VI to IX on the reference DiT: selectors, ratios, schedules, K with and without LoRA.

    python benchmarks/learned_tables.py --out benchmarks/results/learned_tables.json
    python benchmarks/learned_tables.py --out benchmarks/results/frechet.json --samples 2000 --chunk 50 --frechet

Every row is one guided 50-step DDIM run of the same fixed noises: MSE and PSNR of the final images and the mean |Δ pred_x0| over the steps
to the uncached run, the share of images that a classifier takes for the class asked for, the run's MACs, and on request the Fréchet
distance to real images. Rows are kept as they come, so a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel
from fashion_mnist import load_fashion_mnist
from frechet import FrechetDistance
from judge_reference import classify, machine, make_classifier, train_classifier
from safetensors.torch import load_file, load_model, save_file, save_model
from selectors_on_equal_terms import ScoredRun
from torch import Tensor, nn
from train_reference import NULL_LABEL, SCHEDULER_CONFIG

import tokencache_compile as tc
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.engine import make_engines
from tokencache_compile.learn.calibration import Calibration, GuidedCall
from tokencache_compile.learn.interval_errors import interval_errors
from tokencache_compile.learn.schedules import by_mass, optimal, reverse
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.metrics import deviation_per_step, psnr
from tokencache_compile.passes.pipeline import build_steps
from tokencache_compile.plan import CacheConfig
from tokencache_compile.sampling import Conditions, sample

STEPS, FULL_STEPS, GUIDANCE = 50, 12, 2.5
MODEL, BACKEND = Path("tokencache_compile/reference/dit"), "inductor"
REAL, FLOOR = 10_000, 2_000  # images: real ones that are measured against, and held-out ones for the floor
Runs = Callable[[], Any]  # a transformer, or a stand-in, for one chunk of the noises


class Bench:
    """One set of noises, its uncached run, and the rows measured against it.

    Args:
        work: folder of what every run needs again: the classifier and the uncached run.
        chunk: samples that are drawn together.
        wanted: which rows are measured, by their names.
        frechet: measure the Fréchet distance of every row too.
    """

    def __init__(self, out: Path, artefact: Path, work: Path, samples: int, chunk: int, wanted: re.Pattern[str], frechet: bool) -> None:
        self.out, self.chunk, self.wanted = out, chunk, wanted
        self.net = load_net()
        self.artefact = CacheArtefact.from_pretrained(artefact, self.net)
        self.labels = torch.arange(samples) % 10
        self.noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(4321))
        work.mkdir(parents=True, exist_ok=True)
        self.partial = work / f"partial_{samples}"
        self.classifier = kept_classifier(work / "classifier.safetensors")
        self.result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
        self.result["settings"] = dict(samples=samples, steps=STEPS, full_steps=FULL_STEPS, guidance=GUIDANCE, seed=4321)
        self.result["machine"] = machine()
        self.names: dict[tuple[CacheConfig, Path | None], str] = {}
        self.distance: FrechetDistance | None = None
        if frechet:
            self.distance = FrechetDistance.to(load_fashion_mnist("train")[0][:REAL])
            self.result["floor"] = dict(
                frechet=self.distance(load_fashion_mnist("test")[0][:FLOOR]), real_images=REAL, held_out_images=FLOOR
            )
        self.scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
        self.uncached = tc.transform(self.net, ratio=0.0, backend=BACKEND, scheduler=self.scheduler)
        file = work / f"uncached_{samples}.safetensors"
        if not file.exists():
            images, predictions = self._run("uncached", lambda: self.uncached, STEPS)
            save_file({"images": images, "predictions": predictions}, file)
        self.reference, self.predictions = (load_file(file)[name] for name in ("images", "predictions"))
        self._keep("uncached", lambda: (self.reference, self.predictions, float(STEPS)))

    def _conditions(self, labels: Tensor) -> Conditions:
        return Conditions.of_labels(labels, NULL_LABEL, GUIDANCE)

    def _run(self, name: str, runs: Runs, steps: int, scheduler: Any = None) -> tuple[Tensor, Tensor]:
        """The images [n, 1, 32, 32], and pred_x0 of every step [steps, n, 1, 32, 32]. Chunks that are done outlive a stopped run."""
        folder = self.partial / hashlib.sha256(name.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for index, (noise, labels) in enumerate(zip(self.noise.split(self.chunk), self.labels.split(self.chunk), strict=True)):
            files.append(folder / f"{index:03d}.safetensors")
            if files[-1].exists():
                continue
            seen: list[Tensor] = []
            images = sample(runs(), scheduler or self.scheduler, noise, steps, self._conditions(labels), lambda _, x: seen.append(x))  # noqa: B023
            save_file({"images": images.clamp(-1, 1), "predictions": torch.stack(seen)}, files[-1].with_suffix(".new"))
            os.replace(files[-1].with_suffix(".new"), files[-1])
        parts = [load_file(file) for file in files]
        shutil.rmtree(folder)
        return torch.cat([part["images"] for part in parts]), torch.cat([part["predictions"] for part in parts], dim=1)

    def missing(self, name: str) -> bool:
        """Whether the row called ``name`` is wanted and not measured yet."""
        return name not in self.result["rows"] and self.wanted.search(name) is not None

    def _keep(self, name: str, run: Callable[[], tuple[Tensor, Tensor, float]]) -> None:
        if not self.missing(name):
            return
        start = time.monotonic()
        images, predictions, cost = run()
        named_right = (classify(self.classifier, images) == self.labels).double().mean()
        row: dict[str, Any] = dict(full_step_equivalents=cost, accuracy=float(named_right))
        if name != "uncached":
            row |= dict(mse=float((images - self.reference).double().square().mean()), psnr_db=psnr(images, self.reference))
        if len(predictions) == STEPS and name != "uncached":
            deviation = deviation_per_step(predictions.unbind(), self.predictions.unbind())
            row["pred_x0_mae"] = sum(deviation) / len(deviation)
        if self.distance is not None:
            row["frechet"] = self.distance(images)
        self._save(name, row)
        print(f"{name:50s}", {k: round(v, 6) for k, v in row.items()}, f"{time.monotonic() - start:.0f} s", flush=True)

    def _save(self, name: str, row: dict[str, Any]) -> None:
        self.result["rows"][name] = row
        self.out.parent.mkdir(parents=True, exist_ok=True)
        aside = self.out.with_suffix(".partial")
        aside.write_text(json.dumps(self.result, indent=1) + "\n")
        os.replace(aside, self.out)

    def config(self, name: str, config: CacheConfig, lora: Path | None = None) -> None:
        """A row of the dispatcher under ``config``, with the adapter in ``lora`` if there is one. A setting of two tables runs once."""
        twin = self.names.setdefault((config, lora), name)
        if self.missing(name) and twin in self.result["rows"]:
            self._save(name, self.result["rows"][twin])
            return

        def run() -> tuple[Tensor, Tensor, float]:
            scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
            predictor = self.artefact.predictor if config.scorer == "predictor" else None
            plan = replace(self.artefact, config=config, predictor=predictor, lora_path=lora)
            cached = tc.transform(self.net, plan, backend=BACKEND, scheduler=scheduler)
            images, predictions = self._run(name, lambda: cached, STEPS, scheduler)
            summary = cached.summary()
            return images, predictions, summary.macs / summary.macs_uncached * STEPS

        self._keep(name, run)

    def fewer_steps(self, steps: int) -> None:
        name = f"fewer steps: {steps}"
        self._keep(name, lambda: (*self._run(name, lambda: self.uncached, steps), float(steps)))

    def selector(self, name: str, config: CacheConfig) -> None:
        """A row of Table VI: the selector's scores in the graphs of ``config``."""
        plain = replace(config, scorer="random")

        def run() -> tuple[Tensor, Tensor, float]:
            noise = self.noise[: self.chunk]
            call = GuidedCall(self.net, self._conditions(self.labels[: self.chunk])).kwargs(noise, torch.tensor(500))
            steps, stack = build_steps(self.net, call, plain, None), BlockStack(self.net, call)
            engines = make_engines(BACKEND, steps)
            images, predictions = self._run(
                f"VI {name}", lambda: ScoredRun(self.net, steps, engines, name, self.artefact.predictor, stack), STEPS
            )
            full = sum(plain.schedule_of(STEPS).is_full(i) for i in range(STEPS))
            return images, predictions, full + (STEPS - full) * steps.macs_cached[0] / steps.macs_full

        self._keep(f"VI selector: {name}", run)


def load_net() -> Any:
    """The reference DiT."""
    return DiTTransformer2DModel.from_pretrained(MODEL).eval()


def kept_classifier(file: Path) -> nn.Module:
    """The classifier in ``file``, trained first if there is none: its images are to be judged alike by every run."""
    if not file.exists():
        images, classes = load_fashion_mnist("train")
        save_model(train_classifier(images[:20_000], classes[:20_000], 3, 0), str(file))
    classifier = make_classifier()
    load_model(classifier, file)
    return classifier.eval()


def main(
    out: Annotated[Path, typer.Option(help="JSON file, appended to.")],
    artefact: Annotated[Path, typer.Option(help="The reference DiT's artefact.")] = Path("tokencache_compile/reference/cache"),
    work: Annotated[Path, typer.Option(help="Folder of what every run needs again.")] = Path("out/learned_tables"),
    lora: Annotated[Path, typer.Option(help="Folder of train_lora.py's runs; rows without an adapter there are left out.")] = Path(
        "out/lora"
    ),
    samples: int = 256,
    chunk: Annotated[int, typer.Option(help="Samples drawn together; a divisor of their number.")] = 64,
    threads: int = 1,
    rows: Annotated[str, typer.Option(help="Regular expression: which rows are measured.")] = "",
    frechet: Annotated[bool, typer.Option(help="Measure the Fréchet distance too; 2,000 samples or more.")] = False,
) -> None:
    """Measure the rows that are missing."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    bench = Bench(out, artefact, work, samples, chunk, re.compile(rows), frechet)
    trained = replace(bench.artefact.config, keep=None, groups=(), schedule=tc.Schedule.uniform(STEPS, FULL_STEPS))
    for name in ("random", "norm", "change", "tome", "toca", "predictor"):
        bench.selector(name, trained)
    for last_k, (spacing, schedule) in itertools.product(range(5), (("", trained.schedule), ("every 4: ", tc.Schedule(4)))):
        config = replace(trained, last_k=last_k, schedule=schedule)
        bench.config(f"IX {spacing}K = {last_k}", config)
        if (adapter := lora / f"k{last_k}" / "lora").exists():
            bench.config(f"IX {spacing}K = {last_k}, LoRA", config, adapter)
    for name, schedule in schedules(bench, artefact, trained).items():
        bench.config(f"VIII schedule: {name}", replace(trained, schedule=schedule))
    for ratio in (0.5, 0.6, 0.7, 0.8, 0.9):
        bench.config(f"VII ratio {ratio}: predictor", replace(trained, ratio=ratio))
        bench.config(f"VII ratio {ratio}: random", replace(trained, ratio=ratio, scorer="random"))
    bench.config("VII ratio 1.0: nothing recomputed", replace(trained, ratio=1.0, scorer="random"))
    for steps in (12, 17, 20, 25):
        bench.fewer_steps(steps)


def schedules(bench: Bench, artefact: Path, trained: CacheConfig) -> dict[str, tc.Schedule]:
    """The strategies of Table VIII at 12 I-steps of 50, and the regular spacings beside them."""
    found = {"uniform": tc.Schedule.uniform(STEPS, FULL_STEPS), "every 4 (13 I-steps)": tc.Schedule(4)}
    alpha = Calibration.load(artefact / "calibration.safetensors").mean_alpha.tolist()
    for beta in (-1.0, 1.0):
        mass = by_mass(alpha, FULL_STEPS, beta, relative=True)
        found[f"Eq. 13 mass, β = {beta:g} std"] = mass
        found[f"reverse of mass, β = {beta:g} std"] = reverse(mass, STEPS)
    found["Eq. 13 accumulated, β = -1 std"] = by_mass(alpha, FULL_STEPS, -1.0, accumulated=True, relative=True)
    name = "optimal (interval errors)"
    if not bench.missing(f"VIII schedule: {name}"):
        return found
    conditions = Conditions.of_labels(torch.arange(4), NULL_LABEL, GUIDANCE)
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    scheduler.set_timesteps(STEPS)
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(7))
    stack = BlockStack(bench.net, GuidedCall(bench.net, conditions).kwargs(noise, scheduler.timesteps[0]))
    costs = interval_errors(stack, scheduler, noise, conditions, STEPS, trained.last_k, trained.forecast, 8)
    found[name] = optimal(costs, STEPS, FULL_STEPS)
    return found


if __name__ == "__main__":
    typer.run(main)
