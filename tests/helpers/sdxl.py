"""A small random StableDiffusionXLPipeline."""

from pathlib import Path
from typing import Any

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

import parts


def unet(**config: Any) -> UNet2DConditionModel:
    """Of SDXL's kind: no attention in the first block, linear projections, sizes and pooled text beside the time."""
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "cross_attention_dim": 2 * parts.WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + parts.WIDTH,
        }
        | config
    )


def build(folder: Path, **config: Any) -> None:
    """Save it; `config` is the pipeline's."""
    clip = parts.clip_tokenizer()
    components: dict[str, Any] = {
        "text_encoder": parts.clip_text_encoder(clip, projected=False),
        "tokenizer": clip,
        "text_encoder_2": parts.clip_text_encoder(clip),
        "tokenizer_2": clip,
        "unet": unet(),
        "vae": parts.vae(scaling_factor=0.7),
        "scheduler": EulerDiscreteScheduler(  # SDXL's own
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }
    StableDiffusionXLPipeline(**(components | config)).save_pretrained(folder)
