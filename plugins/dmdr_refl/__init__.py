"""ReFL: the gradient of a differentiable reward, straight through the decoder.

Xu et al. 2023 (arXiv 2304.05977), section 3.2; for few-step students DMDR (arXiv 2511.13649, section 3.3), where every
student step answers with a clean image, so that the gradient needs no later step.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Term


@dataclass
class ReFL:
    """Loss per sample: -sum_k w_k r_k, or with a hinge sum_k w_k relu(margin - r_k), of the image decoded from x0.

    Attributes:
        steps: Student step whose answer is scored: "any" (the drawn one), "last" (what users see), or an index.
        hinge: Margin above which a reward is good enough and has no gradient; unset means no hinge. The published
            margin 0.7 is out of reach of hps and clip, whose scores are near 0.3: it is the plain negative reward.
        balance: "fixed" takes the gradient as it is; "grad_norm" rescales it, per sample, to the norm of the
            distribution-matching gradient, so that rl_weight is the ratio of the two where every step is scored.
    """

    steps: str = "any"
    hinge: float | None = None
    balance: Literal["fixed", "grad_norm"] = "fixed"

    def __post_init__(self) -> None:
        if self.steps not in ("any", "last") and not self.steps.isdecimal():
            raise ConfigError(f"refl: steps must be 'any', 'last' or a step index, not '{self.steps}'")

    @property
    def needs(self) -> Needs:
        steps: Any = (int(self.steps),) if self.steps.isdecimal() else self.steps
        return Needs(reward_grad=True, matching=self.balance == "grad_norm", steps=steps)

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        images = ctx.backend.decode(draw.leaf)
        scores = ctx.rewards.each(images, draw.cond.prompts, **draw.cond.columns)
        parts = (weight * self._loss(scores[name]) for name, (weight, _) in ctx.rewards.parts.items())
        loss = sum(parts, torch.zeros(()))
        total = ctx.rewards.total(scores)
        valid = total.isfinite()
        metrics = {"score": total.detach()}
        if self.hinge is not None:
            metrics["hinge_active"] = torch.stack([s < self.hinge for s in scores.values()]).float().mean(0)
        if self.balance == "fixed":
            return Term(loss, valid, metrics=metrics)
        (grad,) = torch.autograd.grad(torch.where(valid, loss, 0.0).sum(), draw.leaf)
        return Term(loss.detach(), valid, grad=self._balanced(grad, draw), metrics=metrics)

    def _loss(self, score: Tensor) -> Tensor:
        return -score if self.hinge is None else (self.hinge - score).relu()

    @staticmethod
    def _balanced(grad: Tensor, draw: Draw) -> Tensor:
        """The gradient at the norm of d L_DMD / d x0 = direction / latent size, each per sample."""
        assert draw.direction is not None
        shape = (-1, *[1] * (grad.ndim - 1))
        target = draw.direction.flatten(1).norm(dim=1) / draw.direction[0].numel()
        return grad * (target / grad.flatten(1).norm(dim=1).clamp_min(1e-12)).view(shape)
