"""Small random parts of pipelines: real classes, few weights."""

from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from dmdr_digits.text import build_text_encoder as clip_text_encoder
from dmdr_digits.text import build_tokenizer as clip_tokenizer
from dmdr_digits.text import with_large_embeddings

WIDTH = 32
Network = TypeVar("Network", bound=nn.Module)
__all__ = [
    "WIDTH",
    "clip_text_encoder",
    "clip_tokenizer",
    "redrawn",
    "t5_text_encoder",
    "t5_tokenizer",
    "vae",
    "with_large_embeddings",
]


def t5_tokenizer() -> Any:
    letters = [(letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789.,"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def t5_text_encoder(tokenizer: Any, width: int = WIDTH) -> Any:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, pad_token_id=0
    )
    return with_large_embeddings(T5EncoderModel(config))


def redrawn(network: Network) -> Network:
    """With layers whose answers are as large as their inputs; untrained, they hardly depend on the prompt."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network


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
