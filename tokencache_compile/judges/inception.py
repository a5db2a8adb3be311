"""Inception as FID takes it (TensorFlow's weights of 2015), by torch-fidelity: ``pip install torch-fidelity`` and its weight file.

The file is ``weights-inception-2015-12-05-6726825d.pth`` of github.com/toshas/torch-fidelity/releases/tag/v0.2.0.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.judges.distribution import Features
from tokencache_compile.pixels import to_bytes

SPATIAL = 7  # channels of mixed_6/conv that sFID takes


class Inception:
    """Features of images, by the weights in ``file``.

    Raises:
        ConfigError: torch-fidelity is not installed, or there is no such file.
    """

    def __init__(self, file: Path, device: str = "cpu") -> None:
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ConfigError("Inception's features were asked for and torch-fidelity is missing: pip install torch-fidelity.")
        if not file.is_file():
            raise ConfigError(
                f"Inception's weights were looked for in {file}, where there are none. Download weights-inception-2015-12-05-6726825d.pth "
                "from github.com/toshas/torch-fidelity/releases/tag/v0.2.0."
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network: Any = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
        self.network.to(device)
        self.device = device
        self._spatial = torch.empty(0)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)  # TensorFlow calls it mixed_6/conv

    def _keep(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)  # channels last, as in ADM's reference batches

    def __call__(self, images: Tensor) -> Features:
        """Of images [n, 1 or 3, H, W] in [-1, 1], which are first rounded to 8 bits."""
        pooled, logits = self.network(to_bytes(images).expand(-1, 3, -1, -1).to(self.device))
        return Features(pooled.cpu(), self._spatial.float().cpu(), logits.softmax(1).cpu())
