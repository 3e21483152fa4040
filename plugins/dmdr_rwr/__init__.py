"""RWR: reward-weighted regression, denoising of the student's own images with the better ones counting more.

Peters & Schaal 2007; for diffusion models Lee et al. 2023 (arXiv 2302.12192) and Black et al. 2023 (arXiv 2305.13301).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.groups import advantages
from dmdr.matching import renoised_to_grid
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Term


@dataclass
class RWR:
    """Weighted regression on finished images x, noised to one of the student's own times:

        L = w mean (x_theta(x_t, t) - x)^2,    w = exp(A / temperature), scaled to mean one within the group

    with A the advantage (`dmdr.groups.advantages`), of root mean square 1 over the batch. With one image a prompt, the
    whole batch is one group, and prompts that are easy outweigh those that are hard.

    Errors are means over the latent: the strength beside matching depends little on its size.

    Source: Peters & Schaal 2007, "Reinforcement learning by reward-weighted regression for operational space control";
    w_RWR of arXiv 2305.13301. Adapted: the temperature is not in the reward's own unit, errors are of clean images at
    the student's own times, and the images are new in every step. Even with equal weights this is a regression, which
    on its own moves a few-step student towards the mean of its images: it is meant to go with a matching loss. A
    student of one step is refused: its images are its own answers to their noise, so there is no error to learn from.

    Attributes:
        temperature: In advantages of the usual size; small ones leave the best image alone.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"rwr: temperature must be above 0, not {self.temperature}")

    @property
    def needs(self) -> Needs:
        return Needs(batch_size=2, student_steps=2)

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        scores, group = ctx.global_scores()
        if len(group.unique()) == len(group):
            group = torch.zeros_like(group)
        advantage, valid = advantages(scores, ctx.rewards.weights, group)
        weight = regression_weights(advantage / self.temperature, group, valid)[draw.sample]
        at = renoised_to_grid(draw.rollout.final, "rwr", draw, ctx, start=draw.rollout.x_t[0])
        error = ((ctx.backend.student(at.x_t, at.t, draw.cond).x0 - at.x0) ** 2).flatten(1).mean(1)
        metrics = {"error": error, "weight_deviation": (weight - 1).abs()}
        return Term(weight.to(error.dtype) * error, valid[draw.sample], metrics=metrics)


def regression_weights(logits: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """exp(logit) with mean one over the valid samples of each group, [N] float64; 0 for the others.

    Args:
        logits: [N] float64, finite.
        group: Group of each sample, [N] int64.
        valid: Samples that count, [N] bool.
    """
    device, logits, group, valid = logits.device, logits.cpu(), group.cpu(), valid.cpu()  # of which each is looked at
    weights = torch.zeros_like(logits)
    for one in group.unique():
        rows = (group == one) & valid
        weights[rows] = logits[rows].softmax(0) * rows.sum()
    return weights.to(device, non_blocking=True)
