"""A small random Flux2KleinPipeline."""

from pathlib import Path

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

import parts
import z_image

WIDTH = 16  # of the text encoder, whose layers 9, 18 and 27 are read


def transformer() -> Flux2Transformer2DModel:
    made = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return parts.redrawn(made)


def vae() -> AutoencoderKLFlux2:
    """Four pixels a side for each of a state's."""
    made = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made


def build(folder: Path, *, is_distilled: bool = False) -> None:
    words = z_image.tokenizer()
    text = Qwen3Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    Flux2KleinPipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=parts.with_large_embeddings(Qwen3ForCausalLM(text)),
        tokenizer=words,
        is_distilled=is_distilled,
    ).save_pretrained(folder)
