"""Pipelines in the shape of published ones, from their configurations in `examples/`; weights are random.

Text encoders have the published widths and few layers, since a run encodes its prompts before it trains.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from dmdr_digits.text import build_text_encoder, build_tokenizer, with_large_embeddings
from dmdr_sit.pipeline import SiTPipeline, SiTTransformer2DModel

ROOT = Path(__file__).parents[1]
CLIP_L, CLIP_G, T5 = 768, 1280, 4096  # widths of the text encoders
GPU = torch.device("cuda")
Changes = Mapping[str, Any]  # of a component's configuration
NONE: Changes = {}


def component(name: str, cls: Any, part: str, device: torch.device, **changes: Any) -> Any:
    """A network or VAE of a recipe, in bfloat16.

    Args:
        name: The recipe's folder.
        cls: Class of the network.
        part: Its subfolder.
        device: Where its weights are drawn.
        changes: Of its configuration.
    """
    config = dict(cls.load_config(ROOT / name / "architecture", subfolder=part)) | changes
    with device, torch.random.fork_rng():
        torch.manual_seed(0)
        return cls.from_config(config).to(torch.bfloat16)


def sd3(folder: Path, device: torch.device = GPU, *, recipe: str = "sd3", vae: Changes = NONE, **changes: Any) -> None:
    """SD3-Medium, or SD3.5-Large (`sd35l`), without T5, in whose place are zeros."""
    clip = build_tokenizer()
    StableDiffusion3Pipeline(
        transformer=component(recipe, SD3Transformer2DModel, "transformer", device, **changes),
        vae=component(recipe, AutoencoderKL, "vae", device, **vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=build_text_encoder(clip, CLIP_L),
        tokenizer=clip,
        text_encoder_2=build_text_encoder(clip, CLIP_G),
        tokenizer_2=clip,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def sdxl(folder: Path, device: torch.device = GPU, *, vae: Changes = NONE, **changes: Any) -> None:
    """SDXL."""
    clip, scheduler = build_tokenizer(), ROOT / "sdxl" / "architecture"
    StableDiffusionXLPipeline(
        unet=component("sdxl", UNet2DConditionModel, "unet", device, **changes),
        vae=component("sdxl", AutoencoderKL, "vae", device, **vae),
        scheduler=EulerDiscreteScheduler.from_pretrained(scheduler, subfolder="scheduler"),
        text_encoder=build_text_encoder(clip, CLIP_L, projected=False),
        tokenizer=clip,
        text_encoder_2=build_text_encoder(clip, CLIP_G),
        tokenizer_2=clip,
    ).save_pretrained(folder)


def flux(folder: Path, device: torch.device = GPU, *, vae: Changes = NONE, **changes: Any) -> None:
    """FLUX.1-dev."""
    clip, scheduler = build_tokenizer(), ROOT / "flux" / "architecture"
    letters = [(letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    t5 = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    config = T5Config(
        vocab_size=len(t5), d_model=T5, d_kv=8, d_ff=64, num_layers=1, num_heads=2, pad_token_id=0, use_cache=False
    )
    FluxPipeline(
        transformer=component("flux", FluxTransformer2DModel, "transformer", device, **changes),
        vae=component("flux", AutoencoderKL, "vae", device, **vae),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(scheduler, subfolder="scheduler"),
        text_encoder=build_text_encoder(clip, CLIP_L, projected=False),
        tokenizer=clip,
        text_encoder_2=with_large_embeddings(T5EncoderModel(config)),
        tokenizer_2=t5,
    ).save_pretrained(folder)


def sit(folder: Path, device: torch.device = GPU, *, vae: Changes = NONE, **changes: Any) -> None:
    """SiT-XL/2."""
    network = component("sit", SiTTransformer2DModel, "transformer", device, **changes)
    decoder = component("sit", AutoencoderKL, "vae", device, **vae)
    SiTPipeline(network, decoder, FlowMatchEulerDiscreteScheduler(shift=1.0)).save_pretrained(folder)
