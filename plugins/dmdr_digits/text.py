"""A real CLIPTokenizer for few words, and two frozen random CLIP text encoders."""

from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dmdr_digits.data import PROMPTS

LENGTH = 6  # <start> a handwritten seven <end>, and one spare
WIDTH = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """The words of the prompts are one token each; any other text falls back to its bytes."""
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(" ".join(PROMPTS).split()):
        token, *rest = (*word[:-1], word[-1] + "</w>")
        for piece in rest:
            if (token, piece) not in merges:
                merges.append((token, piece))
            token += piece
    characters = sorted(ByteLevel.alphabet())
    tokens = characters + [c + "</w>" for c in characters] + [a + b for a, b in merges] + [BOS, EOS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer: type[Any] = CLIPTokenizer  # its annotation of `merges` is wrong: strings are refused
    return tokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH, *, projected: bool = True) -> Any:
    """Random and frozen: it only has to tell prompts apart.

    Args:
        width: Of its embeddings.
        projected: With the pooled output of `CLIPTextModelWithProjection`; else a `CLIPTextModel`.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return with_large_embeddings((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def with_large_embeddings(encoder: nn.Module) -> nn.Module:
    """A random encoder that keeps prompts apart: with the usual 0.02 its encodings would be near zero."""
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(25)
    return encoder.requires_grad_(False).eval()
