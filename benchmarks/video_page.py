# ruff: noqa: E501  the text below is prose with figures in it
"""The page docs/text_to_video.md and its pictures, from what judge_video.py measured."""

from __future__ import annotations

from typing import Any

from moving_fashion import CAPTIONS, FRAMES
from PIL import Image, ImageDraw, ImageFont
from pixart_page import CACHED, UNCACHED, named, table
from torch import Tensor

SHOWN = tuple(20 * kind + 7 * kind % 20 for kind in range(len(CAPTIONS) // 20))  # one of every class, colours and directions mixed
LEFT, HEAD, ZOOM = 76, 52, 2


def _pixels(frame: Tensor) -> Image.Image:
    """A frame [3, 32, 32] in [-1, 1], enlarged."""
    picture = Image.fromarray(frame.add(1).mul(127.5).round().byte().permute(1, 2, 0).contiguous().numpy())
    return picture.resize((32 * ZOOM, 32 * ZOOM), Image.Resampling.BICUBIC)


def _blank(rows: list[str], row_height: int, columns: int, column_width: int) -> Image.Image:
    """A sheet with the captions shown above its columns and ``rows`` named on the left."""
    sheet = Image.new("RGB", (LEFT + columns * column_width, HEAD + len(rows) * row_height), "white")
    pen, small = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, caption in enumerate(SHOWN[:columns]):
        colour, *name, _, way = CAPTIONS[caption].split()
        for line, words in enumerate((colour, " ".join(name), way)):
            pen.text((LEFT + column * column_width, 6 + 14 * line), words, "black", small)
    for row, name_of_row in enumerate(rows):
        pen.text((6, HEAD + row * row_height + row_height // 2 - 8), name_of_row, "black", ImageFont.load_default(12))
    return sheet


def contact_sheet(runs: dict[str, Tensor], frames: tuple[int, ...] = (0, 7, 15)) -> Image.Image:
    """First, middle and last frame, one below the other, of a clip of every class; one block of rows a run."""
    cell = 32 * ZOOM + 4
    sheet = _blank(list(runs), len(frames) * cell + 8, len(SHOWN), cell)
    for row, clips in enumerate(runs.values()):
        for column, caption in enumerate(SHOWN):
            for line, frame in enumerate(frames):
                place = (LEFT + column * cell, HEAD + row * (len(frames) * cell + 8) + line * cell)
                sheet.paste(_pixels(clips[caption][:, frame]), place)
    return sheet


def animation(runs: dict[str, Tensor]) -> list[Image.Image]:
    """The same clips moving, one row a run; every frame once."""
    cell = 32 * ZOOM + 4
    pictures = []
    for frame in range(FRAMES):
        sheet = _blank(list(runs), cell, len(SHOWN), cell)
        for row, clips in enumerate(runs.values()):
            for column, caption in enumerate(SHOWN):
                sheet.paste(_pixels(clips[caption][:, frame]), (LEFT + column * cell, HEAD + row * cell))
        pictures.append(sheet.quantize(128))
    return pictures


def _trained(training: dict[str, Any]) -> str:
    """ "260,000 of 2 frames (60,000 objects), then 48,000 of 16 frames (640 objects)" """
    before = [_trained(training["before"])] if "before" in training else []
    return ", then ".join([*before, f"{training['clips']:,} of {training['frames']} frames ({training['objects']:,} objects)"])


def page(result: dict[str, Any], min_speed_up: float) -> str:
    """The page docs/text_to_video.md."""
    settings, real, judged = result["settings"], result["real"], result["judged"]
    uncached, cached, fewer = judged[UNCACHED], judged[CACHED], result["search_plain"]

    def figures(row: dict[str, Any]) -> list[str]:
        shares = [f"{row[name]:.1%}" for name in ("kind", "colour", "direction", "score")]
        return [*shares, f"{row['likelihood']:.3f}", f"{row['flicker']:.4f}"]

    rows = []
    for name, row in judged.items():
        label = f"{name}: {row['steps']} steps" if row["settings"] is None else f"{name}: {named(row['settings'])}"
        rows.append([label, f"{row['speed_up']:.2f}×", "–" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}", *figures(row)])
    rows.append(["real clips of test objects", "", "", *figures(real)])
    head = ["run", "fewer MACs", "PSNR to uncached (dB)", "class right", "colour right", "direction right", "mean of the three", "likelihood of the class", "flicker"]
    plain = [[f"{steps} steps, uncached", f"{row['speed_up']:.2f}×", f"{row['psnr_db']:.1f}"] for steps, row in fewer.items()]
    tried = [[name, f"{row['speed_up']:.2f}×", f"{row['psnr_db']:.1f}"] for name, row in result["search"].items()]
    search = sorted([*plain, *tried], key=lambda row: -float(row[2]))
    tokens = FRAMES * 32 * 32
    for size in settings["patch"]:
        tokens //= size
    patch = "×".join(map(str, settings["patch"]))
    change = cached["score"] / uncached["score"] - 1
    return f"""# Text to video: the reference video model

Written by `python benchmarks/judge_video.py`; do not edit.

`tokencache_compile/reference/video` is diffusers' `WanTransformer3DModel` ({settings["blocks"]} blocks, width {settings["width"]}, {tokens} tokens in patches of {patch}, {settings["weights"] / 1e6:.1f} M weights), trained by
`benchmarks/train_video.py` on two CPU cores; clips shown: {_trained(settings["training"])}. Data: Fashion-MNIST objects (MIT licence) in five colours crossing a black picture in four directions,
{FRAMES} frames of 32×32 RGB (`benchmarks/moving_fashion.py`); {settings["captions"]} captions such as "red sneaker moving left", encoded by MiniLM (12 token states). v-prediction, {settings["training"]["caption_dropout"]:.0%} of the captions
empty, guidance {settings["guidance"]:g}. The objects of the later stages are the 64 of each class that are most typical of it; with all 60,000 a model of this size drew outlines in the time there was.

![Real clips and samples, moving](text_to_video.gif)

First, middle and last frame of the same clips:

![Real clips and samples](text_to_video.png)

## Uncached and cached

{settings["steps"]} steps of diffusers' `EulerAncestralDiscreteScheduler` in bfloat16, {uncached["samples"]} clips a row: every caption with the same noise in every row, the noise that the sampler adds included.

{table(head, rows)}

- Cached against uncached, at {cached["speed_up"]:.2f}× fewer MACs: mean of the three shares {change:+.2%}, likelihood of the class {cached["likelihood"] / uncached["likelihood"] - 1:+.2%}. Table V of the paper (Open-Sora-Plan, 2.31×): VBench −1.1 %; its 25 steps
  −2.4 %.
- The judge (`benchmarks/video_judge.py`) never reads the caption: a CNN trained on frames of real training objects tells the class, the ratio of the channels the colour, the way of the middle of the brightness
  the direction. On real clips of test objects, which it did not see, its class is right for {real["kind"]:.1%}.
- Flicker: mean absolute difference between a frame and the one two later moved back by the pixel between them, over the range of the pixels.

## What was searched

{len(CAPTIONS) // 10} captions, PSNR to the uncached clips of {settings["steps"]} steps. The best with at least {min_speed_up:g}× fewer MACs is the cached run above. Context `reuse` and scores `random` where none is named; the paper's context is `kept`,
forecast 0. With nothing recomputed there are no scores. I-steps 0 4 … 48 49 with ratio 0.9 and forecast 0 are what the package takes for 50 steps of this sampler where nothing is asked for. The sampler adds
fresh noise at every step, so the updates of two I-steps differ by it, and forecasts carry the difference on: holding is better wherever both were measured.

{table(["setting", "fewer MACs", "PSNR (dB)"], search)}
"""
