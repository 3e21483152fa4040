"""Small reward checkpoints in the layouts of the published ones, trained on the scans."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

from dmdr_digits.cache import scaled
from dmdr_digits.data import PROMPTS, WORDS, Scans, train_scans
from dmdr_digits.fit import fit
from dmdr_digits.quiet import quiet

SIZE = 32
CLIP_NORM = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_clip(folder: Path) -> None:
    """As apple/DFN5B-CLIP-ViT-H-14: flat state dict, QuickGELU, images squashed."""
    config = clip_config(quick_gelu=True)
    model = open_clip.CLIP(**config)
    train_contrastive(model, "digits: reward clip")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    write_config(folder, config, resize_mode="squash")


def build_hps(folder: Path) -> None:
    """As HPSv2.1: `{"state_dict": ...}` in half precision, GELU, images padded to a square; taught preferences."""
    config = clip_config()
    model = open_clip.CLIP(**config)
    train_contrastive(model, "digits: reward hps (1/2)", clamp=False)
    train_preferences(model, "digits: reward hps (2/2)")
    state = {k: v.half() for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    write_config(folder, config, resize_mode="longest")


def build_dinov2(folder: Path) -> None:
    """As facebook/dinov2-large-imagenet1k-1-layer: a classifier of transformers."""
    train = train_scans()
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
        model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=IMAGENET_NORM[0],
        image_std=IMAGENET_NORM[1],
    ).save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {"hps": build_hps, "clip": build_clip, "dinov2": build_dinov2}


def clip_config(**flags: bool) -> dict[str, Any]:
    vision = {"image_size": SIZE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, **flags}


def write_config(folder: Path, config: dict[str, Any], resize_mode: str) -> None:
    mean, std = CLIP_NORM
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": resize_mode}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n")


def preprocess(images: Tensor, norm: tuple[tuple[float, ...], tuple[float, ...]], clamp: bool = True) -> Tensor:
    """[B, 3, H, W] in [0, 1] to the square input of a model, as the reward plugins do it."""
    images = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    images = images.clamp(0, 1) if clamp else images  # HPSv2 does not
    mean, std = (torch.tensor(values)[:, None, None] for values in norm)
    return (images - mean) / std


def train_contrastive(model: open_clip.CLIP, label: str, clamp: bool = True) -> None:
    """Cross-entropy over the ten prompts, of cosine times a learnt scale."""
    train = train_scans()
    tokens = prompt_tokens(model)

    def loss(rows: Tensor) -> Tensor:
        images = preprocess(train.images[rows], CLIP_NORM, clamp)
        return F.cross_entropy(similarity(model, images, tokens), train.labels[rows])

    model.token_embedding.requires_grad_(False)  # 1.6 of the 1.7 M parameters; ten prompts can do without
    fit(model, loss, label, examples=len(train), steps=scaled(800), weight_decay=0.1)


def train_preferences(model: open_clip.CLIP, label: str) -> None:
    """Bradley-Terry on the scaled cosine: a scan is preferred to its degraded copy and to another digit."""
    train = train_scans()
    tokens = prompt_tokens(model)

    def loss(rows: Tensor) -> Tensor:
        labels = train.labels[rows]
        pairs = torch.cat([train.images[rows], degrade(train, rows)])
        better, worse = similarity(model, preprocess(pairs, CLIP_NORM, clamp=False), tokens).chunk(2)
        margin = (better - worse).gather(1, labels[:, None])
        return F.cross_entropy(better, labels) - F.logsigmoid(margin).mean()

    model.requires_grad_(True)
    model.token_embedding.requires_grad_(False)
    fit(model, loss, label, examples=len(train), steps=scaled(600), learning_rate=1e-3, weight_decay=0.1)


def degrade(scans: Scans, rows: Tensor) -> Tensor:
    """Worse images for the same prompts, a quarter each: blurred, noisy, of another digit, with broken strokes."""
    images, labels = scans.images[rows], scans.labels[rows]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1)), 3, stride=1)
    noisy = (images + (0.1 + 0.3 * torch.rand(len(rows), 1, 1, 1)) * torch.randn(len(rows), 1, 8, 8)).clamp(0, 1)
    others = torch.randint(len(scans), (len(rows), 20))
    differs = scans.labels[others] != labels[:, None]
    other = scans.images[others.gather(1, differs.int().argmax(1, keepdim=True)).flatten()]
    keep = F.interpolate((torch.rand(len(rows), 1, 4, 4) > 0.3).float(), scale_factor=2)
    kinds = torch.stack([blurred, noisy, other, images * keep])
    return kinds[torch.randint(4, (len(rows),)), torch.arange(len(rows))]


def similarity(model: open_clip.CLIP, images: Tensor, tokens: Tensor) -> Tensor:
    """Scaled cosines of all images with all ten prompts, [B, 10]."""
    images, texts = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    return model.logit_scale.exp() * images @ texts.T


def prompt_tokens(model: open_clip.CLIP) -> Tensor:
    return open_clip.SimpleTokenizer(context_length=model.context_length)(list(PROMPTS))
