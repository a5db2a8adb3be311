"""How well images show what their prompts say: CLIP score, and ImageReward. Both need weights that are downloaded once."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokencache_compile.errors import ConfigError
from tokencache_compile.pixels import to_bytes


def _pictures(images: Tensor, prompts: Sequence[str]) -> list[Image.Image]:
    """Images [n, 1 or 3, H, W] in [-1, 1] as pictures, one a prompt."""
    if len(images) != len(prompts):
        raise ConfigError(f"{len(images)} images and {len(prompts)} prompts were given; each image has one.")
    bytes_ = to_bytes(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return [Image.fromarray(picture.contiguous().cpu().numpy()) for picture in bytes_]


class ClipScore:
    """Mean of max(0, 100 · cosine) of the embeddings of an image and its prompt, as torchmetrics and most papers take it.

    Args:
        model: folder or hub id of a CLIP model with its processor; papers name theirs, and figures of two models do not compare.
    """

    def __init__(self, model: str = "openai/clip-vit-large-patch14", device: str = "cpu", batch: int = 32) -> None:
        import transformers

        try:
            self.processor: Any = transformers.AutoProcessor.from_pretrained(model)
            self.model: Any = transformers.CLIPModel.from_pretrained(model).eval().to(device)
        except (OSError, ValueError) as error:
            raise ConfigError(f"a CLIP model was looked for in {model} and cannot be loaded: {error}") from error
        self.device, self.batch = device, batch

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> float:
        """Of images [n, 1 or 3, H, W] in [-1, 1]."""
        scores = []
        pictures = _pictures(images, prompts)
        for start in range(0, len(pictures), self.batch):
            part = slice(start, start + self.batch)
            given = self.processor(text=list(prompts[part]), images=pictures[part], return_tensors="pt", padding=True, truncation=True)
            seen = self.model(**given.to(self.device))  # its embeddings have length 1
            scores.append((seen.image_embeds * seen.text_embeds).sum(1))
        return float(torch.cat(scores).mul(100).clamp_min(0).mean())


class ImageReward:
    """Mean reward of a model of human preference (Xu et al., 2023): ``pip install image-reward``, in an environment of its own.

    Args:
        model: its name, which is downloaded, or the path of ``ImageReward.pt``.
    """

    def __init__(self, model: str = "ImageReward-v1.0", device: str = "cpu") -> None:
        if importlib.util.find_spec("ImageReward") is None:
            raise ConfigError("ImageReward was asked for and its package is missing: pip install image-reward.")
        import ImageReward as package

        self.model: Any = package.load(model, device=device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> float:
        """Of images [n, 1 or 3, H, W] in [-1, 1]."""
        rewards = [self.model.score(prompt, picture) for prompt, picture in zip(prompts, _pictures(images, prompts), strict=True)]
        return float(sum(rewards) / len(rewards))
