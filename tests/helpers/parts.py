"""Small random parts of pipelines: real classes, few weights."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dmdr_digits.text import build_tokenizer

WIDTH = 32


def clip_tokenizer() -> Any:
    """Knows every byte; ten words are one token each."""
    return build_tokenizer()


def clip_text_encoder(tokenizer: Any, *, projected: bool = True, width: int = WIDTH) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return told_apart((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def t5_tokenizer() -> Any:
    letters = [(letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789.,"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def t5_text_encoder(tokenizer: Any, width: int = WIDTH) -> Any:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, pad_token_id=0
    )
    return told_apart(T5EncoderModel(config))


def vae(channels: int = 4, **config: Any) -> AutoencoderKL:
    """Two pixels a side for each latent one."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        **config,
    )


def told_apart(encoder: nn.Module) -> nn.Module:
    """With embeddings so large that random layers keep prompts apart."""
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(25)
    return encoder.requires_grad_(False).eval()
