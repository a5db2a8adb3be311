"""The data that published tables are measured on, as its authors' files; one that is something else is refused by name.

    ImageNet        the ADM evaluator's reference batch, an .npz
    MSCOCO-2017     captions_val2017.json and the folder val2017
    PartiPrompts    PartiPrompts.tsv
    VBench          VBench_full_info.json
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.judges.distribution import Moments
from tokencache_compile.pixels import from_bytes

BATCH = 64  # images that are held as floats at a time
_ADM = "https://github.com/openai/guided-diffusion/tree/main/evaluations (VIRTUAL_imagenet256_labeled.npz, VIRTUAL_imagenet512.npz)"
_COCO = "https://cocodataset.org/#download (annotations_trainval2017.zip, val2017.zip)"
_PARTI = "https://github.com/google-research/parti (PartiPrompts.tsv)"
_VBENCH = "https://github.com/Vchitect/VBench (vbench/VBench_full_info.json)"


def _there(path: Path, what: str, source: str) -> Path:
    if not path.exists():
        raise ConfigError(f"{what} was looked for in {path}, where there is none. Download it from {source}.")
    return path


def _refuse(path: Path, what: str, found: str, source: str) -> ConfigError:
    return ConfigError(f"{path} is no {what}: {found}. Download it again from {source}.")


@dataclass(frozen=True)
class ReferenceBatch:
    """Real images, and what ADM's authors measured on the whole training set. Iterating gives images [n, 3, H, W] in [-1, 1] in parts.

    Attributes:
        pixels: [n, H, W, 3] of uint8.
        known: moments of Inception's pooled and spatial features; None if the file has none.
    """

    pixels: np.ndarray
    known: tuple[Moments, Moments] | None

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.pixels), BATCH):
            yield from_bytes(torch.from_numpy(self.pixels[start : start + BATCH]).permute(0, 3, 1, 2))


def reference_batch(path: Path) -> ReferenceBatch:
    """ADM's reference batch: ``arr_0`` [n, H, W, 3] of uint8 and, in the published ones, ``mu``, ``sigma``, ``mu_s`` and ``sigma_s``.

    Raises:
        ConfigError: there is no such file, or it is something else.
    """
    what = "reference batch of the ADM evaluator"
    try:
        with np.load(_there(path, f"a {what}", _ADM), allow_pickle=False) as file:
            held = {name: file[name] for name in ("arr_0", "mu", "sigma", "mu_s", "sigma_s") if name in file}
    except (ValueError, OSError, TypeError, zipfile.BadZipFile) as error:  # a TypeError: a bare array, not an .npz
        raise _refuse(path, what, str(error), _ADM) from error
    pixels = held.pop("arr_0", None)
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        found = "no arr_0" if pixels is None else f"arr_0 is {pixels.dtype} {list(pixels.shape)} and not uint8 [n, H, W, 3]"
        raise _refuse(path, what, found, _ADM)
    if 0 < len(held) < 4:
        raise _refuse(path, what, f"of mu, sigma, mu_s and sigma_s it has only {', '.join(held)}", _ADM)
    values = {name: torch.from_numpy(value).double() for name, value in held.items()}
    known = ((values["mu"], values["sigma"]), (values["mu_s"], values["sigma_s"])) if values else None
    return ReferenceBatch(pixels, known)


@dataclass(frozen=True)
class Pictures:
    """Files of images. Iterating gives them [n, 3, size, size] in [-1, 1] in parts: the middle square, resized.

    Raises:
        ConfigError: a file is missing or is no image.
    """

    files: tuple[Path, ...]
    size: int

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.files), BATCH):
            yield torch.stack([self._square(file) for file in self.files[start : start + BATCH]])

    def _square(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                square = image.convert("RGB").resize(
                    (self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
                )
        except (OSError, UnidentifiedImageError) as error:
            raise ConfigError(f"{file} cannot be read as an image: {error}. Unpack the images again.") from error
        return from_bytes(torch.from_numpy(np.array(square)).permute(2, 0, 1))


def coco(captions: Path, images: Path, size: int) -> tuple[list[str], Pictures]:
    """MSCOCO's captions in the order of their numbers, and its images.

    Raises:
        ConfigError: a file is missing, or is something else.
    """
    what = "file of MSCOCO's captions"
    _there(images, "the folder of MSCOCO's images", _COCO)
    held = _json(captions, what, _COCO)
    try:
        ordered = sorted(held["annotations"], key=lambda annotation: annotation["id"])
        texts = [_text(annotation["caption"]) for annotation in ordered]
        files = tuple(images / _text(image["file_name"]) for image in held["images"])
    except (KeyError, TypeError) as error:
        raise _refuse(captions, what, f"{error!r} where annotations with captions and images with file names are needed", _COCO) from error
    if not texts or not files:
        raise _refuse(captions, what, f"it has {len(texts)} captions and {len(files)} images", _COCO)
    if not files[0].is_file():
        raise ConfigError(f"{captions} names {files[0].name}, which {images} does not hold. Name the folder of the images of that split.")
    return texts, Pictures(files, size)


def parti_prompts(path: Path) -> list[str]:
    """The prompts of PartiPrompts, whose columns are parted by tabs and nothing is quoted.

    Raises:
        ConfigError: there is no such file, or it is something else.
    """
    what = "table of PartiPrompts"
    try:
        lines = _there(path, f"the {what}", _PARTI).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _refuse(path, what, str(error), _PARTI) from error
    heads = (lines or [""])[0].split("\t")
    if heads[:2] != ["Prompt", "Category"] or len(lines) < 2:
        raise _refuse(path, what, f"it begins with {heads[0][:40]!r} and has {len(lines)} lines", _PARTI)
    return [line.split("\t")[0] for line in lines[1:] if line]


def vbench_prompts(path: Path) -> list[str]:
    """VBench's prompts, each once though several dimensions share it.

    Raises:
        ConfigError: there is no such file, or it is something else.
    """
    what = "list of VBench's prompts"
    held = _json(path, what, _VBENCH)
    try:
        found = list(dict.fromkeys(_text(entry["prompt_en"]) for entry in held))
    except (KeyError, TypeError) as error:
        raise _refuse(path, what, f"{error!r} where entries with prompt_en are needed", _VBENCH) from error
    if not found:
        raise _refuse(path, what, "it has no prompt", _VBENCH)
    return found


def _json(path: Path, what: str, source: str) -> Any:
    try:
        return json.loads(_there(path, f"a {what}", source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _refuse(path, what, str(error), source) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value
