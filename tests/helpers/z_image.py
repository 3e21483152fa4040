"""A small random ZImagePipeline."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

import parts

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """Of bytes, in the chat format of Qwen."""
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": tokens[-2:]})
    made.chat_template = TEMPLATE
    return made


def transformer() -> ZImageTransformer2DModel:
    made = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=parts.WIDTH,
        axes_dims=(4, 6, 6),
        axes_lens=(96, 16, 16),
    )
    with torch.no_grad():  # a trained network's are not zero
        for token in (made.x_pad_token, made.cap_pad_token):
            token.normal_()
    return made


def build(folder: Path) -> None:
    words = tokenizer()
    text = Qwen3Config(
        vocab_size=len(words),
        hidden_size=parts.WIDTH,
        intermediate_size=2 * parts.WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    ZImagePipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=parts.with_large_embeddings(Qwen3Model(text)),
        tokenizer=words,
    ).save_pretrained(folder)
