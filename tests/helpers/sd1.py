"""A small random StableDiffusionPipeline: of Stable Diffusion 1, or with `prediction_type="v_prediction"` of 2."""

from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import parts


def unet() -> UNet2DConditionModel:
    """Of Stable Diffusion 1's kind: attention in the first block, convolutions as its projections."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=parts.WIDTH,
    )


def build(folder: Path, scheduler: Any = None, **schedule: Any) -> None:
    """Save it, with this scheduler or a DDIM scheduler of this schedule."""
    clip = parts.clip_tokenizer()
    own = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    StableDiffusionPipeline(
        text_encoder=parts.clip_text_encoder(clip, projected=False),
        tokenizer=clip,
        unet=unet(),
        vae=parts.vae(),
        scheduler=scheduler or DDIMScheduler(**(own | {"clip_sample": False, "set_alpha_to_one": False} | schedule)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
