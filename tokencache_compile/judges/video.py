"""VBench (Huang et al., 2024) on a folder of videos: ``pip install vbench``, in an environment of its own; it downloads its networks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokencache_compile.errors import ConfigError

# Those that VBench can judge on prompts of one's own; the others need its own prompts, and its information about them.
ANY_PROMPT = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


def vbench(
    videos: Path, prompts: Mapping[str, str], out: Path, dimensions: Sequence[str] = ANY_PROMPT, device: str = "cuda"
) -> dict[str, float]:
    """The score of each of ``dimensions``, and files of VBench's own in ``out``.

    Args:
        videos: folder of .mp4 or .gif files, ``prompts`` what each of them by its name was asked to show.

    Raises:
        ConfigError: vbench is not installed, a video has no prompt, or there is none.
    """
    if importlib.util.find_spec("vbench") is None:
        raise ConfigError("VBench was asked for and its package is missing: pip install vbench.")
    found = sorted(path.name for path in videos.iterdir() if path.suffix.lower() in (".mp4", ".gif"))
    without = [name for name in found if name not in prompts]
    if not found or without:
        raise ConfigError(f"{videos} holds {len(found)} videos, and {without or 'none of them'} without a prompt; name one for each.")
    from vbench import VBench

    name = "tokencache"
    judge = VBench(device, "", str(out))  # the information file is of VBench's own prompts
    given = {video: prompts[video] for video in found}
    judge.evaluate(videos_path=str(videos), name=name, prompt_list=given, dimension_list=list(dimensions), mode="custom_input")
    results = json.loads((out / f"{name}_eval_results.json").read_text())
    return {dimension: float(results[dimension][0]) for dimension in dimensions}
