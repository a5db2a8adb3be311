"""The data files of published tables: each read as its authors write it, and another file refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.datasets import BATCH, coco, parti_prompts, reference_batch, vbench_prompts
from tokencache_compile.pixels import to_bytes

PIXELS = np.random.default_rng(0).integers(0, 256, (BATCH + 3, 4, 4, 3), dtype=np.uint8)
MOMENTS = {"mu": np.arange(3.0), "sigma": np.eye(3), "mu_s": np.arange(2.0), "sigma_s": 2 * np.eye(2)}
COCO = {
    "annotations": [{"id": 9, "image_id": 1, "caption": "second"}, {"id": 4, "image_id": 1, "caption": "first"}],
    "images": [{"id": 1, "file_name": "wide.png"}, {"id": 2, "file_name": "high.png"}],
}
PARTI = 'Prompt\tCategory\tChallenge\tNote\na "quoted" sign\tArts\tBasic\t\n"begun and not ended\tArts\tBasic\tnote\n'
VBENCH = [
    {"prompt_en": "a cat", "dimension": ["color"]},
    {"prompt_en": "a dog", "dimension": ["scene"]},
    {"prompt_en": "a cat", "dimension": ["scene"]},
]


def test_reference_batch(tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    np.savez(path, arr_0=PIXELS, **MOMENTS)
    batch = reference_batch(path)
    parts = list(batch)
    assert [len(part) for part in parts] == [BATCH, 3]
    assert torch.equal(to_bytes(torch.cat(parts)), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert batch.known is not None
    (mean, covariance), (spatial_mean, spatial_covariance) = batch.known
    assert mean.tolist() == [0, 1, 2] and covariance.trace() == 3 and spatial_mean.tolist() == [0, 1] and spatial_covariance.trace() == 4
    np.savez(path, arr_0=PIXELS)
    assert reference_batch(path).known is None


def test_coco_images_are_middle_squares(tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps(COCO))
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide[..., 0].T.copy()).save(tmp_path / "high.png")  # one channel
    texts, pictures = coco(captions, tmp_path, 4)
    (images,) = pictures
    assert texts == ["first", "second"] and images.shape == (2, 3, 4, 4)
    assert torch.equal(images[0], torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 4, 4))
    assert torch.equal(images[1], torch.ones(3, 4, 4))
    (tmp_path / "high.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"high.png cannot be read as an image"):
        list(pictures)


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text(PARTI)
    assert parti_prompts(tmp_path / "p.tsv") == ['a "quoted" sign', '"begun and not ended']
    (tmp_path / "v.json").write_text(json.dumps(VBENCH))
    assert vbench_prompts(tmp_path / "v.json") == ["a cat", "a dog"]


def _npz(**arrays: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path.open("wb"), **arrays)


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def read_coco(path: Path) -> object:
    return coco(path, path.parent, 4)


@pytest.mark.parametrize(
    ("read", "write", "why"),
    [
        (reference_batch, _text("no zip"), "is no reference batch"),
        (reference_batch, _npz(images=PIXELS), "no arr_0"),
        (reference_batch, _npz(arr_0=PIXELS.astype(np.float32)), r"arr_0 is float32 \[67, 4, 4, 3\]"),
        (reference_batch, _npz(arr_0=PIXELS, mu=MOMENTS["mu"]), "it has only mu"),
        (reference_batch, _npz(arr_0=np.array([{}], dtype=object)), "is no reference batch"),  # a pickle is not opened
        (read_coco, _text("{"), "is no file of MSCOCO's captions"),
        (read_coco, _text("[]"), "annotations with captions"),
        (read_coco, _text(json.dumps(COCO | {"annotations": [{"id": 1, "caption": 3}]})), "annotations with captions"),
        (read_coco, _text(json.dumps(COCO | {"annotations": []})), "it has 0 captions and 2 images"),
        (read_coco, _text(json.dumps(COCO)), r"names wide.png, which .* does not hold"),
        (parti_prompts, _text("a prompt\na prompt\n"), "it begins with 'a prompt'"),
        (parti_prompts, lambda path: path.write_bytes(b"\xff\xfe\xff"), "is no table of PartiPrompts"),
        (vbench_prompts, _text("{"), "is no list of VBench's prompts"),
        (vbench_prompts, _text('[{"prompt": "a cat"}]'), "entries with prompt_en"),
        (vbench_prompts, _text("[]"), "it has no prompt"),
    ],
    ids=lambda value: getattr(value, "__name__", "")[:20] or re.sub(r"\W+", " ", str(value))[:30],
)
def test_another_file_is_refused(read: Callable[[Path], object], write: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    path = tmp_path / "given"
    with pytest.raises(ConfigError, match=r"was looked for in .*given, where there is none\. Download it from http"):
        read(path)
    write(path)
    with pytest.raises(ConfigError, match=why):
        read(path)
