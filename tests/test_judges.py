"""Judges of image sets against the definitions written out as plain loops, on features small enough to follow."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from pipelines_tiny import SMALL, VOCABULARY, tokenizer
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.judges.distribution import DistributionJudge, Features, frechet_distance, inception_score, moments, precision_recall
from tokencache_compile.judges.inception import Inception
from tokencache_compile.judges.text_image import ClipScore, ImageReward
from tokencache_compile.judges.video import vbench


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(images: Tensor) -> Features:
    """Features that anyone can compute: means of quarters, pixels of a row, and a softmax of the quarters."""
    quarters = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), images.shape[-1] // 2).flatten(1)
    return Features(quarters, images[:, 0, 0, :4], (8 * quarters).softmax(1))


def test_frechet_distance_of_what_has_a_closed_form() -> None:
    # Of diagonal covariances the square root is entry by entry.
    first = torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double()
    second = torch.tensor([0.0, 4.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double()
    assert frechet_distance(first, second) == pytest.approx((1 + 4) + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    (mean, covariance), (other_mean, other) = moments(normal(40, 3)), moments(normal(40, 3, seed=1) @ normal(3, 3, seed=2))
    values = torch.linalg.eigvals(covariance @ other)  # ADM takes the root of this product; its trace is the sum of their roots
    expected = (mean - other_mean).square().sum() + covariance.trace() + other.trace() - 2 * values.real.clamp_min(0).sqrt().sum()
    assert frechet_distance((mean, covariance), (other_mean, other)) == pytest.approx(float(expected))


def test_inception_score_by_hand() -> None:
    rows = (2 * normal(10, 4)).softmax(1)
    scores = []
    for part in (rows[:6].tolist(), rows[6:].tolist()):
        mean = [sum(column) / len(part) for column in zip(*part, strict=True)]
        divergence = [sum(p * math.log(p / q) for p, q in zip(row, mean, strict=True)) for row in part]
        scores.append(math.exp(sum(divergence) / len(part)))
    assert inception_score(rows, split=6) == pytest.approx(sum(scores) / 2)
    certain = torch.eye(5)
    assert inception_score(certain) == pytest.approx(5.0)  # five classes, each certain and equally often


def test_precision_and_recall_by_plain_loops() -> None:
    real, samples = normal(30, 2), 0.7 * normal(25, 2, seed=1) + 0.8

    def share(points: Tensor, own: Tensor) -> float:
        def distance(a: Tensor, b: Tensor) -> float:
            return math.dist(a.tolist(), b.tolist())

        radii = [sorted(distance(one, other) for j, other in enumerate(own) if j != i)[2] for i, one in enumerate(own)]
        inside = [any(distance(point, one) <= radius for one, radius in zip(own, radii, strict=True)) for point in points]
        return sum(inside) / len(inside)

    expected = share(samples, real), share(real, samples)
    assert 0 < expected[1] < expected[0] < 1  # samples narrower than the real ones: more precise than complete
    assert precision_recall(real, samples) == pytest.approx(expected)
    assert precision_recall(real, samples, rows=7) == pytest.approx(expected)


def test_a_manifold_needs_neighbours() -> None:
    with pytest.raises(ConfigError, match="3 real images and 9 samples were given; 4 of each are needed"):
        precision_recall(normal(3, 2), normal(9, 2))


def test_the_judge_tells_real_images_from_noise() -> None:
    def pictures(count: int, seed: int) -> Tensor:
        """Bright in one quarter."""
        images = 0.1 * normal(count, 1, 8, 8, seed=seed)
        for index in range(count):
            top, left = 4 * (index % 2), 4 * (index // 2 % 2)
            images[index, :, top : top + 4, left : left + 4] += 0.8
        return images.clamp(-1, 1)

    judge = DistributionJudge(network, pictures(64, 0), pictures(64, 1))
    floor, noise = judge.floor(64), judge(normal(64, 1, 8, 8, seed=3).clamp(-1, 1))
    assert floor["fid"] < 0.1 * noise["fid"] and floor["sfid"] < 0.1 * noise["sfid"]
    assert floor["precision"] > 0.9 and floor["recall"] > 0.9 and noise["precision"] < 0.2
    assert floor["inception_score"] > 2 * noise["inception_score"]
    with pytest.raises(ConfigError, match="65 real images were asked for and 64 are held out"):
        judge.floor(65)


def test_clip_score_is_the_cosine_of_the_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(3)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = size | {"image_size": 16, "patch_size": 8}
    text = SMALL | size | {"max_position_embeddings": 77}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    side = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**side), tokenizer())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    shown = normal(5, 1, 16, 16).clamp(-1, 1)
    prompts = [" ".join(VOCABULARY[3 + i : 6 + i]) for i in range(5)]
    expected = []
    for image, prompt in zip(shown, prompts, strict=True):
        picture = Image.fromarray(image[0].add(1).mul(127.5).round().to(torch.uint8).numpy()).convert("RGB")
        given = processor(text=[prompt], images=[picture], return_tensors="pt")
        with torch.no_grad():
            cosine = model(**given).logits_per_image / model.logit_scale.exp()
        expected.append(max(0.0, 100 * float(cosine)))
    assert 0 in expected and max(expected) > 30  # both sides of the cut are tried
    assert ClipScore(str(tmp_path), batch=2)(shown, prompts) == pytest.approx(sum(expected) / 5, rel=1e-4)
    with pytest.raises(ConfigError, match="5 images and 4 prompts"):
        ClipScore(str(tmp_path))(shown, prompts[:4])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a CLIP model was looked for"):
        ClipScore(str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install torch-fidelity|weights were looked for"):
        Inception(tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="pip install image-reward"):
        ImageReward()
    with pytest.raises(ConfigError, match="pip install vbench"):
        vbench(tmp_path, {}, tmp_path)


def test_image_reward_is_asked_as_its_package_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is replaced by one of the same calls: its weights are not at hand."""

    class Model:
        def score(self, prompt: str, image: Image.Image) -> float:
            assert image.mode == "RGB" and image.size == (4, 4)
            return len(prompt) + image.getpixel((0, 0))[0]

    package = types.ModuleType("ImageReward")
    package.load = lambda name, device: Model()  # type: ignore[attr-defined]
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    images = torch.stack([torch.full((1, 4, 4), -1.0), torch.full((1, 4, 4), 1.0)])
    assert ImageReward()(images, ["ab", "abcd"]) == pytest.approx((2 + 4 + 255) / 2)
