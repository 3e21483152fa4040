"""Reward-tilted distribution matching (RT-DM; DMDR, arXiv 2511.13649, section 2.4, eq. 4) as a weight per sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr.groups import spread_out
from dmdr.protocols import Context
from dmdr.types import Direction, Draw


def standardised(scores: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    """Weighted sum of rewards, each in units of its own standard deviation over the valid samples.

    Args:
        scores: Raw rewards of the global batch by name, each [N] float32, NaN or infinite where not applicable.
        weights: Weight of each name.

    Returns:
        The sum [N] float64 (0 where not valid; a constant reward adds 0), and the valid samples [N] bool.
    """
    valid = torch.stack([score.isfinite() for score in scores.values()]).all(0)
    total = torch.zeros_like(valid, dtype=torch.float64)
    for name, score in scores.items():
        usable = score[valid].double()
        if len(usable) > 1 and spread_out(usable):
            total[valid] += weights[name] * (usable - usable.mean()) / usable.std(correction=0)
    return total, valid


def tilt_weights(
    rewards: Tensor, beta: float, *, valid: Tensor | None = None, clip: tuple[float, float] = (0.1, 5.0)
) -> Tensor:
    """w = exp(r / beta) / mean exp(r / beta), clipped to `clip` and brought back to mean one.

    Args:
        rewards: [N], the whole global batch.
        beta: Temperature in units of the reward; > 0.
        valid: Samples that count, [N] bool; the others get the neutral weight 1 and enter no statistic.

    Returns:
        [N] float32, mean one over the valid samples; exactly 1 where the rewards do not differ.
    """
    valid = rewards.isfinite() if valid is None else valid
    weights = torch.ones(len(rewards), dtype=torch.float64, device=rewards.device)
    usable = rewards[valid].double()
    if len(usable) < 2 or not spread_out(usable):
        return weights.float()
    w = ((usable - usable.max()) / beta).exp()
    w = (w / w.mean()).clamp(*clip)
    weights[valid] = w / w.mean()
    return weights.float()


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 as a share of N: 1 for equal weights, 1 / N if one sample takes all."""
    return weights.sum() ** 2 / (weights**2).sum() / len(weights)


@dataclass(frozen=True)
class RewardTilt:
    """RT-DM: the reward of the finished image as a constant weight of its sample's DMD gradient.

    This is the weight of a forward-KL-like divergence to p_teacher exp(r / beta), not the gradient of the reverse KL to
    it: where the student can match the teacher exactly, the direction is zero and so is the weighted one. It moves mass
    towards high reward only where the student cannot match the teacher everywhere, and saturates there.

    Attributes:
        tau: Temperature in standard deviations of the (standardised, summed) reward; 1 to 2 is usual.
        clip: Least and greatest weight, before the mean is brought back to one.
    """

    tau: float
    clip: tuple[float, float] = (0.1, 5.0)

    def __call__(self, draw: Draw, direction: Direction, ctx: Context) -> Tensor:
        scores, _ = ctx.global_scores()
        rewards, valid = standardised(scores, {name: weight for name, (weight, _) in ctx.rewards.parts.items()})
        std = rewards[valid].std(correction=0).item() if valid.any() else 0.0
        weights = tilt_weights(rewards, max(self.tau * std, 1e-12), valid=valid, clip=self.clip)
        ctx.log({"tilt/effective_sample_size": effective_sample_size(weights), "tilt/max": weights.max()})
        return weights[draw.sample]
