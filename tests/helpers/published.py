"""Pipelines in the shape of published ones, from their configurations in `examples/`; weights are random."""

from pathlib import Path
from typing import Any

import examples
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

import parts
from dmdr_sit.pipeline import SiTPipeline, SiTTransformer2DModel

ROOT = Path(examples.__path__[0])


def component(name: str, cls: Any, part: str, device: torch.device, **changes: Any) -> Any:
    """A network or VAE of a recipe, in bfloat16.

    Args:
        name: The recipe's folder.
        changes: Of its configuration.
    """
    config = dict(cls.load_config(ROOT / name / "architecture", subfolder=part)) | changes
    with device, torch.random.fork_rng():
        torch.manual_seed(0)
        return cls.from_config(config).to(torch.bfloat16)


def sd3(folder: Path, device: torch.device, **changes: Any) -> None:
    """SD3-Medium with small CLIP encoders of the published widths, and without T5, in whose place are zeros."""
    clip = parts.clip_tokenizer()
    StableDiffusion3Pipeline(
        transformer=component("sd3", SD3Transformer2DModel, "transformer", device, **changes),
        vae=component("sd3", AutoencoderKL, "vae", device),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=parts.clip_text_encoder(clip, width=768),
        tokenizer=clip,
        text_encoder_2=parts.clip_text_encoder(clip, width=1280),
        tokenizer_2=clip,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def sdxl(folder: Path, device: torch.device, **changes: Any) -> None:
    """SDXL with small CLIP encoders of the published widths."""
    clip = parts.clip_tokenizer()
    scheduler = ROOT / "sdxl" / "architecture"
    StableDiffusionXLPipeline(
        unet=component("sdxl", UNet2DConditionModel, "unet", device, **changes),
        vae=component("sdxl", AutoencoderKL, "vae", device),
        scheduler=EulerDiscreteScheduler.from_pretrained(scheduler, subfolder="scheduler"),
        text_encoder=parts.clip_text_encoder(clip, width=768, projected=False),
        tokenizer=clip,
        text_encoder_2=parts.clip_text_encoder(clip, width=1280),
        tokenizer_2=clip,
    ).save_pretrained(folder)


def sit(folder: Path, device: torch.device, **changes: Any) -> None:
    """SiT-XL/2."""
    network = component("sit", SiTTransformer2DModel, "transformer", device, **changes)
    vae = component("sit", AutoencoderKL, "vae", device)
    SiTPipeline(network, vae, FlowMatchEulerDiscreteScheduler(shift=1.0)).save_pretrained(folder)
