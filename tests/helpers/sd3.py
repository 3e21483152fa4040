"""A small random StableDiffusion3Pipeline with all three text encoders."""

from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

import parts


def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    )


def build(folder: Path, **absent: None) -> None:
    """Save it; `text_encoder_3=None, tokenizer_3=None` leaves T5 out."""
    clip, t5 = parts.clip_tokenizer(), parts.t5_tokenizer()
    text: dict[str, Any] = {
        "text_encoder": parts.clip_text_encoder(clip),
        "tokenizer": clip,
        "text_encoder_2": parts.clip_text_encoder(clip),
        "tokenizer_2": clip,
        "text_encoder_3": parts.t5_text_encoder(t5, 64),
        "tokenizer_3": t5,
    }
    StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(scaling_factor=1.5, shift_factor=0.06),
        **(text | absent),
    ).save_pretrained(folder)
