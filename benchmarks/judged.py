"""The JSON file of a judge: what was measured so far, of which weights; a stopped run goes on with it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import typer
from judge_reference import machine

Result = dict[str, Any]


def opened(out: Path, model: Path, settings: dict[str, Any]) -> Result:
    """What ``out`` has of ``model`` (a folder that save_pretrained wrote), with the settings and the machine of now.

    Raises:
        typer.BadParameter: ``out`` was measured with other weights.
    """
    result: Result = json.loads(out.read_text()) if out.exists() else {"search": {}, "judged": {}}
    weights = hashlib.sha256((model / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    if result.get("settings", {}).get("weights_sha256", weights) != weights:
        raise typer.BadParameter(f"{out} was measured with other weights; delete it to measure these.")
    training = json.loads((model / "training.json").read_text())
    result["settings"] = {"weights_sha256": weights, "training": training, **settings}
    result["machine"] = machine()
    return result


def save(result: Result, out: Path) -> None:
    """Write ``out`` whole, or leave it as it is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_suffix(".partial")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(aside, out)


def best_of(result: Result, least_speed_up: float) -> dict[str, Any]:
    """Settings of the row of the search with the highest PSNR, of those with at least ``least_speed_up`` times fewer MACs."""
    cheap = [row for row in result["search"].values() if row["speed_up"] >= least_speed_up]
    best: dict[str, Any] = max(cheap, key=lambda row: row["psnr_db"])["settings"]
    return best
