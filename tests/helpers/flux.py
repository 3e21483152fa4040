"""Small random FluxPipelines: guidance-distilled with a dynamic shift (dev), or neither (schnell)."""

from functools import partial
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import parts


def transformer(distilled: bool = True) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,  # 2 x 2 pixels of 4 channels
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=parts.WIDTH,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 6, 6),
    )


def build(folder: Path, *, distilled: bool) -> None:
    clip, t5 = parts.clip_tokenizer(), parts.t5_tokenizer()
    FluxPipeline(
        transformer=transformer(distilled),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled),
        vae=parts.vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=parts.clip_text_encoder(clip, projected=False),
        tokenizer=clip,
        text_encoder_2=parts.t5_text_encoder(t5, 64),
        tokenizer_2=t5,
    ).save_pretrained(folder)


dev, schnell = partial(build, distilled=True), partial(build, distilled=False)
