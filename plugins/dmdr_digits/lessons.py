"""What the reward models are taught with: scans as they see them, worse copies, and ratings."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr_digits.data import Scans

SIZE = 32
CLIP_NORM = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(images: Tensor, norm: tuple[tuple[float, ...], tuple[float, ...]], clamp: bool = True) -> Tensor:
    """[B, 3, H, W] in [0, 1] to the square input of a model, as the reward plugins do it."""
    images = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    images = images.clamp(0, 1) if clamp else images  # HPSv2 does not
    mean, std = (torch.tensor(values)[:, None, None] for values in norm)
    return (images - mean) / std


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


def rated(scans: Scans, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scans mixed with a blurred and noisy copy, and how good each still is: [B, 3, 8, 8] and [B], 2 to 7."""
    images, share = scans.images[rows], torch.rand(len(rows))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1)), 3, stride=1)
    worst = blurred + 0.3 * torch.randn(len(rows), 1, 8, 8)
    mixed = torch.lerp(images, worst, share[:, None, None, None]).clamp(0, 1)
    return mixed, 7 - 5 * share
