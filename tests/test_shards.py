"""Samples in shards: their values, shares of processes, going on, and judges that see one part at a time."""

from __future__ import annotations

import gc
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from processes import two_processes
from test_bench import STEPS, plain_run, subject
from test_bench import load as load_net
from test_judges import network, normal
from torch import Tensor

import tokencache_compile as tc
from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.methods import FEWER, Method, cached
from tokencache_compile.evidence.shards import SETTINGS, Shards, draw_shards, psnr_of_parts
from tokencache_compile.evidence.subjects import noise_of
from tokencache_compile.judges.distribution import DistributionJudge, features, moments
from tokencache_compile.metrics import psnr
from tokencache_compile.pixels import from_bytes, to_bytes

UNCACHED = Method("uncached", FEWER, None)
RANDOM = cached("random tokens", tc.CacheConfig(0.5, schedule=tc.Schedule(2)))
COUNT, SIZE = 5, 2  # shards of 2, 2 and 1


def drawn(folder: Path, method: Method = UNCACHED, process: int = 0, processes: int = 1) -> Shards:
    shards = Shards(folder, COUNT, SIZE)
    draw_shards(subject(), method, shards, "eager", process, processes)
    return shards


def contents(shards: Shards) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(shards.folder.iterdir())}


def test_samples_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    parts = list(drawn(tmp_path))
    assert [len(part) for part in parts] == [2, 2, 1]
    images = torch.cat(parts)
    expected, _ = plain_run(load_net(), STEPS)
    assert float((images - expected).abs().max()) < 2 / 255  # one level: half from rounding to 8 bits, and the sampler's own rounding
    assert float(images.std()) > 0.1


def test_eight_bits_come_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(levels)), levels)
    assert to_bytes(torch.tensor([-3.0, -1.0, 0.1, 1.0, 3.0])).tolist() == [0, 0, 140, 255, 255]


def test_noise_depends_on_the_number_alone() -> None:
    whole = noise_of(3, 0, 6, (2, 4))
    assert torch.equal(torch.cat([noise_of(3, 0, 2, (2, 4)), noise_of(3, 2, 4, (2, 4))]), whole)
    assert len({float(row[0, 0]) for row in torch.cat([whole, noise_of(4, 0, 6, (2, 4))])}) == 12


# --- shares and going on -----------------------------------------------------------------------------------------------

def share_of_this_process(folder: Path) -> None:
    state = PartialState(cpu=True)
    assert (state.num_processes, state.backend) == (2, "gloo")
    drawn(folder, RANDOM, state.process_index, state.num_processes)


def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    """On gloo, started as accelerate's launcher starts them: the same files, byte by byte."""
    with two_processes("test_shards", "share_of_this_process", tmp_path / "two"):
        one = drawn(tmp_path / "one", RANDOM)
    assert contents(Shards(tmp_path / "two", COUNT, SIZE)) == contents(one)


def test_shares_part_the_shards(tmp_path: Path) -> None:
    first = drawn(tmp_path, UNCACHED, 0, 2)
    assert first.missing() == [1]
    with pytest.raises(ConfigError, match=r"lacks 1 of 3 shards, the first of them 00001.safetensors"):
        list(first)
    assert drawn(tmp_path, UNCACHED, 1, 2).missing() == []


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole = contents(drawn(tmp_path))
    shards = Shards(tmp_path, COUNT, SIZE)
    os.replace(shards.path(1), tmp_path / ".00001.safetensors.0")  # as if killed while writing it
    times = {number: shards.path(number).stat().st_mtime_ns for number in (0, 2)}
    steps: list[None] = []
    draw_shards(subject(), UNCACHED, shards, "eager", advance=lambda: steps.append(None))
    assert len(steps) == 1 and contents(shards) == whole
    assert {number: shards.path(number).stat().st_mtime_ns for number in (0, 2)} == times


def test_samples_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    drawn(tmp_path)
    others = (
        (subject(), RANDOM, SIZE),
        (subject(), UNCACHED, 1),
        (replace(subject(), settings={"seed": 6}), UNCACHED, SIZE),
        (replace(subject(), steps=STEPS - 1), UNCACHED, SIZE),
    )
    for other, method, size in others:
        with pytest.raises(ConfigError, match="Name another folder, or delete it"):
            draw_shards(other, method, Shards(tmp_path, COUNT, size), "eager")
    assert SETTINGS in contents(Shards(tmp_path, COUNT, SIZE))


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 samples in files of 2"):
        Shards(tmp_path, 0, SIZE)
    shards = Shards(tmp_path, 1, 1)
    shards.path(0).write_bytes(b"cut off")
    with pytest.raises(ConfigError, match=r"00000.safetensors is no file of samples"):
        list(shards)


def test_latents_are_kept_as_what_is_seen_of_them(tmp_path: Path) -> None:
    decoded = replace(subject(), pixels=False, decode=lambda latents: latents.flip(-1))
    draw_shards(decoded, UNCACHED, Shards(tmp_path / "decoded", COUNT, SIZE), "eager")
    plain = torch.cat(list(drawn(tmp_path / "plain")))
    assert torch.equal(torch.cat(list(Shards(tmp_path / "decoded", COUNT, SIZE))), plain.flip(-1))


# --- judges ------------------------------------------------------------------------------------------------------------


def test_figures_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    shards, cached_run = drawn(tmp_path / "uncached"), drawn(tmp_path / "random", RANDOM)
    images, others = torch.cat(list(shards)), torch.cat(list(cached_run))
    real = normal(20, 1, 8, 8).clamp(-1, 1)
    judge = DistributionJudge(network, iter(real.split(7)))
    assert judge(shards) == pytest.approx(DistributionJudge(network, real)(images), rel=1e-5)
    assert judge(shards)["fid"] != pytest.approx(judge(cached_run)["fid"], rel=1e-3)
    assert psnr_of_parts(cached_run, shards) == pytest.approx(psnr(others, images))
    assert psnr_of_parts(shards, shards) == math.inf


def test_one_part_is_held_at_a_time() -> None:
    held: list[weakref.ref[Tensor]] = []

    def parts() -> Iterator[Tensor]:
        for seed in range(4):
            gc.collect()
            assert not any(part() is not None for part in held[:-1])
            part = normal(6, 1, 8, 8, seed=seed)
            held.append(weakref.ref(part))
            yield part

    assert len(features(network, parts(), batch=4).pooled) == 24


def test_known_moments_take_the_place_of_the_real_images() -> None:
    real, more, images = (normal(count, 1, 8, 8, seed=seed).clamp(-1, 1) for count, seed in ((20, 0), (90, 1), (12, 2)))
    seen = features(network, more)
    known = moments(seen.pooled), moments(seen.spatial)
    judges = (DistributionJudge(network, real, known=known), DistributionJudge(network, real), DistributionJudge(network, more))
    figures, of_real, of_more = (judge(images) for judge in judges)
    assert (figures["fid"], figures["sfid"]) == (of_more["fid"], of_more["sfid"])
    assert (figures["precision"], figures["recall"]) == (of_real["precision"], of_real["recall"])
    assert of_real["fid"] != pytest.approx(of_more["fid"], rel=1e-3)
    with pytest.raises(ConfigError, match=r"moments of \(4, 3\) features were given, and the network makes \(4, 4\)"):
        DistributionJudge(network, real, known=(known[0], moments(seen.spatial[:, :3])))
