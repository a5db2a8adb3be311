"""VBench (Huang et al., 2024) on a folder of videos: ``pip install vbench``, in an environment of its own; it downloads its networks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.pixels import to_bytes

# Those that VBench can judge on prompts of one's own; the others need its own prompts, and its information about them.
ANY_PROMPT = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)

# VBench's two groups of dimensions, and between which values its authors spread each (scripts/constant.py of github.com/Vchitect/VBench).
QUALITY = (
    ("subject_consistency", (0.1462, 1.0)),
    ("background_consistency", (0.2615, 1.0)),
    ("temporal_flickering", (0.6293, 1.0)),
    ("motion_smoothness", (0.706, 0.9975)),
    ("aesthetic_quality", (0.0, 1.0)),
    ("imaging_quality", (0.0, 1.0)),
    ("dynamic_degree", (0.0, 1.0)),
)
SEMANTIC = (
    ("object_class", (0.0, 1.0)),
    ("multiple_objects", (0.0, 1.0)),
    ("human_action", (0.0, 1.0)),
    ("color", (0.0, 1.0)),
    ("spatial_relationship", (0.0, 1.0)),
    ("scene", (0.0, 0.8222)),
    ("appearance_style", (0.0009, 0.2855)),
    ("temporal_style", (0.0, 0.364)),
    ("overall_consistency", (0.0, 0.364)),
)
_NAME = "tokencache"


def vbench(
    videos: Path, prompts: Mapping[str, str], out: Path, dimensions: Sequence[str] = ANY_PROMPT, device: str = "cuda"
) -> dict[str, float]:
    """The score of each of ``dimensions``, and files of VBench's own in ``out``.

    Args:
        videos: folder of .mp4 or .gif files, ``prompts`` what each of them by its name was asked to show.

    Raises:
        ConfigError: vbench is not installed, a video has no prompt, or there is none.
    """
    _check_installed()
    found = _files(videos)
    without = [name for name in found if name not in prompts]
    if not found or without:
        raise ConfigError(f"{videos} holds {len(found)} videos, and {without or 'none of them'} without a prompt; name one for each.")
    from vbench import VBench

    judge = VBench(device, "", str(out))  # the information file is of VBench's own prompts
    given = {video: prompts[video] for video in found}
    judge.evaluate(videos_path=str(videos), name=_NAME, prompt_list=given, dimension_list=list(dimensions), mode="custom_input")
    return _results(out, dimensions)


def vbench_standard(videos: Path, information: Path, out: Path, device: str = "cuda") -> dict[str, float]:
    """The score of every dimension on videos of VBench's own prompts, called by :func:`video_name`, and files of VBench's own in ``out``.

    Args:
        information: VBench_full_info.json.

    Raises:
        ConfigError: vbench is not installed, or there is no video.
    """
    _check_installed()
    if not _files(videos):
        raise ConfigError(f"{videos} holds no video; draw them first.")
    from vbench import VBench

    dimensions = [name for name, _ in (*QUALITY, *SEMANTIC)]
    judge = VBench(device, str(information), str(out))
    judge.evaluate(videos_path=str(videos), name=_NAME, dimension_list=dimensions, mode="vbench_standard")
    return _results(out, dimensions)


def total_score(scores: Mapping[str, float]) -> float:
    """VBench's total in percent, as its authors print it: every dimension between its least and most, quality four times the semantics.

    Raises:
        ConfigError: a dimension is missing.
    """
    if missing := [name for name, _ in (*QUALITY, *SEMANTIC) if name not in scores]:
        raise ConfigError(f"the total of VBench was asked for without {', '.join(missing)}; all 16 dimensions are needed.")

    def mean(dimensions: Sequence[tuple[str, tuple[float, float]]]) -> float:
        weights = {name: 0.5 if name == "dynamic_degree" else 1.0 for name, _ in dimensions}
        values = [weights[name] * (scores[name] - least) / (most - least) for name, (least, most) in dimensions]
        return sum(values) / sum(weights.values())

    return 100 * (4 * mean(QUALITY) + mean(SEMANTIC)) / 5


def video_name(prompt: str, number: int) -> str:
    """The file, without suffix, where VBench looks for video ``number`` (0 to 4) of one of its prompts."""
    return f"{prompt}-{number}"


def write_video(path: Path, frames: Tensor, fps: int = 18) -> None:
    """Frames [1 or 3, F, H, W] in [-1, 1] as an .mp4, or with Pillow alone as a .gif of 256 colours.

    Raises:
        ConfigError: for an .mp4, imageio is not installed.
    """
    pictures = [Image.fromarray(frame.numpy()) for frame in to_bytes(frames).expand(3, -1, -1, -1).permute(1, 2, 3, 0).contiguous().cpu()]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
        return
    if importlib.util.find_spec("imageio") is None:
        raise ConfigError(f"{path.name} was to be written and imageio is missing: pip install imageio imageio-ffmpeg.")
    from diffusers.utils import export_to_video

    export_to_video(pictures, str(path), fps=fps)


def _check_installed() -> None:
    if importlib.util.find_spec("vbench") is None:
        raise ConfigError("VBench was asked for and its package is missing: pip install vbench.")


def _files(videos: Path) -> list[str]:
    return sorted(path.name for path in videos.iterdir() if path.suffix.lower() in (".mp4", ".gif"))


def _results(out: Path, dimensions: Sequence[str]) -> dict[str, float]:
    results = json.loads((out / f"{_NAME}_eval_results.json").read_text())
    return {dimension: float(results[dimension][0]) for dimension in dimensions}
