"""The 1,797 real 8x8 scans of scikit-learn, their split, and their prompts."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dmdr.images import to_pil

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a handwritten {word}" for word in WORDS)
TRAIN = 1200


@dataclass(frozen=True)
class Scans:
    """Images [N, 3, 8, 8] float32 in [0, 1], grey in three channels, and their digits [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> "Scans":
        return Scans(self.images[rows], self.labels[rows])


@cache
def scans() -> Scans:
    """All scans, in a fixed shuffled order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Scans(images, torch.tensor(digits.target))[order]


def train_scans() -> Scans:
    """The 1,200 scans that everything is trained on but the held-out rewards: VAE, teacher, rewards, judge."""
    return scans()[:TRAIN]


def held_out_scans() -> Scans:
    """The other 597, which only rewards that measure (--eval_reward) are trained on."""
    return scans()[TRAIN:]


def write_scans(folder: Path) -> None:
    """The train scans as files, with an index as `datasets` calls an imagefolder's."""
    train = train_scans()
    rows = [{"file_name": f"{i:04d}.png", "label": label} for i, label in enumerate(train.labels.tolist())]
    for row, image in zip(rows, to_pil(train.images), strict=True):
        image.save(folder / row["file_name"])
    lines = [json.dumps(row | {"prompt": PROMPTS[row["label"]]}) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines))


def label_of(prompt: str) -> int:
    """The digit that a prompt names, the last one where it names several; -1 where it names none."""
    return next((WORDS.index(word) for word in reversed(prompt.lower().split()) if word in WORDS), -1)


def nearest_neighbour_distances(images: Tensor, scans: Tensor) -> Tensor:
    """Distance of each image to the nearest scan, Euclidean over the 64 grey pixels; [B] float32.

    A teacher that has memorised its training scans is much nearer to them than to as many held-out ones.
    """
    return torch.cdist(images.float().mean(1).flatten(1), scans.mean(1).flatten(1)).min(1).values
