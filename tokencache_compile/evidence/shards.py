"""Many samples of one method, in files: drawn by any number of processes, each of which may be stopped and go on.

    settings.json               what the samples are of; they are not mixed with those of other settings
    00007.safetensors           shard 7: samples [n, C, ...] in 8 bits, those from number 7 · size on

Process p of P draws the shards k with k mod P = p. Noise depends on a sample's number alone (:class:`Subject`), what a sampler draws
besides on the shard's, and samples are drawn together by shards: so they do not depend on P. No process waits for another.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.methods import Method
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.learn.inputs import SAMPLE
from tokencache_compile.metrics import decibels
from tokencache_compile.pixels import from_bytes, to_bytes
from tokencache_compile.sampling import sample, seeded

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Shards:
    """The samples in ``folder``: ``count`` of them, ``size`` in each file but the last. Iterating gives them file by file, in [-1, 1].

    Raises:
        ConfigError: there is no sample, or no room for one in a file.
    """

    folder: Path
    count: int
    size: int

    def __post_init__(self) -> None:
        if min(self.count, self.size) < 1:
            raise ConfigError(f"{self.count} samples in files of {self.size} were asked for; at least 1 of each is needed.")

    def __len__(self) -> int:
        return math.ceil(self.count / self.size)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def rows(self, number: int) -> range:
        """The numbers of the samples in shard ``number``."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def missing(self) -> list[int]:
        """The shards that are still to be drawn."""
        return [number for number in range(len(self)) if not self.path(number).exists()]

    def __iter__(self) -> Iterator[Tensor]:
        """Raises a ConfigError if a shard is missing or is no file of samples."""
        if missing := self.missing():
            raise ConfigError(
                f"{self.folder} lacks {len(missing)} of {len(self)} shards, the first of them {self.path(missing[0]).name}. "
                "Draw them first; what is there is kept."
            )
        for number in range(len(self)):
            try:
                pixels = load_file(self.path(number))[SAMPLE]
            except (SafetensorError, KeyError) as error:
                raise ConfigError(f"{self.path(number)} is no file of samples ({error}). Delete it and draw it again.") from error
            yield from_bytes(pixels)


def draw_shards(
    subject: Subject,
    method: Method,
    shards: Shards,
    backend: str,
    process: int = 0,
    processes: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Draw what is missing of this process's share of ``shards``; ``advance`` is called after each.

    Raises:
        ConfigError: the folder holds samples of something else.
    """
    steps = method.steps or subject.steps
    of = {"model": subject.name, **subject.settings, "method": method.name, "steps": steps, "count": shards.count, "size": shards.size}
    _claim(shards.folder, of, process)
    own = [number for number in shards.missing() if number % processes == process]
    if not own:
        return
    scheduler = subject.scheduler()
    net: Any = subject.load()
    if method.start is not None:
        net = method.start(net, scheduler, backend)
    for number in own:
        rows = shards.rows(number)
        noise, conditions = subject.draw(rows.start, len(rows))
        with seeded(number):
            drawn = sample(net, scheduler, noise, steps, conditions)
        shown = drawn if subject.decode is None else subject.decode(drawn)
        with _written_whole(shards.path(number), process) as path:
            save_file({SAMPLE: to_bytes(shown).cpu().contiguous()}, path)
        advance()


def _claim(folder: Path, settings: Mapping[str, Any], process: int) -> None:
    """Say in ``folder`` what its samples are of, or check that it says the same. Any number of processes may do so at once."""
    path, text = folder / SETTINGS, json.dumps(settings, indent=1, sort_keys=True, allow_nan=False) + "\n"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _written_whole(path, process) as aside:
            aside.write_text(text)
    if (held := path.read_text()) != text:
        raise ConfigError(f"{folder} holds samples of {held}, and asked for is {text}. Name another folder, or delete it.")


@contextmanager
def _written_whole(path: Path, process: int) -> Iterator[Path]:
    """Yields another path, which takes the place of ``path`` when the block ends without an error; each process has its own."""
    aside = path.with_name(f".{path.name}.{process}")
    yield aside
    os.replace(aside, path)


def psnr_of_parts(parts: Shards, reference: Shards) -> float:
    """PSNR in dB of samples to those of another run from the same noise, as of all of them at once; infinite where they are equal."""
    error = values = 0.0
    for one, other in zip(parts, reference, strict=True):
        error += float((one.double() - other.double()).square().sum())
        values += one.numel()
    return decibels(error / values)
