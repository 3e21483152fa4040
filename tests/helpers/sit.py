"""A small random SiTPipeline."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import parts
from dmdr_sit.pipeline import SiTPipeline, SiTTransformer2DModel


def network(**config: Any) -> SiTTransformer2DModel:
    small = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_classes": 10}
    return SiTTransformer2DModel(**(small | config))


def build(folder: Path) -> None:
    vae = parts.vae(scaling_factor=0.18215)
    SiTPipeline(network(), vae, FlowMatchEulerDiscreteScheduler(shift=1.0)).save_pretrained(folder)


def stock(folder: Path) -> Any:
    """As diffusers loads it from its own code, without this package."""
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
