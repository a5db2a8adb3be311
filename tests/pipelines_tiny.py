"""diffusers' pipelines with tiny random components, text encoders and decoders among them; the transformers are :mod:`families`'.

A prompt's words are the tokens of one vocabulary made here, for nothing can be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from families import FAMILIES
from tiny import draw_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

Pipeline = Any  # DiffusionPipeline's components are not typed
Given = dict[str, Any]
PROMPT, NEGATIVE, WORDS = "a red cat on a mat", "a blurred dog", 7
VOCABULARY = ("<pad>", "</s>", "<unk>", *dict.fromkeys(f"{PROMPT} {NEGATIVE}".split()))
SMALL: Given = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=WORDS, **marks)


def t5(width: int) -> nn.Module:
    size = {"d_model": width, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**SMALL, **size)).eval()


def clip(width: int, projected: bool = False) -> nn.Module:
    size = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": width}
    config = transformers.CLIPTextConfig(**SMALL, **size, max_position_embeddings=77)
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


def llama(width: int) -> nn.Module:
    size = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(**SMALL, **size)).eval()


def image_vae(channels: int = 4, **config: Any) -> nn.Module:
    """Images twice as wide and high as their latents."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config |= {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": channels, "sample_size": 16}
    return diffusers.AutoencoderKL(**blocks, **config)


def transformer(family: str) -> nn.Module:
    return FAMILIES[family].build()[0]


def made(kind: str, family: str, vae: nn.Module, scheduler: Any, **encoders: Any) -> Pipeline:
    """The pipeline class ``kind`` of diffusers with the transformer of a family."""
    return silent(getattr(diffusers, kind)(transformer=transformer(family), vae=vae.eval(), scheduler=scheduler, **encoders))


def silent(pipe: Pipeline) -> Pipeline:
    """Without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


Make = Callable[[], tuple[Pipeline, Given]]
PIPELINES: dict[str, Make] = {}


def pipeline(name: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        PIPELINES[name] = make
        return make

    return add


def build(name: str) -> tuple[Pipeline, Given]:
    """The pipeline, the same every time, and what its calls are given, guidance included."""
    torch.manual_seed(7)
    return PIPELINES[name]()


def text_given(**more: Any) -> Given:
    """A prompt and a negative one, which guides where the pipeline's scale is above 1."""
    return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 16, "width": 20, **more}


@pipeline("DiT")
def _() -> tuple[Pipeline, Given]:
    pipe = made("DiTPipeline", "DiTTransformer2DModel", image_vae(), diffusers.DDIMScheduler(clip_sample=False))
    return pipe, {"class_labels": [207], "guidance_scale": 4.0}


def pixart(kind: str) -> tuple[Pipeline, Given]:
    encoder = {"tokenizer": tokenizer(), "text_encoder": t5(24)}
    pipe = made(kind, "PixArtTransformer2DModel", image_vae(), diffusers.DPMSolverMultistepScheduler(), **encoder)
    more = {"max_sequence_length": WORDS, "use_resolution_binning": False, "clean_caption": False}
    return pipe, text_given(width=16, **more)


@pipeline("PixArt-alpha")
def _() -> tuple[Pipeline, Given]:
    return pixart("PixArtAlphaPipeline")


@pipeline("PixArt-Sigma")
def _() -> tuple[Pipeline, Given]:
    return pixart("PixArtSigmaPipeline")


@pipeline("SD3")
def _() -> tuple[Pipeline, Given]:
    encoders = {"text_encoder": clip(8, projected=True), "text_encoder_2": clip(8, projected=True), "text_encoder_3": t5(24)}
    encoders |= {name: tokenizer() for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    vae = image_vae(shift_factor=0.06)
    pipe = made("StableDiffusion3Pipeline", "SD3Transformer2DModel", vae, FlowMatchEulerDiscreteScheduler(), **encoders)
    return pipe, text_given(width=24, max_sequence_length=WORDS)


@pipeline("FLUX")
def _() -> tuple[Pipeline, Given]:
    encoders = {"text_encoder": clip(16), "text_encoder_2": t5(24), "tokenizer": tokenizer(), "tokenizer_2": tokenizer()}
    vae, family = image_vae(1, shift_factor=0.06), "FluxTransformer2DModel (guidance)"
    pipe = made("FluxPipeline", family, vae, FlowMatchEulerDiscreteScheduler(), **encoders)
    return pipe, text_given(max_sequence_length=WORDS, true_cfg_scale=4.0)


@pipeline("Latte")
def _() -> tuple[Pipeline, Given]:
    encoder = {"tokenizer": tokenizer(), "text_encoder": t5(24)}
    pipe = made("LattePipeline", "LatteTransformer3DModel", image_vae(), diffusers.DDIMScheduler(clip_sample=False), **encoder)
    return pipe, text_given(width=16, video_length=3, clean_caption=False)


@pipeline("CogVideoX")
def _() -> tuple[Pipeline, Given]:
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    vae = diffusers.AutoencoderKLCogVideoX(**blocks, block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2)
    encoder = {"tokenizer": tokenizer(), "text_encoder": t5(24)}
    pipe = made("CogVideoXPipeline", "CogVideoXTransformer3DModel", vae, diffusers.CogVideoXDDIMScheduler(), **encoder)
    return pipe, text_given(height=64, width=80, num_frames=5, max_sequence_length=WORDS)


@pipeline("Allegro")
def _() -> tuple[Pipeline, Given]:
    vae = diffusers.AutoencoderKLAllegro(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2)
    vae.enable_tiling()
    encoder = {"tokenizer": tokenizer(), "text_encoder": t5(24)}
    pipe = made("AllegroPipeline", "AllegroTransformer3DModel", vae, diffusers.EulerAncestralDiscreteScheduler(), **encoder)
    pipe.vae.kernel, pipe.vae.stride = (8, 64, 80), (8, 64, 80)  # one tile: it decodes no smaller video than a tile
    return pipe, text_given(height=64, width=80, num_frames=8, max_sequence_length=WORDS, clean_caption=False)


@pipeline("LTX")
def _() -> tuple[Pipeline, Given]:
    channels = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "latent_channels": 4, "patch_size": 1}
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    vae = diffusers.AutoencoderKLLTXVideo(**channels, **layers)
    encoder = {"tokenizer": tokenizer(), "text_encoder": t5(24)}
    pipe = made("LTXPipeline", "LTXVideoTransformer3DModel", vae, FlowMatchEulerDiscreteScheduler(), **encoder)
    return pipe, text_given(height=32, width=64, num_frames=9, max_sequence_length=WORDS)


WAN_VAE: Given = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def wan(**more: Any) -> tuple[Pipeline, Given]:
    encoder = {"tokenizer": tokenizer(), "text_encoder": t5(16)}
    vae = diffusers.AutoencoderKLWan(**WAN_VAE, dim_mult=[1] * 4)
    pipe = made("WanPipeline", "WanTransformer3DModel", vae, FlowMatchEulerDiscreteScheduler(shift=3.0), **encoder, **more)
    return pipe, text_given(height=64, width=80, num_frames=5, max_sequence_length=WORDS)


pipeline("Wan")(wan)


def wan_2_2() -> tuple[Pipeline, Given]:
    """As Wan 2.2: the second transformer runs below 0.8 of the noise, which is the second half of six steps."""
    torch.manual_seed(7)
    second = transformer("WanTransformer3DModel")
    draw_weights(second, 0.08)
    return wan(transformer_2=second, boundary_ratio=0.8)


@pipeline("HunyuanVideo")
def _() -> tuple[Pipeline, Given]:
    blocks = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    encoders = {"text_encoder": llama(24), "text_encoder_2": clip(8), "tokenizer": tokenizer(), "tokenizer_2": tokenizer()}
    vae = diffusers.AutoencoderKLHunyuanVideo(**blocks, **sizes)
    pipe = made("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", vae, FlowMatchEulerDiscreteScheduler(shift=7.0), **encoders)
    template = {"template": "{}", "crop_start": 0}
    given = {"num_frames": 5, "max_sequence_length": WORDS, "true_cfg_scale": 4.0, "prompt_template": template}
    return pipe, text_given(height=64, width=80, **given)


@pipeline("Qwen-Image")
def _() -> tuple[Pipeline, Given]:
    vae = diffusers.AutoencoderKLQwenImage(**WAN_VAE, dim_mult=[1] * 3, temperal_downsample=[False, True])
    encoder = {"tokenizer": tokenizer(), "text_encoder": llama(24)}
    pipe = made("QwenImagePipeline", "QwenImageTransformer2DModel", vae, FlowMatchEulerDiscreteScheduler(), **encoder)
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return pipe, text_given(height=32, width=40, true_cfg_scale=4.0)


@pipeline("Z-Image")
def _() -> tuple[Pipeline, Given]:
    encoder = {"tokenizer": tokenizer(), "text_encoder": llama(24)}
    encoder["tokenizer"].chat_template = "{{ messages[0]['content'] }}"
    vae = image_vae(16, shift_factor=0.06)
    pipe = made("ZImagePipeline", "ZImageTransformer2DModel", vae, FlowMatchEulerDiscreteScheduler(), **encoder)
    return pipe, text_given(max_sequence_length=WORDS)


# --- from an image, or steered by one: with the components of a text-to-image pipeline ------------------------------------


def picture(width: int) -> Tensor:
    return torch.rand(1, 3, 16, width, generator=torch.Generator().manual_seed(3))


@pipeline("SD3, image to image")
def _() -> tuple[Pipeline, Given]:
    sd3, given = PIPELINES["SD3"]()
    return silent(diffusers.StableDiffusion3Img2ImgPipeline(**sd3.components)), {**given, "image": picture(24), "strength": 0.7}


@pipeline("FLUX, inpainting")
def _() -> tuple[Pipeline, Given]:
    flux, given = PIPELINES["FLUX"]()
    given |= {"image": picture(20), "mask_image": (torch.arange(20) < 10).float().expand(1, 1, 16, 20), "strength": 0.7}
    return silent(diffusers.FluxInpaintPipeline(**flux.components)), given


@pipeline("SD3, ControlNet")
def _() -> tuple[Pipeline, Given]:
    """Its outputs are added to the image tokens between the transformer's blocks."""
    sd3, given = PIPELINES["SD3"]()
    control = diffusers.SD3ControlNetModel(**FAMILIES["SD3Transformer2DModel"].make()[0] | {"num_layers": 2}).eval()
    draw_weights(control, 0.1)
    given["control_image"] = picture(24)
    return silent(diffusers.StableDiffusion3ControlNetPipeline(**sd3.components, controlnet=control)), given


def run(pipe: Pipeline, given: Given, steps: int = 6, seed: int = 0, **options: Any) -> Tensor:
    """The image [1, 3, H, W] or video [1, F, 3, H, W] of a call."""
    torch.manual_seed(seed)  # a ControlNet's image is encoded without the generator
    drawn = {"generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
    images: Tensor = pipe(**given | {"num_inference_steps": steps} | drawn | options)[0]
    return images.float()
