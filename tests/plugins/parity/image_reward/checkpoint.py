"""Random checkpoints in the layout of the published ImageReward, and images to score: the same everywhere.

python checkpoint.py FOLDER          # small: a second, 3 MB
python checkpoint.py --full FOLDER   # as large as the published one: 1.8 GB
"""

import argparse
import hashlib
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

WEIGHTS = "ImageReward.pt"
EMBEDDED = 0.03  # so small that the norms that follow feel their epsilons
WORDS = "a an the of on in and with red green blue fox dog cat boat hill house tree night old photo painting number"
TOKENS = (
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    + list(string.digits + string.ascii_lowercase + "!\"'(),-.:;?[]")
    + [f"##{character}" for character in string.digits + string.ascii_lowercase]
    + [word for word in WORDS.split() if len(word) > 1]
)
PROMPTS = (
    "a red fox on the hill",
    "An OLD boat, painting; number 7!",
    "a photo of the house and the tree at night with a dog " * 4,  # more than 35 tokens
    "",
    "caf\u00e9 \u2603 \u72d0",  # an accent, and two characters that the vocabulary lacks
)


@dataclass(frozen=True)
class Sizes:
    """Of an ImageReward; the vision transformer has heads of 64."""

    image: int = 48
    patch: int = 16
    vision: int = 128
    vision_layers: int = 2
    text: int = 64
    text_layers: int = 2
    text_heads: int = 2
    intermediate: int = 128
    vocabulary: int = len(TOKENS) + 2  # the package adds [DEC] and [ENC]
    positions: int = 512


SMALL = Sizes()
FULL = Sizes(224, 16, 1024, 24, 768, 12, 12, 3072, 30524, 512)


def shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters, in the order of the file."""

    def both(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    width, hidden = sizes.vision, sizes.text
    yield "blip.visual_encoder.cls_token", (1, 1, width)
    yield "blip.visual_encoder.pos_embed", (1, 1 + (sizes.image // sizes.patch) ** 2, width)
    yield from both("blip.visual_encoder.patch_embed.proj", width, 3, sizes.patch, sizes.patch)
    for i in range(sizes.vision_layers):
        block = f"blip.visual_encoder.blocks.{i}"
        yield from both(f"{block}.norm1", width)
        yield from both(f"{block}.attn.qkv", 3 * width, width)
        yield from both(f"{block}.attn.proj", width, width)
        yield from both(f"{block}.norm2", width)
        yield from both(f"{block}.mlp.fc1", 4 * width, width)
        yield from both(f"{block}.mlp.fc2", width, 4 * width)
    yield from both("blip.visual_encoder.norm", width)
    yield "blip.text_encoder.embeddings.word_embeddings.weight", (sizes.vocabulary, hidden)
    yield "blip.text_encoder.embeddings.position_embeddings.weight", (sizes.positions, hidden)
    yield from both("blip.text_encoder.embeddings.LayerNorm", hidden)
    for i in range(sizes.text_layers):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention, read in (("attention", hidden), ("crossattention", width)):
            yield from both(f"{layer}.{attention}.self.query", hidden, hidden)
            yield from both(f"{layer}.{attention}.self.key", hidden, read)
            yield from both(f"{layer}.{attention}.self.value", hidden, read)
            yield from both(f"{layer}.{attention}.output.dense", hidden, hidden)
            yield from both(f"{layer}.{attention}.output.LayerNorm", hidden)
        yield from both(f"{layer}.intermediate.dense", sizes.intermediate, hidden)
        yield from both(f"{layer}.output.dense", hidden, sizes.intermediate)
        yield from both(f"{layer}.output.LayerNorm", hidden)
    yield from both("blip.vision_proj", 256, width)
    yield from both("blip.text_proj", 256, hidden)
    widths = (hidden, 1024, 128, 64, 16, 1)
    for i, (fed, made) in zip((0, 2, 4, 6, 7), pairwise(widths), strict=True):
        yield from both(f"mlp.layers.{i}", made, fed)


def state(sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values without the symmetries of a fresh network: every bias, every norm and its epsilon matter."""
    bits = np.random.PCG64(seed)
    values: dict[str, torch.Tensor] = {}
    for name, shape in shapes(sizes):
        value = torch.from_numpy(_uniform(bits, shape))
        if len(shape) == 1:
            value = 0.2 * value + float(name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "Norm.weight")))
        elif len(shape) != 3 and "embedding" not in name:
            value /= float(np.prod(shape[1:])) ** 0.5
        if any(part in name for part in ("_embeddings", "pos_embed", "patch_embed", "cls_token")):
            value *= EMBEDDED
        values[name] = value
    values["blip.text_encoder.embeddings.position_ids"] = torch.arange(sizes.positions)[None]
    return values


def write(folder: Path, sizes: Sizes = SMALL, seed: int = 0) -> str:
    """The files of a checkpoint, with a tokenizer of a hundred tokens; the sha256 of the weights' values."""
    folder.mkdir(parents=True, exist_ok=True)
    values = state(sizes, seed)
    torch.save(values, folder / WEIGHTS)
    config = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": sizes.text,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": sizes.positions,
        "model_type": "bert",
        "num_attention_heads": sizes.text_heads,
        "num_hidden_layers": sizes.text_layers,
        "pad_token_id": 0,
        "add_type_embeddings": False,
        "vocab_size": sizes.vocabulary,
        "encoder_width": sizes.text,  # as published; the package puts the width of its vision transformer there
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(config, indent=4))
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    kind = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(values[name].numpy().data)
    return digest.hexdigest()


def images(size: int) -> dict[str, np.ndarray]:
    """8-bit images [H, W, 3] by name: of the network's own size, larger, and not square."""
    found = {f"own {seed}": _image(size, size, seed) for seed in range(3)}
    for height, width in ((512, 512), (300, 200), (200, 315)):  # of the last, half a pixel is left at the crop
        found[f"{height}x{width}"] = _image(height, width, height + width)
    return found


def _image(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth picture with some noise and a black and a white bar, in whole numbers throughout."""
    bits = np.random.PCG64(1000 + seed)
    grid = (bits.random_raw(5 * 5 * 3) >> np.uint64(55)).astype(np.int64).reshape(5, 5, 3) - 128  # beyond black, white
    (top, down), (left, right) = _places(height), _places(width)
    rows = grid[top] * (1024 - down)[:, None, None] + grid[top + 1] * down[:, None, None]
    picture = rows[:, left] * (1024 - right)[:, None] + rows[:, left + 1] * right[:, None]
    # Without noise, whole areas would resize to halves of 255, which a last bit rounds up or down.
    noise = (bits.random_raw(picture.size) >> np.uint64(60)).astype(np.int64).reshape(picture.shape)
    picture = ((picture >> 20) + noise).clip(0, 255)
    picture[height // 6 : height // 4] = 255
    picture[:, width // 2 : width // 2 + max(1, width // 12)] = 0
    return picture.astype(np.uint8)


def _places(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where pixels lie in a grid of five: the point before each, and 1024ths of the way to the next."""
    places = np.arange(length) * (4 * 1024) // length
    return places // 1024, places % 1024


def _uniform(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of mean 0 and variance 1, from raw bits: the distributions of numpy may change between releases."""
    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
    return ((raw.astype(np.float32) / 2**23 - 1) * np.float32(3**0.5)).reshape(shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a random ImageReward.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="of the published size")
    given = parser.parse_args()
    print(write(given.folder, FULL if given.full else SMALL))
