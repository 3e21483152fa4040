"""ReFL: the gradient of a differentiable reward, straight through the decoder, if the reward looks at images.

Xu et al. 2023 (arXiv 2304.05977), section 3.2; for few-step students DMDR (arXiv 2511.13649, section 3.3), where every
student step answers with a clean image, so that the gradient needs no later step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Term


@dataclass
class ReFL:
    """Loss per sample: -sum_k w_k r_k, or with a hinge sum_k w_k relu(margin - r_k), of the image decoded from x0.

    Its strength beside matching depends on the reward's own scale, and little on the latent size.

    Attributes:
        steps: Student step whose answer is scored: "any" (the drawn one), "last" (what users see), or an index.
        hinge: Margin above which a reward is good enough and has no gradient; unset means no hinge. The published
            margin 0.7 is out of reach of hps and clip, whose scores are near 0.3: it is the plain negative reward.
    """

    steps: str = "any"
    hinge: float | None = None

    def __post_init__(self) -> None:
        if self.steps not in ("any", "last") and not self.steps.isdecimal():
            raise ConfigError(f"refl: steps must be 'any', 'last' or a step index, not '{self.steps}'")

    @property
    def needs(self) -> Needs:
        steps: Any = (int(self.steps),) if self.steps.isdecimal() else self.steps
        return Needs(reward_grad=True, steps=steps, finished=False)

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        scores = ctx.rewards.each_of(draw.leaf, draw.cond, ctx.backend)
        parts = (weight * self._loss(scores[name]) for name, (weight, _) in ctx.rewards.parts.items())
        loss = sum(parts, torch.zeros(()))
        total = ctx.rewards.total(scores)
        valid = total.isfinite()
        metrics = {"score": total.detach()}
        if self.hinge is not None:
            metrics["hinge_active"] = torch.stack([s < self.hinge for s in scores.values()]).float().mean(0)
        return Term(loss, valid, metrics=metrics)

    def _loss(self, score: Tensor) -> Tensor:
        return -score if self.hinge is None else (self.hinge - score).relu()
