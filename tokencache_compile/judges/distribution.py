"""How a set of images compares with real ones, by the definitions of the ADM evaluator (guided-diffusion, evaluations/evaluator.py).

    FID                the Fréchet distance of two Gaussians fitted to pooled features; sFID: of spatial ones
    inception score    exp of the mean KL divergence of a sample's class probabilities from their mean
    precision          the share of samples inside the real images' manifold; recall: of real images inside the samples'

The manifold of a set is the union of balls about its features, each as wide as the distance to its third neighbour. The network that
makes the features is whatever :class:`FeatureNetwork` is given; published figures need Inception (``judges/inception.py``), and 50,000
samples. Distances are taken in float32, where ADM begins in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokencache_compile.errors import ConfigError

NEIGHBOUR, SPLIT = 3, 5000


@dataclass(frozen=True)
class Features:
    """What a network sees in n images: ``pooled`` [n, d], ``spatial`` [n, s] and class ``probabilities`` [n, classes]."""

    pooled: Tensor
    spatial: Tensor
    probabilities: Tensor


FeatureNetwork = Callable[[Tensor], Features]  # of images [n, 1 or 3, H, W] in [-1, 1]
Images = Tensor | Iterable[Tensor]  # a set of such images, whole or in parts
Moments = tuple[Tensor, Tensor]  # mean [d] and covariance [d, d]


def features(network: FeatureNetwork, images: Images, batch: int = 64) -> Features:
    """What ``network`` sees in ``images``, so many at a time; of parts, one is held at a time."""
    whole = (images,) if isinstance(images, Tensor) else images
    with torch.inference_mode():
        parts = [network(few) for part in whole for few in part.split(batch)]
    names = ("pooled", "spatial", "probabilities")
    return Features(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def moments(rows: Tensor) -> Moments:
    """Mean [d] and covariance [d, d] of ``rows`` [n, d], in float64."""
    rows = rows.double()
    return rows.mean(0), torch.cov(rows.T)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|μ₁ − μ₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½) of two Gaussians given by their moments."""
    (mean, covariance), (other_mean, other_covariance) = first, second
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    return float((mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross)


def inception_score(probabilities: Tensor, split: int = SPLIT) -> float:
    """Of class probabilities [n, classes]: the mean of the scores of each ``split`` samples."""
    scores = []
    for part in probabilities.double().split(split):
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(real: Tensor, samples: Tensor, neighbour: int = NEIGHBOUR, rows: int = 5000) -> tuple[float, float]:
    """Of features [n, d] of real images and of samples; ``rows`` of the distances are held at a time.

    Raises:
        ConfigError: a set has too few images for its manifold.
    """
    if min(len(real), len(samples)) <= neighbour:
        raise ConfigError(f"{len(real)} real images and {len(samples)} samples were given; {neighbour + 1} of each are needed.")
    real_radii, sample_radii = (_radii(own, neighbour, rows) for own in (real, samples))
    return _inside(samples, real, real_radii, rows), _inside(real, samples, sample_radii, rows)


def _radii(own: Tensor, neighbour: int, rows: int) -> Tensor:
    """Distance of each of ``own`` to its ``neighbour``-th other one, [n]."""
    found = [torch.cdist(part, own).kthvalue(neighbour + 1, dim=1).values for part in own.split(rows)]  # the nearest is itself
    return torch.cat(found)


def _inside(points: Tensor, centres: Tensor, radii: Tensor, rows: int) -> float:
    """The share of ``points`` inside a ball about one of ``centres``."""
    return float(torch.cat([(torch.cdist(part, centres) <= radii).any(1) for part in points.split(rows)]).double().mean())


class DistributionJudge:
    """FID, sFID, inception score, precision and recall of sets of images against real ones.

    Args:
        network: makes the features.
        real: the images [n, 1 or 3, H, W] in [-1, 1] that are measured against, whole or in parts.
        held_out: other real images, for what they themselves come to.
        known: moments of the pooled and of the spatial features of more real images than ``real``, which FID and sFID are then to:
            ADM's reference batches bring those of the whole training set.

    Raises:
        ConfigError: ``known`` is of another network.
    """

    def __init__(
        self, network: FeatureNetwork, real: Images, held_out: Tensor | None = None, known: tuple[Moments, Moments] | None = None
    ) -> None:
        self.network, self.held_out = network, held_out
        self.real = features(network, real)
        own = self.real.pooled.shape[1], self.real.spatial.shape[1]
        if known is not None and (widths := tuple(len(mean) for mean, _ in known)) != own:
            raise ConfigError(f"moments of {widths} features were given, and the network makes {own}. Take those of the same network.")
        self._pooled, self._spatial = known or (moments(self.real.pooled), moments(self.real.spatial))

    def __call__(self, images: Images) -> dict[str, float]:
        """The figures of ``images`` [n, 1 or 3, H, W] in [-1, 1]; in parts, so many that they are never held at once."""
        seen = features(self.network, images)
        precision, recall = precision_recall(self.real.pooled, seen.pooled)
        return {
            "fid": frechet_distance(moments(seen.pooled), self._pooled),
            "sfid": frechet_distance(moments(seen.spatial), self._spatial),
            "inception_score": inception_score(seen.probabilities),
            "precision": precision,
            "recall": recall,
        }

    def floor(self, count: int) -> dict[str, float]:
        """What ``count`` held-out real images come to.

        Raises:
            ConfigError: there are not so many.
        """
        if self.held_out is None or count > len(self.held_out):
            held_out = 0 if self.held_out is None else len(self.held_out)
            raise ConfigError(f"the figures of {count} real images were asked for and {held_out} are held out. Pass more.")
        return self(self.held_out[:count])
