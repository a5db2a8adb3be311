"""Count what Learning-to-Cache's published routers compute: for each threshold, attentions and MLPs of the cached steps.

    python benchmarks/router_counts.py DIR    # with DDIM20_router.pt and DDIM50_router.pt of github.com/horseee/learning-to-cache, DiT/ckpt

Every second step is cached; there a module runs where the sigmoid of its router is above the threshold (``DiT/models/dynamic_models.py``:
even routers, even entries attention, odd ones MLP). Result: benchmarks/results/router_counts.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

SOURCE = "https://github.com/horseee/learning-to-cache, DiT/ckpt"
RESULT = Path(__file__).resolve().parent / "results" / "router_counts.json"
THRESHOLDS = (0.1, 0.5, 0.9, 0.95, 0.98, 0.99)  # 0.1 is the published one (0.9 at 512², whose router is not published)


def published_router(path: Path, steps: int) -> Tensor:
    """Logits [step pairs, blocks, 2] of a published router, pairs in sampling order. (Its own numbers count timesteps upwards.)"""
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(path, weights_only=True, map_location="cpu")["routers"]
    logits = torch.stack([saved[f"{number}.prob"] for number in range(steps - 2, -1, -2)])
    return logits.unflatten(1, (-1, 2))


def main(folder: Annotated[Path, typer.Argument(help="Folder with the two router files.")]) -> None:
    routers = {}
    for steps in (20, 50):
        path = folder / f"DDIM{steps}_router.pt"
        scores = published_router(path, steps).sigmoid()
        counts = {}
        for threshold in THRESHOLDS:
            computed = scores > threshold
            counts[str(threshold)] = {"attention": int(computed[..., 0].sum()), "mlp": int(computed[..., 1].sum())}
        routers[str(steps)] = {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "modules": scores.numel(),
            "computed": counts,
        }
    RESULT.write_text(json.dumps({"source": SOURCE, "routers": routers}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
