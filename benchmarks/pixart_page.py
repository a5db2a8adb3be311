# ruff: noqa: E501  the text below is prose with figures in it
"""The page docs/text_to_image.md and its picture, from what judge_pixart.py measured."""

from __future__ import annotations

from typing import Any

import torch
from emoji import STYLES, Emoji
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

UNCACHED, CACHED, FEWER = "uncached", "cached", "fewer steps"


def named(settings: dict[str, Any]) -> str:
    """ "I-steps 0 3 6 9, ratio 0.8, forecast 1, change" """
    more = [str(settings[name]) for name in ("context", "scorer") if name in settings]
    more += [f"K = {settings['last_k']}"] if "last_k" in settings else []
    more += [settings["adapter"]] if "adapter" in settings else []
    return ", ".join([f"I-steps {' '.join(map(str, settings['full']))}", f"ratio {settings['ratio']:g}", f"forecast {settings['forecast']}", *more])


def contact_sheet(emoji: Emoji, runs: dict[str, Tensor], columns: int = 13, zoom: int = 2) -> Image.Image:
    """Above, pairs that training saw, below, held-out ones: the real picture, then one row a run, all from one noise."""
    seen, held_out = (~emoji.held_out).nonzero()[:, 0], emoji.held_out.nonzero()[:, 0]
    blocks = [
        (f"{words} in training", pairs[torch.linspace(0, len(pairs) - 1, columns).long()])
        for words, pairs in (("seen", seen), ("never seen", held_out))
    ]
    cell, left, head = 32 * zoom + 8, 120, 62
    names = ["real", *runs]
    sheet = Image.new("RGB", (left + columns * cell, 2 * (head + len(names) * cell)), "white")
    pen, text, small = ImageDraw.Draw(sheet), ImageFont.load_default(14), ImageFont.load_default(11)
    for block, (title, pairs) in enumerate(blocks):
        top = block * (head + len(names) * cell)
        pen.text((6, top + 6), title, "black", text)
        for column, pair in enumerate(pairs.tolist()):
            words = [*emoji.names[pair // len(STYLES)].split()[-3:], STYLES[pair % len(STYLES)]]
            for line, word in enumerate(words):
                colour = "#777777" if line == len(words) - 1 else "black"
                pen.text((left + column * cell, top + head - 13 * (len(words) - line)), word[:11], colour, small)
            for row, images in enumerate([emoji.images, *runs.values()]):
                pixels = images[pair].add(1).mul(127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
                picture = Image.fromarray(pixels).resize((32 * zoom, 32 * zoom), Image.Resampling.BICUBIC)
                sheet.paste(picture, (left + column * cell, top + head + row * cell))
        for row, name in enumerate(names):
            pen.text((6, top + head + row * cell + 24), name, "black", text)
    return sheet


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def page(result: dict[str, Any], min_speed_up: float) -> str:
    """The page docs/text_to_image.md."""
    settings, real, judged = result["settings"], result["real"], result["judged"]
    uncached, cached = judged[UNCACHED], judged[CACHED]

    def spread(row: dict[str, Any], name: str, digits: int) -> str:
        value = row["all"][name] if name in row["all"] else row[name]
        return f"{value:.{digits}f} ± {row[f'{name}_spread']:.{digits}f}"

    rows = []
    for name, row in judged.items():
        label = f"{name}: {row['steps']} steps" if row["settings"] is None else f"{name}: {named(row['settings'])}"
        closeness = "–" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        everything, held_out = row["all"], row["held_out"]
        nearest = [f"{row['nearest'][share]:.1%}" for share in ("first", "few")]
        shares = [f"{everything['concept']:.1%}", f"{everything['style']:.1%}", f"{held_out['concept']:.1%}", *nearest]
        rows.append([label, f"{row['speed_up']:.2f}×", closeness, spread(row, "score", 2), *shares, spread(row, "frechet", 2)])
    truth = real["seen"]["score"] * (1 - settings["held_out"] / settings["pairs"]) + real["held_out"]["score"] * settings["held_out"] / settings["pairs"]
    shares = [f"{real['held_out']['concept']:.1%}", *(f"{real['nearest'][share]:.1%}" for share in ("first", "few"))]
    rows.append(["real pictures", "", "", f"{truth:.2f}", f"{real['seen']['concept']:.1%} (seen)", f"{real['seen']['style']:.1%} (seen)", *shares, "0"])
    head = [
        "run", "fewer MACs", "PSNR to uncached (dB)", "text-image score", "concept right", "style right",
        "concept right, held-out pairs", "held-out: nearest concept", "held-out: of the five nearest", "Fréchet",
    ]  # fmt: skip
    fewer = result["search_plain"]
    plain = [[f"{judged[FEWER]['steps']} steps, uncached", f"{fewer['speed_up']:.2f}×", f"{fewer['psnr_db']:.1f}"]]
    tried = [[name, f"{row['speed_up']:.2f}×", f"{row['psnr_db']:.1f}"] for name, row in result["search"].items()]
    search = sorted([*plain, *tried], key=lambda row: -float(row[2]))
    score_change = cached["all"]["score"] / uncached["all"]["score"] - 1
    frechet_change = cached["frechet"] / uncached["frechet"] - 1
    return f"""# Text to image: the reference PixArt

Written by `python benchmarks/judge_pixart.py`; do not edit.

`tokencache_compile/reference/pixart` is diffusers' `PixArtTransformer2DModel` ({settings["blocks"]} blocks, width {settings["width"]}, 64 tokens, {settings["weights"] / 1e6:.1f} M weights),
trained by `benchmarks/train_pixart.py` on one CPU core with {settings["training"]["images"]:,} images shown. Data: {settings["concepts"]} concepts of food and drink, each drawn by three
designers, 32×32 pixels (Google's Noto, Apache-2.0; Twemoji by Twitter, Inc and other contributors, CC-BY-4.0; Microsoft's Fluent, MIT); captions such as "hot dog, fluent style", encoded by MiniLM (12 token states, masked). Of the {settings["pairs"]} (concept, style) pairs
{settings["held_out"]} were held out: the model saw their concept in the two other styles only. v-prediction, {settings["training"]["caption_dropout"]:.0%} of the captions empty, guidance {settings["guidance"]:g}.
The run was lengthened twice when time allowed (planned for 130,000, then 250,000 images), so its learning rate rose again at 130,000 and 207,000.

![Real pictures and samples](text_to_image.png)

Captions of training give the picture they are of. Most held-out ones show their concept (burrito, tangerine, strawberry, waffle, shaved ice); a few do not (spoon, bowl with spoon).

## Uncached and cached

{settings["steps"]} DPM-Solver++ steps through `PixArtAlphaPipeline` in bfloat16, {uncached["samples"]:,} samples a row: every caption with {uncached["samples"] // settings["pairs"]} noises, the same in every row; ± is the standard deviation between noises.

{table(head, rows)}

- Cached against uncached, at {cached["speed_up"]:.2f}× fewer MACs: text-image score {score_change:+.2%}, Fréchet distance {frechet_change:+.2%}. Table III of the paper (PixArt-α, 1.95×): CLIP score +0.1 % (MSCOCO) and −0.2 %
  (PartiPrompts), FID −1.0 %.
- Text-image score: 100 · cosine of two linear heads on frozen EfficientNet-Lite0 and MiniLM, trained on the same pairs as the generator (`benchmarks/text_image_score.py`). A concept is right if the caption
  nearest to the picture, of all {settings["pairs"]}, is one of its three. On the real held-out pictures, which the heads did not see, the concept is right for {real["held_out"]["concept"]:.1%}: that is how far held-out figures can be read.
- Held-out pairs, once more without any training (`benchmarks/nearest_picture.py`): of the {settings["concepts"]} concepts, the one with the nearest real picture (8×8 pixels) is that of the caption for
  {uncached["nearest"]["first"]:.0%} of the samples, and one of the five nearest for {uncached["nearest"]["few"]:.0%}; real held-out pictures, compared with all but themselves, are at {real["nearest"]["first"]:.0%} and {real["nearest"]["few"]:.0%}. So the model draws the concept. Whether it
  takes over the style cannot be told: the heads find it right for {uncached["held_out"]["style"]:.0%}, and for {real["held_out"]["style"]:.0%} of the real held-out pictures, where one in three is chance.
- Fréchet distance as in `benchmarks/frechet.py`, to the real pictures. The same pictures mirrored are at {real["frechet_mirrored"]:.2f}, those of one style alone at {real["frechet_other_style"]:.2f}.

## What was searched

One noise for every third concept, PSNR to the uncached images of {settings["steps"]} steps. The best with at least {min_speed_up:g}× fewer MACs is the cached run above. Context `reuse` and scores `random` where none is named; the paper's context is `kept`, forecast 0.

I-steps 0 2 4 … 18 19 with ratio 0.9 and forecast 2 are what the package takes for 20 steps where nothing is asked for. `predictor` is that of `tokencache_compile/reference/cache_pixart`, whose plan is the cached
run above, and `LoRA` that of `cache_pixart_lora`, both trained by `benchmarks/train_pixart_cache.py` for the I-steps 0 4 8 11 14 16 18 19, forecast 1: to be read beside the rows of the same I-steps and K.
With nothing recomputed there are no scores.

{table(["setting", "fewer MACs", "PSNR (dB)"], search)}
"""
