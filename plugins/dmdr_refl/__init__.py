"""ReFL: the gradient of a differentiable reward, straight through the decoder, if the reward looks at images.

Xu et al. 2023 (arXiv 2304.05977), section 3.2; for few-step students DMDR (arXiv 2511.13649, section 3.3), where every
student step answers with a clean image, so that the gradient needs no later step.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.paths import Prediction
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Term


@dataclass
class ReFL:
    """Loss per sample: -sum_k w_k r_k, or with a hinge sum_k w_k relu(margin - r_k), of the image decoded from x0,

        + kl_beta KL(student || reference)        of the drawn step, with the stage-1 student as reference

    The KL is that of Flow-GRPO (arXiv 2505.05470), of the sampler's Gaussian step. At a step without noise, such as the
    last, it is half the squared distance of the two states after it (`dmdr.sampling.FewStepSampler.kl`).

    Its strength beside matching depends on the reward's own scale, and little on the latent size.

    Attributes:
        steps: Student step whose answer is scored: "any" (the drawn one), "last" (what users see), or an index.
        kl_beta: Weight of the KL divergence, a mean over the latent; 0 needs no reference.
        hinge: Margin above which a reward is good enough and has no gradient; unset means no hinge. The published
            margin 0.7 is out of reach of hps and clip, whose scores are near 0.3: it is the plain negative reward.
    """

    steps: str = "any"
    kl_beta: float = 0.0
    hinge: float | None = None

    def __post_init__(self) -> None:
        if self.steps not in ("any", "last") and not self.steps.isdecimal():
            raise ConfigError(f"refl: steps must be 'any', 'last' or a step index, not '{self.steps}'")
        if not 0 <= self.kl_beta < math.inf:
            raise ConfigError(f"refl: kl_beta must be at least 0, not {self.kl_beta}")

    @property
    def needs(self) -> Needs:
        steps: Any = (int(self.steps),) if self.steps.isdecimal() else self.steps
        roles: Any = ("reference",) if self.kl_beta else ()
        return Needs(reward_grad=True, steps=steps, finished=False, roles=roles)

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        scores = ctx.rewards.each_of(draw.leaf, draw.cond, ctx.backend)
        parts = (weight * self._loss(scores[name]) for name, (weight, _) in ctx.rewards.parts.items())
        loss = sum(parts, torch.zeros(()))
        total = ctx.rewards.total(scores)
        valid = total.isfinite()
        metrics = {"score": total.detach()}
        if self.kl_beta:
            student = Prediction(draw.leaf, "x0", draw.x_t, draw.t, ctx.backend.path)
            kl = ctx.sampler.kl(draw.index, student, ctx.backend.reference(draw.x_t, draw.t, draw.cond))
            loss, metrics = loss + self.kl_beta * kl, metrics | {"kl": kl.detach()}
        if self.hinge is not None:
            metrics["hinge_active"] = torch.stack([s < self.hinge for s in scores.values()]).float().mean(0)
        return Term(loss, valid, metrics=metrics)

    def _loss(self, score: Tensor) -> Tensor:
        return -score if self.hinge is None else (self.hinge - score).relu()
