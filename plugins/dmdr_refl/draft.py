"""DRaFT-K: the gradient of a differentiable reward, through the last K steps of the student's own sampler.

Clark et al. 2023 (arXiv 2309.17400). With K = 1 it is ReFL of the last step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.paths import Prediction
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Term


@dataclass
class DRaFT:
    """Loss per sample: -sum_k w_k r_k of the finished image, as a function of the student's last steps:

        x_{i + 1} = mu(x_i) + n_i,    from the stored state before the last `last_steps` steps on

    with mu the mean of the sampler's step and n_i the noise that the rollout had there. So the student learns what its
    later steps make of an answer, which ReFL, step by step, does not see. All images of the batch count, whichever step
    was drawn for matching.

    The reward's graph is freed before the student's is built. The graphs of all `last_steps` passes are alive together:
    at 2, twice the memory of ReFL's student pass, less with --gradient_checkpointing. It costs as many passes with
    gradient, and complete rollouts.

    Source: arXiv 2309.17400, DRaFT-K. Its variant DRaFT-LV averages over new noises before the last step: it is made
    for many small steps. Before the last of a few steps another noise makes another image.

    Attributes:
        last_steps: Steps that the gradient goes through, K. 1 is what `refl` does with steps "last", which shares the
            pass of matching.
    """

    last_steps: int = 2

    def __post_init__(self) -> None:
        if self.last_steps < 1:
            raise ConfigError(f"draft: last_steps must be at least 1, not {self.last_steps}")

    @property
    def needs(self) -> Needs:
        return Needs(reward_grad=True, student_steps=self.last_steps)

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        with torch.no_grad():  # the student that made the rollout has answered already
            final = self.walked(draw, ctx) if draw.iteration else draw.rollout.final
        leaf = final.detach().requires_grad_()
        score = ctx.rewards.total(ctx.rewards.each_of(leaf, draw.cond, ctx.backend))
        valid = score.isfinite()
        slope = ctx.grad(-torch.where(valid, score, 0.0).sum(), leaf)
        slope = torch.where(valid.view(-1, *[1] * (slope.ndim - 1)), slope, 0.0)
        x = self.walked(draw, ctx)
        loss = ((x - x.detach()) * slope).flatten(1).sum(1) - score.detach()  # its value is the reward's
        return Term(loss, valid, metrics={"score": score.detach()})

    def walked(self, draw: Draw, ctx: Context) -> Tensor:
        """What the student's last steps make of the stored state before them, [B, *latent]."""
        rollout, count = draw.rollout, ctx.sampler.num_inference_steps
        x = rollout.x_t[count - self.last_steps]
        for i in range(count - self.last_steps, count):
            t = rollout.t[i].to(x.device, non_blocking=True).expand(len(draw))
            then = Prediction(rollout.x0[i], "x0", rollout.x_t[i], t, ctx.backend.path)
            noise = rollout.x_t[i + 1] - ctx.sampler.moments(i, then)[0]  # 0 at the last step
            x = ctx.sampler.moments(i, ctx.backend.student(x, t, draw.cond))[0] + noise
        return x
