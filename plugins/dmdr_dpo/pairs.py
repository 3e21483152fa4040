"""Where pairs come from: the rewards of a group, or a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.groups import spread_out
from dmdr.images import read_image
from dmdr.protocols import Backend


def best_and_worst(reward: Tensor, group: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Rows of the best and the worst sample of each group, each [P].

    Args:
        reward: [B]; a sample whose reward is not finite is in no pair.
        group: Group of each sample, [B] int64.
        margin: A group whose rewards differ by no more, or only by rounding, has no pair.
    """
    pairs, device = [], group.device
    reward, group = reward.cpu(), group.cpu()  # of which each is looked at
    for one in group.unique():
        rows = ((group == one) & reward.isfinite()).nonzero().flatten()
        if len(rows) and spread_out(reward[rows]):
            best, worst = rows[reward[rows].argmax()], rows[reward[rows].argmin()]
            if reward[best] - reward[worst] > margin:
                pairs.append(torch.stack([best, worst]))
    best, worst = (torch.stack(pairs, 1) if pairs else group.new_zeros(2, 0)).to(device, non_blocking=True)
    return best, worst


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt, the preferred one first."""

    prompt: str
    chosen: Path
    rejected: Path


def read_pairs(path: str) -> list[Pair]:
    """The pairs of a JSONL file: `{"prompt": ..., "chosen": path, "rejected": path}`, paths relative to its folder.

    Blank lines are skipped.

    Raises:
        ConfigError: If the file or an image is missing, or a line is no pair; names file and line.
    """
    if not Path(path).is_file():
        raise ConfigError(f"dpo: no such file of pairs: {path}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"dpo: {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                pairs.append(_pair(json.loads(line), Path(path).parent))
            except json.JSONDecodeError as error:
                what = f"no JSON: {error.msg} (at character {error.pos + 1})"
                raise ConfigError(f"dpo: {path} line {number}: {what}") from error
            except ValueError as error:
                raise ConfigError(f"dpo: {path} line {number}: {error}") from error
    if not pairs:
        raise ConfigError(
            f"dpo: {path} holds no pair; write one JSON object per line, with prompt, chosen and rejected"
        )
    return pairs


def _pair(row: object, folder: Path) -> Pair:
    """A parsed line; a ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("not an object with prompt, chosen and rejected")
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"'{key}' is missing, empty or no string")
    for key in ("chosen", "rejected"):
        if not (folder / row[key]).is_file():
            raise ValueError(f"no such image: {folder / row[key]}")
    return Pair(row["prompt"], folder / row["chosen"], folder / row["rejected"])


@torch.no_grad()
def latents_of(files: Sequence[Path], backend: Backend) -> Tensor:
    """Latents of images, [B, *latent].

    Raises:
        ConfigError: If a file is damaged, or its latent has another shape than the student's; names the file.
    """
    latents = []
    for file in files:  # one at a time, so that an image of another size can be named
        latent = backend.encode_images(read_image(file)[None].float() / 255)
        if tuple(latent.shape[1:]) != tuple(backend.latent_shape):
            raise ConfigError(
                f"dpo: {file} becomes a latent of {list(latent.shape[1:])}, and the student makes "
                f"{list(backend.latent_shape)}: images must have the training resolution, the first of several"
            )
        latents.append(latent)
    return torch.cat(latents)
