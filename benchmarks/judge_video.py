"""Judge the reference video model, uncached and cached: 50 guided steps of diffusers' ancestral Euler sampler.

    python benchmarks/judge_video.py              # → benchmarks/results/judge_video.json, docs/text_to_video.md, .png and .gif
    python benchmarks/judge_video.py --page-only  # the page anew from the JSON

1. *Search*: cached settings with at least 1.9x fewer MACs on every tenth caption, by their PSNR to the uncached clips.
2. *Judged*: the uncached run, the best setting of the search and fewer steps at equal MACs, on every caption with several noises, by
   video_judge.py. Real clips of test objects stand beside them.

The noise that the sampler adds at every step is drawn from one seed a batch, so that all runs of a batch get the same.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import EulerAncestralDiscreteScheduler, WanTransformer3DModel
from judged import best_of, opened, save
from moving_fashion import CAPTIONS, FRAMES, MovingFashion
from pixart_page import CACHED, FEWER, UNCACHED, named
from reference_video import GUIDANCE, MODEL, STEPS, guided_captions
from torch import Tensor
from train_video import SCHEDULER_CONFIG
from video_judge import VideoJudge
from video_page import animation, contact_sheet, page

import tokencache_compile as tc
from tokencache_compile.metrics import psnr
from tokencache_compile.sampling import sample, seeded

ROOT = Path(__file__).resolve().parent.parent
RESULT, DOCS = ROOT / "benchmarks" / "results" / "judge_video.json", ROOT / "docs"
FEWER_STEPS, BATCH, MIN_SPEED_UP = 25, 10, 1.9
FEWER_SEARCHED = (25, 17)  # about 2x and 3x fewer MACs

Settings = dict[str, Any]
EVERY_SECOND, EVERY_THIRD, EVERY_FOURTH = (tuple(range(0, STEPS, every)) for every in (2, 3, 4))
EVERY_FOURTH_AND_LAST = (*EVERY_FOURTH, STEPS - 1)  # what the package takes for 50 steps where nothing is asked for; and forecast 0
SEARCH: tuple[Settings, ...] = (
    dict(full=EVERY_SECOND, ratio=1.0, forecast=0),
    dict(full=EVERY_SECOND, ratio=1.0, forecast=1),
    dict(full=EVERY_SECOND, ratio=1.0, forecast=2),
    dict(full=EVERY_THIRD, ratio=0.9, forecast=1),
    dict(full=EVERY_THIRD, ratio=0.9, forecast=1, scorer="change"),
    dict(full=EVERY_FOURTH, ratio=0.9, forecast=1),
    dict(full=EVERY_FOURTH, ratio=0.9, forecast=2),
    dict(full=EVERY_FOURTH_AND_LAST, ratio=0.9, forecast=2),
    dict(full=EVERY_FOURTH_AND_LAST, ratio=0.9, forecast=0),
    dict(full=EVERY_THIRD, ratio=0.9, forecast=0, context="kept", history="computed"),
)


def config_of(settings: Settings) -> tc.CacheConfig:
    """One selection for both halves of a guided batch; everything else as ``settings`` say."""
    rest = {name: value for name, value in settings.items() if name != "full"}
    return tc.CacheConfig(selection="pair", schedule=tc.Schedule(full=tuple(settings["full"])), **rest)


class Bench:
    """The model, its captions encoded, and what was measured so far."""

    def __init__(self, model: Path, out: Path) -> None:
        self.out = out
        self.conditions = guided_captions(torch.arange(len(CAPTIONS)))
        self.net = WanTransformer3DModel.from_pretrained(model, torch_dtype=torch.bfloat16).eval()
        config = self.net.config
        settings = {
            "sampler": "Euler ancestral", "dtype": "bfloat16", "scheduler": SCHEDULER_CONFIG, "steps": STEPS, "guidance": GUIDANCE,
            "captions": len(CAPTIONS), "blocks": config.num_layers, "width": config.num_attention_heads * config.attention_head_dim,
            "patch": list(config.patch_size), "weights": sum(p.numel() for p in self.net.parameters()),
        }  # fmt: skip
        self.result = opened(out, model, settings)

    def draw(self, captions: Tensor, seed: int, plan: tc.CacheConfig, steps: int) -> tuple[Tensor, float]:
        """One clip for each of ``captions`` [n], [n, 3, 16, 32, 32], and the MACs of one, with guidance."""
        scheduler = EulerAncestralDiscreteScheduler(**SCHEDULER_CONFIG)
        net = tc.transform(self.net, plan, scheduler=scheduler, backend="eager")
        done = []
        for number, part in enumerate(captions.split(BATCH)):
            given = {name: value[part] for name, value in self.conditions.given.items()}
            conditions = replace(self.conditions, given=given)
            with seeded(1000 * seed + number):
                noise = torch.randn(len(part), 3, FRAMES, 32, 32).bfloat16()
                done.append(sample(net, scheduler, noise, steps, conditions).float().clamp(-1, 1))
        return torch.cat(done), net.summary().macs / len(part)

    def search(self) -> Settings:
        """Measure what is missing of :data:`SEARCH`; returns the best of the settings that are cheap enough."""
        rows = self.result["search"]
        missing = [settings for settings in SEARCH if named(settings) not in rows]
        if missing:
            captions = torch.arange(0, len(CAPTIONS), 10) + torch.arange(len(CAPTIONS) // 10) % 10  # every class, colour and direction
            reference, macs = self.draw(captions, 1, tc.CacheConfig(ratio=0.0), STEPS)
            for steps in FEWER_SEARCHED:
                clips, few_macs = self.draw(captions, 1, tc.CacheConfig(ratio=0.0), steps)
                plain = self.result.setdefault("search_plain", {})
                plain[str(steps)] = {"psnr_db": psnr(clips, reference), "speed_up": macs / few_macs}
            for settings in missing:
                clips, cached_macs = self.draw(captions, 1, config_of(settings), STEPS)
                rows[named(settings)] = {"settings": settings, "psnr_db": psnr(clips, reference), "speed_up": macs / cached_macs}
                print(named(settings), rows[named(settings)], flush=True)
                save(self.result, self.out)
        return best_of(self.result, MIN_SPEED_UP)

    def judge(self, best: Settings, noises: int) -> None:
        """Every caption with ``noises`` noises: the rows of the page, and its pictures."""
        runs: dict[str, tuple[Settings | None, int]] = {UNCACHED: (None, STEPS), CACHED: (best, STEPS), FEWER: (None, FEWER_STEPS)}
        judge, real, count = VideoJudge(MovingFashion("train")), MovingFashion("test"), len(CAPTIONS)
        captions = torch.arange(count).repeat(noises)
        held_out = real.clips(captions, real.pick(captions, torch.Generator().manual_seed(0)))
        self.result["real"] = judge(held_out, captions).shares()
        first: dict[str, Tensor] = {"real": held_out[:count]}
        for name, (settings, steps) in runs.items():
            plan = tc.CacheConfig(ratio=0.0) if settings is None else config_of(settings)
            clips, macs = self.draw(captions, 0, plan, steps)
            first[name] = clips[:count]
            if name == UNCACHED:
                reference, full_macs = clips, macs
            verdicts = [judge(part, asked).shares() for part, asked in zip(clips.split(count), captions.split(count), strict=True)]
            self.result["judged"][name] = {
                "settings": settings, "steps": steps, "macs": macs, "speed_up": full_macs / macs, "samples": len(captions),
                "psnr_db": None if name == UNCACHED else psnr(clips, reference),
                **{aspect: statistics.mean(verdict[aspect] for verdict in verdicts) for aspect in verdicts[0]},
            }  # fmt: skip
            print(name, self.result["judged"][name], flush=True)
            save(self.result, self.out)
        contact_sheet(first).save(DOCS / "text_to_video.png")
        pictures = animation(first)
        pictures[0].save(DOCS / "text_to_video.gif", save_all=True, append_images=pictures[1:], duration=90, loop=0)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the video model, as save_pretrained wrote it.")] = MODEL,
    out: Annotated[Path, typer.Option(help="JSON file; settings that its search has are not run again.")] = RESULT,
    noises: Annotated[int, typer.Option(help="Noises a caption of the judged runs.", min=1)] = 1,
    page_only: Annotated[bool, typer.Option(help="Measure nothing, write the page from the JSON.")] = False,
    threads: int = 2,
) -> None:
    """Search, judge and write the page."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if not page_only:
        bench = Bench(model, out)
        bench.judge(bench.search(), noises)
    (DOCS / "text_to_video.md").write_text(page(json.loads(out.read_text()), MIN_SPEED_UP))


if __name__ == "__main__":
    typer.run(main)
