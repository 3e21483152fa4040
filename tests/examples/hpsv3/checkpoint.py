"""A random HPSv3 in the layout of the published one, and images to score: the same everywhere.

python checkpoint.py FOLDER    # base/, as Qwen/Qwen2-VL-7B-Instruct without its weights, and HPSv3.safetensors
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

WIDTH, LAYERS, HEADS, KEY_HEADS, INNER = 64, 2, 4, 2, 96
VISION, BLOCKS, PATCH = 64, 2, 14
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)
PROMPTS = ("a red fox on the hill", "An OLD boat; number 7 {braces}!", "caf\u00e9 \u2603 " * 20)
SIZES = ((512, 512), (300, 200))  # height and width
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokens() -> list[str]:
    """One for each byte, as byte-level BPE writes it, then the special ones."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))] + SPECIAL.split()


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published file; the tokenizer has one token more, <|Reward|>."""

    def both(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    vocabulary, merged = len(tokens()) + 1, 4 * VISION
    yield "visual.patch_embed.proj.weight", (VISION, 3, 2, PATCH, PATCH)
    for i in range(BLOCKS):
        block = f"visual.blocks.{i}"
        yield from both(f"{block}.norm1", VISION)
        yield from both(f"{block}.norm2", VISION)
        yield from both(f"{block}.attn.qkv", 3 * VISION, VISION)
        yield from both(f"{block}.attn.proj", VISION, VISION)
        yield from both(f"{block}.mlp.fc1", 2 * VISION, VISION)
        yield from both(f"{block}.mlp.fc2", VISION, 2 * VISION)
    yield from both("visual.merger.ln_q", VISION)
    yield from both("visual.merger.mlp.0", merged, merged)
    yield from both("visual.merger.mlp.2", WIDTH, merged)
    yield "model.embed_tokens.weight", (vocabulary, WIDTH)
    for i in range(LAYERS):
        layer, keys = f"model.layers.{i}", WIDTH // HEADS * KEY_HEADS
        yield from both(f"{layer}.self_attn.q_proj", WIDTH, WIDTH)
        yield from both(f"{layer}.self_attn.k_proj", keys, WIDTH)
        yield from both(f"{layer}.self_attn.v_proj", keys, WIDTH)
        yield f"{layer}.self_attn.o_proj.weight", (WIDTH, WIDTH)
        yield f"{layer}.mlp.gate_proj.weight", (INNER, WIDTH)
        yield f"{layer}.mlp.up_proj.weight", (INNER, WIDTH)
        yield f"{layer}.mlp.down_proj.weight", (WIDTH, INNER)
        yield f"{layer}.input_layernorm.weight", (WIDTH,)
        yield f"{layer}.post_attention_layernorm.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (vocabulary, WIDTH)
    yield from both("rm_head.0", 1024, WIDTH)
    yield from both("rm_head.3", 16, 1024)
    yield from both("rm_head.5", 2, 16)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Values without the symmetries of a fresh network: every bias and every norm matters."""
    bits = np.random.PCG64(seed)
    values: dict[str, torch.Tensor] = {}
    for name, shape in shapes():
        value = torch.from_numpy(_uniform(bits, shape))
        if len(shape) == 1:
            value = 0.2 * value + float("norm" in name and name.endswith("weight"))
        elif "embed_tokens" not in name:
            value *= 1.7 / float(np.prod(shape[1:])) ** 0.5
        values[name] = value
    return values


def write(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """The folder of the base model without weights, and the file of the reward's."""
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens())}
    special = SPECIAL.split()
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": len(vocabulary) + 40,  # as published, more than the tokenizer has
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
        "vision_token_id": vocabulary["<|vision_pad|>"],
        "bos_token_id": vocabulary["<|endoftext|>"],
        "eos_token_id": vocabulary["<|im_end|>"],
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": BLOCKS,
            "embed_dim": VISION,
            "hidden_size": WIDTH,
            "mlp_ratio": 2,
            "num_heads": 4,
            "in_chans": 3,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    words = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(vocabulary[token]): {
                "content": token,
                "special": True,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            }
            for token in special
        },
        "additional_special_tokens": special[1:],
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": 32768,
        "padding_side": "left",
        "chat_template": TEMPLATE,
    }
    plain = {token: i for token, i in vocabulary.items() if token not in special}
    files = {"config": config, "preprocessor_config": pixels, "tokenizer_config": words, "vocab": plain}
    for name, content in (files | {"chat_template": {"chat_template": TEMPLATE}}).items():
        (base / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (base / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    file = folder / "HPSv3.safetensors"
    save_file(state(seed), file)
    return base, file


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """8-bit [H, W, 3]: colours that change slowly, and some noise, in whole numbers throughout."""
    bits = np.random.PCG64(1000 + seed)
    across, down = np.arange(width) * 255 // width, np.arange(height) * 255 // height
    picture = np.stack(np.broadcast_arrays(across, down[:, None], (across + down[:, None]) // 2), axis=-1)
    picture = picture[..., [seed % 3, (seed + 1) % 3, (seed + 2) % 3]].astype(np.int64)
    noise = (bits.random_raw(picture.size) >> np.uint64(58)).astype(np.int64).reshape(picture.shape)
    return (picture + noise - 32).clip(0, 255).astype(np.uint8)


def _uniform(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of mean 0 and variance 1, from raw bits: the distributions of numpy may change between releases."""
    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
    return ((raw.astype(np.float32) / 2**23 - 1) * np.float32(3**0.5)).reshape(shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a small random HPSv3.")
    parser.add_argument("folder", type=Path)
    print(*write(parser.parse_args().folder))
