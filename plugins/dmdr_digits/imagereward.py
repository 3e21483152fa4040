"""A small ImageReward checkpoint in the published layout, trained on the scans."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from dmdr_digits.cache import scaled
from dmdr_digits.data import PROMPTS, Scans
from dmdr_digits.fit import fit
from dmdr_digits.lessons import CLIP_NORM, SIZE, degrade, preprocess
from dmdr_digits.quiet import quiet

WIDTH, TEXT_WIDTH = 64, 32
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# transformers' names of the vision transformer, and the authors'
NAMES = {
    r"embeddings\.class_embedding": "cls_token",
    r"embeddings\.position_embedding": "pos_embed",
    r"embeddings\.patch_embedding\.": "patch_embed.proj.",
    r"encoder\.layers\.(\d+)\.layer_norm": r"blocks.\1.norm",
    r"encoder\.layers\.(\d+)\.self_attn\.projection\.": r"blocks.\1.attn.proj.",
    r"encoder\.layers\.(\d+)\.self_attn\.": r"blocks.\1.attn.",
    r"encoder\.layers\.": "blocks.",
    r"post_layernorm\.": "norm.",
}


def build_imagereward(folder: Path, train: Scans) -> None:
    """As THUDM/ImageReward: flat `ImageReward.pt`, `med_config.json`, and a BERT tokenizer; taught preferences."""
    tokenizer = build_tokenizer()
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=1,  # of 64, as in the published network
            image_size=SIZE,
            patch_size=8,
            layer_norm_eps=1e-6,
        )
    )
    med_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }
    settings: dict[str, Any] = {**med_config, "encoder_hidden_size": WIDTH, "is_decoder": True, "bos_token_id": None}
    text = BlipTextModel(BlipTextConfig(**settings), add_pooling_layer=False)
    head = nn.Sequential(
        nn.Linear(TEXT_WIDTH, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    train_preferences(train, tokenizer, vision, text, head)
    state = {f"blip.visual_encoder.{_published(name)}": value for name, value in vision.state_dict().items()}
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    state |= {f"mlp.layers.{name}": value for name, value in head.state_dict().items()}
    torch.save({name: value.half() for name, value in state.items()}, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(med_config, indent=2) + "\n")
    with quiet():
        tokenizer.save_pretrained(folder)


def build_tokenizer() -> BertTokenizer:
    """The words of the prompts, and letters for all others."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = dict.fromkeys([*SPECIAL, *" ".join(PROMPTS).split(), *letters, *(f"##{letter}" for letter in letters)])
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)


def train_preferences(train: Scans, tokenizer: BertTokenizer, vision: Any, text: Any, head: nn.Module) -> None:
    """Bradley-Terry: a scan is preferred to its degraded copy, and its own prompt to another."""
    tokens = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")

    def score(patches: Tensor, prompt: Tensor) -> Tensor:
        read = text(
            input_ids=tokens.input_ids[prompt],
            attention_mask=tokens.attention_mask[prompt],
            encoder_hidden_states=patches,
        ).last_hidden_state
        return head(read[:, 0]).squeeze(-1)

    def loss(rows: Tensor) -> Tensor:
        asked = train.labels[rows]
        other = (asked + torch.randint(1, len(PROMPTS), asked.shape)) % len(PROMPTS)
        images = torch.cat([train.images[rows], degrade(train, rows)])
        better, worse = vision(preprocess(images, CLIP_NORM)).last_hidden_state.chunk(2)
        scores = score(torch.cat([better, worse, better]), torch.cat([asked, asked, other]))
        chosen, degraded, mistaken = scores.chunk(3)
        # The square keeps scores near the published unit of about one.
        return (
            -(F.logsigmoid(chosen - degraded) + F.logsigmoid(chosen - mistaken)).mean() + 0.02 * scores.square().mean()
        )

    both = nn.ModuleList([vision, text, head])
    fit(both, loss, "digits: reward imagereward", examples=len(train), steps=scaled(1500), weight_decay=0.1)


def _published(name: str) -> str:
    for pattern, published in NAMES.items():
        new, hits = re.subn(f"^{pattern}", published, name)
        if hits:
            return new
    return name
