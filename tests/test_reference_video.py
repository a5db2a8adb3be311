"""The reference video model as it ships: it follows its captions, cached too; and the clips and the judge that it is measured by."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor

import tokencache_compile as tc
from tokencache_compile.metrics import psnr
from tokencache_compile.sampling import Conditions, sample, seeded

FOLDER = Path(tc.__file__).parent / "reference" / "video"
SCHEDULER: dict[str, Any] = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
STEPS, FRAMES = 16, 16
CAPTIONS = ("red T-shirt moving left", "green shirt moving up")


@pytest.fixture(scope="module")
def benchmarks() -> Any:
    """benchmarks/ on the path, where the scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
        yield


def draw(net: Any, plan: tc.CacheConfig) -> tuple[Tensor, Any]:
    """One clip a caption, [2, 3, 16, 32, 32], all noise from one seed; and the summary of the run."""
    with safe_open(FOLDER / "captions.safetensors", framework="pt") as file:
        names = json.loads(file.metadata()["captions"])
        states = file.get_tensor("states") * file.get_tensor("mask")[..., None]
    rows = [names.index(caption) for caption in CAPTIONS]
    conditions = Conditions({"encoder_hidden_states": states[rows]}, {"encoder_hidden_states": states[[names.index("")]]}, 2.5)
    scheduler = EulerAncestralDiscreteScheduler(**SCHEDULER)
    fast = tc.transform(net, plan, scheduler=scheduler, backend="eager")
    with seeded(0):
        clips = sample(fast, scheduler, torch.randn(len(rows), 3, FRAMES, 32, 32), STEPS, conditions)
    return clips.clamp(-1, 1), fast.summary()


def test_captions_are_followed_and_caching_keeps_the_clips(benchmarks: None) -> None:
    from moving_fashion import CAPTIONS as KNOWN
    from moving_fashion import meaning
    from video_judge import colour_of, direction_of, grey

    asked = meaning(torch.tensor([KNOWN.index(caption) for caption in CAPTIONS]))
    net = WanTransformer3DModel.from_pretrained(FOLDER).eval()
    uncached, _ = draw(net, tc.CacheConfig(ratio=0.0))
    cached, summary = draw(net, tc.CacheConfig(ratio=1.0, forecast=0, schedule=tc.Schedule(2)))
    for clips in (uncached, cached):
        assert torch.equal(colour_of(clips), asked.colour) and torch.equal(direction_of(grey(clips)), asked.direction)
        assert float(clips[..., :2, :2].mean()) < -0.9, "the corner is black"
    assert summary.cached_steps == STEPS // 2 and summary.macs < 0.53 * summary.macs_uncached
    closeness = psnr(cached, uncached)
    assert closeness > 25 and closeness > psnr(cached.roll(1, 0), uncached) + 6, "nearer to its own clip than to another caption's"


def test_the_attention_written_out_for_training_is_wans(benchmarks: None) -> None:
    from train_video import WrittenOutAttention

    torch.manual_seed(0)
    net = WanTransformer3DModel(
        patch_size=(2, 4, 4), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True,
    ).eval()  # fmt: skip
    given = (torch.randn(2, 3, 4, 8, 8), torch.tensor([10.0, 900.0]), torch.randn(2, 5, 8))
    with torch.no_grad():
        expected = net(*given, return_dict=False)[0]
        for block in net.blocks:
            block.attn1.set_processor(WrittenOutAttention())
            block.attn2.set_processor(WrittenOutAttention())
        torch.testing.assert_close(net(*given, return_dict=False)[0], expected, rtol=1e-5, atol=1e-5)
        for block in net.blocks:
            block.attn1.to_v.weight.mul_(2)
        assert not torch.allclose(net(*given, return_dict=False)[0], expected, atol=1e-3)


def write_idx(path: Path, values: np.ndarray) -> None:
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes())


@pytest.fixture
def objects(benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Twenty objects of noise, two a class, the second of each darker, where Fashion-MNIST is looked for."""
    images = np.random.default_rng(0).integers(100, 256, (20, 28, 28), dtype=np.uint8)
    images[1::2] //= 4
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(20, dtype=np.uint8) // 2)
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    from moving_fashion import MovingFashion

    return MovingFashion("train")


def test_clips_show_what_their_captions_say(objects: Any) -> None:
    """An object crosses the picture half a pixel a frame, unchanged, and colour, direction and class are those of the caption."""
    from moving_fashion import CAPTIONS as KNOWN
    from moving_fashion import DIRECTIONS, meaning
    from video_judge import colour_of, direction_of, flicker, grey

    captions = torch.arange(len(KNOWN))
    picked = objects.pick(captions, torch.Generator().manual_seed(0))
    clips, asked = objects.clips(captions, picked), meaning(captions)
    assert clips.shape == (200, 3, FRAMES, 32, 32) and float(clips.min()) == -1.0 and float(clips.max()) <= 1.0
    assert torch.equal(objects.labels[picked], asked.kind) and len(set(picked.tolist())) == 20
    for index, way in enumerate(DIRECTIONS.values()):
        some = clips[asked.direction == index]
        assert torch.equal(some[:, :, 2:], some[:, :, :-2].roll(way, (3, 4))), "two frames are one pixel, and nothing leaves the picture"
    assert torch.equal(colour_of(clips), asked.colour) and torch.equal(direction_of(grey(clips)), asked.direction)
    assert float(flicker(clips, asked.direction).max()) == 0.0
    assert torch.equal(objects.clips(captions[:3], picked[:3], first=6, frames=2), clips[:3, :, 6:8])


def test_the_judge_sees_what_is_wrong(objects: Any) -> None:
    from moving_fashion import meaning
    from video_judge import colour_of, direction_of, flicker, grey

    captions = torch.arange(0, 200, 7)
    clips, asked = objects.clips(captions, objects.pick(captions, torch.Generator().manual_seed(0))), meaning(captions)
    still = clips[:, :, :1].expand(-1, -1, FRAMES, -1, -1)
    assert direction_of(grey(still)).tolist() == [-1] * len(captions)
    backwards = direction_of(grey(clips.flip(2)))
    assert torch.equal(backwards, asked.direction ^ 1), "left for right, up for down"
    assert torch.equal(colour_of(clips.roll(1, 1))[asked.colour < 2], asked.colour[asked.colour < 2] + 1), "red turned green, green blue"
    assert float(flicker(still, asked.direction).min()) > 0.005


def test_typical_objects(objects: Any) -> None:
    """Nearest to the mean of their class, compared with the nearest mean of another."""
    from fashion_mnist import load_fashion_mnist
    from moving_fashion import MovingFashion, most_typical

    images, labels = load_fashion_mnist("train")
    chosen = most_typical(images, labels, 1)
    means = [images[labels == kind].mean(0) for kind in range(10)]

    def margin(index: int) -> float:
        to = [float((images[index] - mean).norm()) for mean in means]
        own = to.pop(int(labels[index]))
        return min(to) - own

    assert chosen.tolist() == [max((2 * kind, 2 * kind + 1), key=margin) for kind in range(10)]
    assert torch.equal(MovingFashion("train", typical=1).labels, torch.arange(10))
