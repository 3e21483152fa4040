"""Small CLIP and DINOv2 reward checkpoints in the layouts of the published ones, half precision, trained on scans."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
)

from dmdr_digits.cache import scaled
from dmdr_digits.data import PROMPTS, WORDS, Scans
from dmdr_digits.fit import fit
from dmdr_digits.lessons import CLIP_NORM, IMAGENET_NORM, SIZE, degrade, preprocess, rated
from dmdr_digits.quiet import quiet
from dmdr_digits.text import build_tokenizer


def build_clip(folder: Path, train: Scans) -> None:
    """As apple/DFN5B-CLIP-ViT-H-14: flat state dict, QuickGELU, images squashed."""
    config = clip_config(quick_gelu=True)
    model = new_clip(config)
    train_contrastive(model, train, "digits: reward clip")
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    write_config(folder, config, resize_mode="squash")


def build_hps(folder: Path, train: Scans) -> None:
    """As HPSv2.1: `{"state_dict": ...}`, GELU, images padded to a square; taught preferences."""
    config = clip_config()
    model = new_clip(config)
    train_contrastive(model, train, "digits: reward hps (1/2)", clamp=False)
    train_preferences(model, train, "digits: reward hps (2/2)")
    state = {k: v.half() for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    write_config(folder, config, resize_mode="longest")


def build_dinov2(folder: Path, train: Scans) -> None:
    """As facebook/dinov2-large-imagenet1k-1-layer: a classifier of transformers."""
    config = Dinov2Config(
        image_size=SIZE,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=dict(enumerate(WORDS)),
        label2id={word: i for i, word in enumerate(WORDS)},
    )
    model = Dinov2ForImageClassification(config)

    def loss(rows: Tensor) -> Tensor:
        images = preprocess(train.images[rows], IMAGENET_NORM)
        return F.cross_entropy(model(images).logits, train.labels[rows])

    fit(model, loss, "digits: reward dinov2", examples=len(train), steps=scaled(1200), weight_decay=0.1)
    with quiet():
        model.half().save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=IMAGENET_NORM[0],
        image_std=IMAGENET_NORM[1],
    ).save_pretrained(folder)


def build_pickscore(folder: Path, train: Scans) -> None:
    """As yuvalkirstain/PickScore_v1: a CLIP of transformers, GELU, with processor and tokenizer; taught preferences."""
    model, tokens = build_transformers_clip(folder)

    def similarity(images: Tensor) -> Tensor:
        found = model(input_ids=tokens, pixel_values=preprocess(images, CLIP_NORM))
        return found.logits_per_image

    def loss(rows: Tensor) -> Tensor:
        labels = train.labels[rows]
        better, worse = similarity(torch.cat([train.images[rows], degrade(train, rows)])).chunk(2)
        margin = (better - worse).gather(1, labels[:, None])
        return F.cross_entropy(better, labels) - F.logsigmoid(margin).mean()

    fit(model, loss, "digits: reward pickscore", examples=len(train), steps=scaled(1000), weight_decay=0.1)
    with quiet():
        model.half().save_pretrained(folder)


def build_aesthetic(folder: Path, train: Scans) -> None:
    """As LAION's predictor: five linear layers on the unit image feature of a CLIP of transformers, whose text tower is
    not trained here; taught to tell how much an image was degraded."""
    model, _ = build_transformers_clip(folder)
    widths = (model.config.projection_dim, 1024, 128, 64, 16, 1)
    layers = [nn.Linear(*pair) for pair in pairwise(widths)]
    dropouts = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    head = nn.Sequential(*(m for pair in zip(layers[:3], dropouts, strict=True) for m in pair), *layers[3:])

    def loss(rows: Tensor) -> Tensor:
        images, ratings = rated(train, rows)
        features = model.get_image_features(preprocess(images, CLIP_NORM)).pooler_output
        return F.mse_loss(head(F.normalize(features, dim=-1)).squeeze(-1), ratings)

    both = nn.ModuleList([model.vision_model, model.visual_projection, head])
    fit(both, loss, "digits: reward aesthetic", examples=len(train), steps=scaled(1000), weight_decay=0.1)
    state = {f"layers.{k}": v.half() for k, v in head.state_dict().items()}
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    with quiet():
        model.half().save_pretrained(folder)


def build_transformers_clip(folder: Path) -> tuple[Any, Tensor]:
    """A fresh `CLIPModel`, and the tokens of the ten prompts; writes its processor and tokenizer."""
    tokenizer: Any = build_tokenizer()
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = {"hidden_size": 32, "intermediate_size": 128, "max_position_embeddings": 16, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 64, "intermediate_size": 256, "image_size": SIZE, "patch_size": 8}
    config = CLIPConfig(text_config=text | size | ends, vision_config=vision | size, projection_dim=32)
    square = {"height": SIZE, "width": SIZE}
    with quiet():
        tokenizer.save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square).save_pretrained(folder)
    return CLIPModel(config), tokenizer(list(PROMPTS), padding=True, return_tensors="pt").input_ids


def clip_config(**flags: bool) -> dict[str, Any]:
    vision = {"image_size": SIZE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, **flags}


def new_clip(config: dict[str, Any]) -> open_clip.CLIP:
    """Its words are frozen, since ten prompts use few of them: random signs, so that the file packs well."""
    model = open_clip.CLIP(**config)
    model.token_embedding.requires_grad_(False).weight.sign_().mul_(0.02)
    return model


def write_config(folder: Path, config: dict[str, Any], resize_mode: str) -> None:
    mean, std = CLIP_NORM
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": resize_mode}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n")


def train_contrastive(model: open_clip.CLIP, train: Scans, label: str, clamp: bool = True) -> None:
    """Cross-entropy over the ten prompts, of cosine times a learnt scale."""
    tokens = prompt_tokens(model)

    def loss(rows: Tensor) -> Tensor:
        images = preprocess(train.images[rows], CLIP_NORM, clamp)
        return F.cross_entropy(similarity(model, images, tokens), train.labels[rows])

    fit(model, loss, label, examples=len(train), steps=scaled(800), weight_decay=0.1)


def train_preferences(model: open_clip.CLIP, train: Scans, label: str) -> None:
    """Bradley-Terry on the scaled cosine: a scan is preferred to its degraded copy and to another digit."""
    tokens = prompt_tokens(model)

    def loss(rows: Tensor) -> Tensor:
        labels = train.labels[rows]
        pairs = torch.cat([train.images[rows], degrade(train, rows)])
        better, worse = similarity(model, preprocess(pairs, CLIP_NORM, clamp=False), tokens).chunk(2)
        margin = (better - worse).gather(1, labels[:, None])
        return F.cross_entropy(better, labels) - F.logsigmoid(margin).mean()

    model.requires_grad_(True).token_embedding.requires_grad_(False)
    fit(model, loss, label, examples=len(train), steps=scaled(600), learning_rate=1e-3, weight_decay=0.1)


def similarity(model: open_clip.CLIP, images: Tensor, tokens: Tensor) -> Tensor:
    """Scaled cosines of all images with all ten prompts, [B, 10]."""
    images, texts = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    return model.logit_scale.exp() * images @ texts.T


def prompt_tokens(model: open_clip.CLIP) -> Tensor:
    return open_clip.SimpleTokenizer(context_length=model.context_length)(list(PROMPTS))
