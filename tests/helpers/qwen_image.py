"""A small random QwenImagePipeline, and parts that Krea 2 has as well."""

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import parts
import z_image

TEXT = 232  # tokens; the template alone takes over a hundred, letter by letter


def vae() -> AutoencoderKLQwenImage:
    """Two pixels a side for each latent one."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.2, 2.0],
    )


def scheduler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, base_image_seq_len=256, **config)


def language(words: Any, **config: Any) -> dict[str, Any]:
    """Of the language half of a small vision-language model."""
    return {
        "vocab_size": len(words),
        "hidden_size": parts.WIDTH,
        "intermediate_size": 2 * parts.WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
    } | config


def transformer() -> QwenImageTransformer2DModel:
    made = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return parts.redrawn(made)


def build(folder: Path) -> None:
    words = z_image.tokenizer()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": parts.WIDTH}
    text = Qwen2_5_VLConfig(text_config=language(words, num_hidden_layers=2), vision_config=vision)
    QwenImagePipeline(
        transformer=transformer(),
        scheduler=scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=vae(),
        text_encoder=parts.with_large_embeddings(Qwen2_5_VLForConditionalGeneration(text)),
        tokenizer=words,
    ).save_pretrained(folder)
