"""A real CLIPTokenizer for few words, and two frozen random CLIP text encoders."""

from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

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


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Random and frozen: it only has to tell prompts apart."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(25)  # the usual 0.02 would leave the encodings, which no one trains, near zero
    return encoder.requires_grad_(False).eval()
