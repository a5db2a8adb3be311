"""The models of the paper's Tables II to V with their samplers, data and judges, and the reference models in their place."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, PixArtAlphaPipeline
from emoji import Emoji, encode, load_emoji
from fashion_mnist import load_fashion_mnist
from frechet import load_network, normal
from judge_reference import train_classifier
from open_sora_plan_macs import latent_grid
from paper_models import OPEN_SORA_FRAMES, OPEN_SORA_SIZE, OPEN_SORA_TEXT, PIXART_TEXT
from reference_pixart import captions_in_turn, pixart_subject
from text_image_score import TextImageScore, mean_state
from torch import Tensor, nn
from train_pixart import SCHEDULER_CONFIG

from tokencache_compile.errors import ConfigError
from tokencache_compile.evidence.datasets import coco, parti_prompts, reference_batch, vbench_prompts
from tokencache_compile.evidence.shards import Shards
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.evidence.subjects import noise_of, reference_subject
from tokencache_compile.judges.distribution import DistributionJudge, FeatureNetwork, Features
from tokencache_compile.judges.inception import SPATIAL, Inception
from tokencache_compile.judges.text_image import ClipScore, ImageReward
from tokencache_compile.judges.video import total_score, vbench_standard, video_name, write_video
from tokencache_compile.models.open_sora_plan import OpenSoraT2V_v1_3
from tokencache_compile.sampling import Conditions

Figures = dict[str, float]
Judge = Callable[[Shards], Figures]
TextJudge = Callable[[Tensor, Sequence[str]], float]  # of images and what each was asked to show
VIDEOS_A_PROMPT = 5  # as VBench asks for
_CLASSES = 1000


@dataclass(frozen=True)
class SampleSet:
    """Samples that are judged together.

    Attributes:
        name: of their folder.
        judge: makes what judges them, once they are there.
    """

    name: str
    subject: Subject
    count: int
    judge: Callable[[], Judge]


@dataclass(frozen=True)
class System:
    """A model and what it is measured on.

    Attributes:
        name: for people.
        model: whose rows of the paper's tables it stands for.
        blocks, tokens: L and N.
        sets: the first is what MACs and latency are taken on.
    """

    name: str
    model: str
    blocks: int
    tokens: int
    sets: tuple[SampleSet, ...]


@dataclass(frozen=True)
class Place:
    """Where and in what the published models run."""

    device: str
    dtype: torch.dtype
    seed: int


def loaded(cls: Any, weights: str, **more: Any) -> Any:
    """``cls.from_pretrained``.

    Raises:
        ConfigError: a hub id or a folder that gives nothing.
    """
    try:
        return cls.from_pretrained(weights, **more)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"{cls.__name__} was to be loaded from {weights}: {why} Name a folder that holds it, or let this machine reach the hub."
        ) from error


def text_score(judge: TextJudge, shards: Shards, prompts: Sequence[str]) -> float:
    """The mean over all samples of a score that is a mean over those of a part; sample i shows ``prompts[i]``."""
    scores = []
    for number, images in enumerate(shards):
        rows = shards.rows(number)
        scores.append(len(rows) * judge(images, prompts[rows.start : rows.stop]))
    return math.fsum(scores) / shards.count


# -- DiT on ImageNet: Table II ----------------------------------------------------------------------------------------


def dit(size: int, weights: str | None, reference: Path, inception: Path, count: int, place: Place) -> System:
    """DiT-XL/2 at ``size``², guidance 1.5, sample i of class i mod 1000, against ADM's ``reference`` batch."""
    weights = weights or f"facebook/DiT-XL-2-{size}"
    pipe = loaded(DiTPipeline, weights, dtype=place.dtype).to(place.device)
    net, guidance = pipe.transformer.eval(), 1.5
    shape = (net.config.in_channels, net.config.sample_size, net.config.sample_size)

    def draw(start: int, many: int) -> tuple[Tensor, Conditions]:
        labels = torch.arange(start, start + many, device=place.device) % _CLASSES
        return noise_of(place.seed, start, many, shape).to(place.device, place.dtype), Conditions.of_labels(labels, _CLASSES, guidance)

    def judge() -> Judge:
        batch = reference_batch(reference)
        return DistributionJudge(Inception(inception, place.device), batch, known=batch.known)

    name = f"DiT-XL/2 {size}²"
    scheduler = partial(DDIMScheduler.from_config, pipe.scheduler.config)
    subject = _published(
        name, weights, net, scheduler, draw, partial(_decoded, pipe.vae), {"sampler": "DDIM", "guidance": guidance}, place
    )
    return System(name, name, net.config.num_layers, (net.config.sample_size // 2) ** 2, (SampleSet("imagenet", subject, count, judge),))


def reference_dit(count: int, seed: int) -> System:
    """The shipped DiT, against Fashion-MNIST as a small classifier sees it."""

    def judge() -> Judge:
        images, labels = load_fashion_mnist("train")
        few = slice(0, 12_800)
        return DistributionJudge(ClassifierFeatures(train_classifier(images[few], labels[few], 1, seed=0)), images[few])

    subject = reference_subject(count, 50, 2.5, seed)
    return System("the reference DiT", "DiT-XL/2 256²", 12, 64, (SampleSet("fashion_mnist", subject, count, judge),))


class ClassifierFeatures:
    """judge_reference.py's classifier as a feature network: its second and third stage, and its classes."""

    def __init__(self, classifier: nn.Module) -> None:
        layers = list(classifier.children())
        self.second, self.third, self.head = (nn.Sequential(*part) for part in (layers[:8], layers[8:12], layers[12:]))

    def __call__(self, images: Tensor) -> Features:
        """Of images [n, 1, 32, 32] in [-1, 1]."""
        early = self.second(images)
        late = self.third(early)
        return Features(late.mean((2, 3)), early[:, :SPATIAL].flatten(1), self.head(late).softmax(1))


# -- PixArt on COCO and PartiPrompts: Tables III and IV ---------------------------------------------------------------


@dataclass(frozen=True)
class TextData:
    """Paths of prompts and of the judges' weights; those of COCO are for 256² alone, ImageReward for 1024²."""

    parti: Path
    clip: str
    captions: Path
    images: Path
    inception: Path
    image_reward: str


def pixart(size: int, weights: str | None, data: TextData, count: int | None, place: Place) -> System:
    """PixArt-α at 256² (COCO, PartiPrompts) or 1024² (PartiPrompts), guidance 4.5, an image for each prompt or for the first ``count``."""
    prompts = parti_prompts(data.parti)[:count]
    weights = weights or f"PixArt-alpha/PixArt-XL-2-{'1024-MS' if size == 1024 else '256x256'}"
    pipe = loaded(PixArtAlphaPipeline, weights, dtype=place.dtype).to(place.device)
    net = pipe.transformer.eval()
    clip = cache(partial(ClipScore, data.clip, place.device))
    name, make = f"PixArt-α {size}²", partial(_pixart_subject, pipe, weights, net, size, place)
    if size == 1024:

        def reward() -> Judge:
            preferred, clip_score = ImageReward(data.image_reward, place.device), clip()
            return lambda shards: {
                "image_reward": text_score(preferred, shards, prompts),
                "clip": text_score(clip_score, shards, prompts),
            }

        sets: tuple[SampleSet, ...] = (SampleSet("partiprompts", make(name, prompts), len(prompts), reward),)
    else:
        captions, pictures = coco(data.captions, data.images, size)
        captions = captions[:count]
        real = partial(_real_and_clip, pictures, partial(Inception, data.inception, place.device), clip, captions)
        sets = (
            SampleSet("coco", make(name, captions), len(captions), real),
            SampleSet("partiprompts", make(name, prompts), len(prompts), partial(_clip, clip, prompts)),
        )
    return System(name, name, net.config.num_layers, (net.config.sample_size // 2) ** 2, sets)


def _pixart_subject(pipe: Any, weights: str, net: Any, size: int, place: Place, name: str, prompts: Sequence[str]) -> Subject:
    guidance, latent = 4.5, net.config.sample_size

    @torch.no_grad()
    def draw(start: int, many: int) -> tuple[Tensor, Conditions]:
        encoded = pipe.encode_prompt(
            list(prompts[start : start + many]), negative_prompt="", device=place.device, max_sequence_length=PIXART_TEXT
        )
        keys = ("encoder_hidden_states", "encoder_attention_mask")
        given, null = (dict(zip(keys, part, strict=True)) for part in (encoded[:2], encoded[2:]))
        if net.config.sample_size == 128:  # the model that is told the size of its image
            told = {"resolution": torch.full((many, 2), float(size)), "aspect_ratio": torch.ones(many, 1)}
            told = {key: value.to(place.device, place.dtype) for key, value in told.items()}
            given, null = ({**part, "added_cond_kwargs": told} for part in (given, null))
        noise = noise_of(place.seed, start, many, (net.config.in_channels, latent, latent)).to(place.device, place.dtype)
        return noise, Conditions(given, null, guidance)

    scheduler = partial(DPMSolverMultistepScheduler.from_config, pipe.scheduler.config)
    settings = {"sampler": "DPM-Solver++", "guidance": guidance, "prompts": _digest(prompts)}
    return _published(name, weights, net, scheduler, draw, partial(_decoded, pipe.vae), settings, place)


def _real_and_clip(
    real: Iterable[Tensor], network: Callable[[], FeatureNetwork], clip: Callable[[], TextJudge], prompts: Sequence[str]
) -> Judge:
    """Makes the judge of images that have real ones to compare with."""
    distribution, score = DistributionJudge(network(), real), clip()
    return lambda shards: {**distribution(shards), "clip": text_score(score, shards, prompts)}


def _clip(clip: Callable[[], TextJudge], prompts: Sequence[str]) -> Judge:
    """Makes the judge of images that have prompts alone."""
    score = clip()
    return lambda shards: {"parti_clip": text_score(score, shards, prompts)}


def reference_pixart(count: int) -> System:
    """The shipped PixArt: the emoji's captions in COCO's place, those held out in PartiPrompts', EfficientNet in Inception's and CLIP's."""
    emoji = load_emoji()
    captions = emoji.captions
    held_out = emoji.held_out.nonzero()[:, 0]
    solver = partial(DPMSolverMultistepScheduler, **SCHEDULER_CONFIG)

    def of(pairs: Tensor) -> tuple[Subject, list[str]]:
        subject = replace(pixart_subject(pairs, emoji, {}, {}), scheduler=solver, predicts_x0=False)
        return replace(subject, settings={**subject.settings, "sampler": "DPM-Solver++"}), [captions[pair] for pair in pairs.tolist()]

    (seen, asked), (unseen, asked_unseen) = of(captions_in_turn(count, emoji)), of(held_out[:count])
    score = cache(partial(EmojiScore, emoji))
    sets = (
        SampleSet("captions", seen, count, partial(_real_and_clip, emoji.images.split(64), EfficientNetFeatures, score, asked)),
        SampleSet("held_out", unseen, len(asked_unseen), partial(_clip, score, asked_unseen)),
    )
    return System("the reference PixArt", "PixArt-α 256²", 8, 64, sets)


class EfficientNetFeatures:
    """frechet.py's network as a feature network."""

    def __init__(self) -> None:
        self.network = load_network()

    def __call__(self, images: Tensor) -> Features:
        """Of images [n, 3, H, W] in [-1, 1]."""
        shown = normal(images)
        maps = self.network.extract_features(shown)
        return Features(maps.mean((2, 3)), maps[:, :SPATIAL].flatten(1), self.network(shown).softmax(1))


class EmojiScore:
    """text_image_score.py in CLIP's place."""

    def __init__(self, emoji: Emoji) -> None:
        self.captions, self.score = list(emoji.captions), TextImageScore(emoji, mean_state(*encode(emoji.captions)))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> float:
        return float(self.score(images, torch.tensor([self.captions.index(prompt) for prompt in prompts])).score.mean())


# -- Open-Sora-Plan on VBench: Table V --------------------------------------------------------------------------------


def video(weights: Path, text_encoder: str, information: Path, out: Path, count: int | None, place: Place) -> System:
    """Open-Sora-Plan v1.3, 93 frames of 256², guidance 7.5, five videos for each of VBench's prompts.

    ``weights``: folder with ``any93x640x640`` and ``vae`` of the hub's LanguageBind/Open-Sora-Plan-v1.3.0.

    Raises:
        ConfigError: something is missing, Open-Sora-Plan's own package among it: its video autoencoder is in no other.
    """
    from transformers import AutoTokenizer, MT5EncoderModel

    prompts = vbench_prompts(information)
    decode = _video_decoder(weights / "vae", place)
    net = loaded(OpenSoraT2V_v1_3, str(weights), subfolder="any93x640x640", dtype=place.dtype).to(place.device).eval()
    tokenizer = loaded(AutoTokenizer, text_encoder)
    encoder = loaded(MT5EncoderModel, text_encoder, dtype=place.dtype).to(place.device).eval()
    grid = latent_grid(OPEN_SORA_FRAMES, OPEN_SORA_SIZE)

    @torch.no_grad()
    def states(texts: Sequence[str]) -> dict[str, Tensor]:
        tokens = tokenizer(list(texts), padding="max_length", max_length=OPEN_SORA_TEXT, truncation=True, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(place.device), tokens["attention_mask"].to(place.device)
        return {"encoder_hidden_states": encoder(ids, attention_mask=mask)[0], "encoder_attention_mask": mask}

    def draw(start: int, many: int) -> tuple[Tensor, Conditions]:
        given = states([prompts[row // VIDEOS_A_PROMPT] for row in range(start, start + many)])
        noise = noise_of(place.seed, start, many, (net.config.in_channels, *grid)).to(place.device, place.dtype)
        return noise, Conditions(given, states([""]), 7.5)

    settings = {"sampler": "Euler ancestral", "guidance": 7.5, "prompts": _digest(prompts)}
    subject = _published("Open-Sora-Plan", str(weights), net, video_scheduler, draw, decode, settings, place)
    every = VIDEOS_A_PROMPT * len(prompts)
    judge = partial(_vbench, prompts, information, out, place.device)
    tokens = grid[0] * (grid[1] // 2) * (grid[2] // 2)
    sets = (SampleSet("vbench", subject, min(count or every, every), judge),)
    return System("Open-Sora-Plan v1.3", "Open-Sora-Plan", net.config.num_layers, tokens, sets)


def video_scheduler() -> EulerAncestralDiscreteScheduler:
    """As Open-Sora-Plan's own sampling script has it for v1.3."""
    return EulerAncestralDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


def _video_decoder(vae: Path, place: Place) -> Callable[[Tensor], Tensor]:
    if importlib.util.find_spec("opensora") is None:
        raise ConfigError(
            "Open-Sora-Plan's video autoencoder was asked for and its package is missing: pip install "
            "git+https://github.com/PKU-YuanGroup/Open-Sora-Plan (v1.3.0)."
        )
    from opensora.models.causalvideovae import WFVAEModelWrapper

    wrapped = WFVAEModelWrapper(str(vae)).to(place.device, place.dtype).eval()
    return torch.inference_mode()(lambda latents: wrapped.decode(latents).transpose(1, 2))  # its frames come before the channels


def _write_videos(shards: Shards, prompts: Sequence[str], folder: Path, suffix: str) -> None:
    """One file a sample, where VBench looks for it."""
    for number, part in enumerate(shards):
        for row, frames in zip(shards.rows(number), part, strict=True):
            write_video(folder / f"{video_name(prompts[row // VIDEOS_A_PROMPT], row % VIDEOS_A_PROMPT)}{suffix}", frames)


def _vbench(prompts: Sequence[str], information: Path, out: Path, device: str) -> Judge:
    def judge(shards: Shards) -> Figures:
        videos = out / "videos" / shards.folder.name
        _write_videos(shards, prompts, videos, ".mp4")
        scores = vbench_standard(videos, information, out / "vbench" / shards.folder.name, device)
        return {**scores, "vbench": total_score(scores)}

    return judge


def reference_video(information: Path | None, out: Path, count: int, seed: int) -> System:
    """Open-Sora-Plan's class, tiny and with random weights: 4 frames of 8² pixels, five videos a prompt. They are written as VBench wants
    them and not judged."""
    prompts = vbench_prompts(information) if information else [f"prompt {number}" for number in range(-(-count // VIDEOS_A_PROMPT))]
    count = min(count, VIDEOS_A_PROMPT * len(prompts))
    config = dict(num_attention_heads=2, attention_head_dim=12, in_channels=3, num_layers=6, cross_attention_dim=24, caption_channels=10)

    def load() -> nn.Module:
        torch.manual_seed(seed)
        net = OpenSoraT2V_v1_3(**config, sparse_n=2)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.1)  # the class's own initialisation leaves the gates too small for the blocks to matter
        return net.eval()

    def draw(start: int, many: int) -> tuple[Tensor, Conditions]:
        states = torch.stack([noise_of(seed + 1, row // VIDEOS_A_PROMPT, 1, (5, 10))[0] for row in range(start, start + many)])
        null = {"encoder_hidden_states": torch.zeros(1, 5, 10)}
        return noise_of(seed, start, many, (3, 4, 8, 8)), Conditions({"encoder_hidden_states": states}, null, 7.5)

    def judge() -> Judge:
        def written(shards: Shards) -> Figures:
            _write_videos(shards, prompts, out / "videos" / shards.folder.name, ".gif")
            return {}

        return written

    settings = {"sampler": "Euler ancestral", "guidance": 7.5, "seed": seed, "prompts": _digest(prompts)}
    subject = Subject("tiny random OpenSoraT2V", load, video_scheduler, draw, 50, predicts_x0=False, settings=settings)
    return System(subject.name, "Open-Sora-Plan", config["num_layers"], 64, (SampleSet("prompts", subject, count, judge),))


# -- what the published ones share ------------------------------------------------------------------------------------


def _published(
    name: str,
    weights: str,
    net: nn.Module,
    scheduler: Callable[[], Any],
    draw: Callable[[int, int], tuple[Tensor, Conditions]],
    decode: Callable[[Tensor], Tensor],
    settings: dict[str, Any],
    place: Place,
) -> Subject:
    """A subject whose model stays loaded: this package's methods leave it as it is."""
    kind, dtype = place.device.partition(":")[0], str(place.dtype).removeprefix("torch.")
    settings = {**settings, "weights": weights, "seed": place.seed, "dtype": dtype, "device": kind}
    return Subject(name, lambda: net, scheduler, draw, 50, pixels=False, predicts_x0=False, decode=decode, settings=settings)


def _digest(prompts: Sequence[str]) -> str:
    """Tells one list of prompts from another."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


@torch.inference_mode()
def _decoded(vae: Any, latents: Tensor) -> Tensor:
    """Images [n, 3, H, W] of latents, one at a time: decoding takes more memory than sampling."""
    return torch.cat([vae.decode(one / vae.config.scaling_factor, return_dict=False)[0] for one in latents.split(1)])
