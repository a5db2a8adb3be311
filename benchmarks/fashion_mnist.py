"""Fashion-MNIST as the reference models use it: 32x32, one channel, values in [-1, 1].

The data comes from Debian's package ``dataset-fashion-mnist`` (MIT licence), whose idx files are read as they are.
``make data`` installs it; ``FASHION_MNIST_DIR`` names another folder with the same four files.
"""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import torch

CLASS_NAMES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"


def _read_idx(path: Path) -> np.ndarray:
    with gzip.open(path, "rb") as file:
        _, _, _, rank = struct.unpack("BBBB", file.read(4))
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)


def load_fashion_mnist(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 1, 32, 32] in [-1, 1] (28x28 padded by 2) and labels [n] of ``split`` ("train" or "test")."""
    folder = Path(os.environ.get("FASHION_MNIST_DIR", DEBIAN_FOLDER))
    stem = {"train": "train", "test": "t10k"}[split]
    images_path = folder / f"{stem}-images-idx3-ubyte.gz"
    if not images_path.exists():
        raise FileNotFoundError(
            f"Fashion-MNIST was looked for in {folder} and {images_path.name} is not there. Run `make data` "
            "(Debian's package dataset-fashion-mnist) or set FASHION_MNIST_DIR."
        )
    images = torch.from_numpy(_read_idx(images_path).copy()).float().div_(127.5).sub_(1.0)
    labels = torch.from_numpy(_read_idx(folder / f"{stem}-labels-idx1-ubyte.gz").copy()).long()
    return torch.nn.functional.pad(images[:, None], (2, 2, 2, 2), value=-1.0), labels
