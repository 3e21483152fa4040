"""A small random Krea2Pipeline."""

from pathlib import Path

from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

import parts
import qwen_image
import z_image


def transformer() -> Krea2Transformer2DModel:
    made = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=parts.WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    return parts.redrawn(made)


def build(folder: Path, *, is_distilled: bool = False) -> None:
    words = z_image.tokenizer()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": parts.WIDTH}
    text = Qwen3VLConfig(
        text_config=qwen_image.language(words, num_hidden_layers=3, head_dim=16),
        vision_config=vision | {"deepstack_visual_indexes": [0]},
    )
    Krea2Pipeline(
        transformer=transformer(),
        scheduler=qwen_image.scheduler(max_shift=1.15, max_image_seq_len=6400),
        vae=qwen_image.vae(),
        text_encoder=parts.with_large_embeddings(Qwen3VLModel(text)),
        tokenizer=words,
        text_encoder_select_layers=(1, 2, 3),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
