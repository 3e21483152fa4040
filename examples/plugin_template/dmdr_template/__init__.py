"""An objective and a reward for DMDR: train a few-step student whose images score what you ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Term

__all__ = ["Brightness", "TargetScore"]


@dataclass
class TargetScore:
    """Loss per sample: (r - target)^2, r being the reward of the image decoded from the student's answer.

    Where ReFL climbs a reward without end, this stops at a value. The text under Attributes is what
    `dmdr-train --rl target_score --help` says of the flags.

    Attributes:
        target: The score that images shall have.
    """

    target: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.target <= 1:
            raise ConfigError(f"target_score: target must be between 0 and 1, not {self.target}")

    @property
    def needs(self) -> Needs:
        """Checked before the first step: this one needs the gradient of the reward."""
        return Needs(reward_grad=True)

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        images = ctx.backend.decode(draw.leaf)  # [B, 3, H, W] in [0, 1], with a graph into the student's answer
        score = ctx.rewards(images, draw.cond.prompts, **draw.cond.columns)  # [B]
        valid = score.isfinite()  # a reward may be unable to score an image
        loss = (torch.where(valid, score, self.target) - self.target) ** 2
        return Term(loss, valid, metrics={"distance": (score - self.target).detach().abs()})


@dataclass
class Brightness:
    """The mean of all pixels, in [0, 1]. A reward's fields are flags, too; this one has none."""

    differentiable: ClassVar[bool] = True
    reads_prompts: ClassVar[bool] = False

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Where a reward loads its weights, frozen, onto the device; this one has none."""

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] float32 in [0, 1] -> [B] float32; higher is better."""
        return images.float().mean((1, 2, 3))
