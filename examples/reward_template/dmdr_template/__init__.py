"""A reward for DMDR: a score of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Brightness"]


@dataclass
class Brightness:
    """The mean of all pixels, to a power.

    The text under Attributes is what `dmdr-train --reward brightness --help` says of the flags.

    Attributes:
        power: Above 1, bright pixels count more.
    """

    differentiable: ClassVar[bool] = True
    reads_prompts: ClassVar[bool] = False
    power: float = 1.0

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Where a reward loads its weights, frozen, onto the device; this one has none."""

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] float32 in [0, 1] -> [B] float32; higher is better, NaN where it cannot score."""
        return (images.float() ** self.power).mean((1, 2, 3))
