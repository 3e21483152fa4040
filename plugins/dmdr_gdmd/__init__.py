"""GDMD: the reward judges where distribution matching wants a sample to go, and weighs the update by that.

After *Guiding Distribution Matching Distillation with Gradient-Based Reinforcement Learning* (Dong et al. 2026, arXiv
2604.19009): the direction of DMD is read as an image that it points to, which ordinary rewards can score, and the
scores are an adaptive weight of the update. Only the abstract and summaries by others were available: the form of the
weight was chosen for this implementation. The paper seems to compare several directions for one image; here images are
compared with each other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr.groups import advantages
from dmdr.protocols import Context, Needs, require
from dmdr.types import Direction, Draw


@dataclass
class GDMD:
    """Weight of each sample's direction g, brought to mean one over the global batch:

        w = 1 + clip(A / limit, -1, 1),    A the advantage of the reward r of x0 - g

    A is in standard deviations (`dmdr.groups.advantages`), within the images of a prompt, or of the global batch where
    each prompt has one. A sample without a score, or without another to be compared with, has A = 0. Unlike RT-DM it
    asks for the image that matching aims at, not for the finished one; that takes one pass through the decoder and the
    rewards, without a gradient.

    It is meant for matchings whose direction moves x0: AC-DMD's moves a state that is still noisy.

    Attributes:
        limit: Standard deviations at which the weight is 0 or 2.
        gain: Judge what the update gains, r(x0 - g) - r(x0), instead of where it leads to; twice the cost.
    """

    limit: float = 2.0
    gain: bool = False

    def __post_init__(self) -> None:
        require(self, "limit", self.limit > 0, "above 0")

    @property
    def needs(self) -> Needs:
        return Needs(batch_size=2, finished=False)

    def __call__(self, draw: Draw, direction: Direction, ctx: Context) -> Tensor:
        scores = ctx.score(draw.x0 - direction.total, draw)
        if self.gain:
            before = ctx.score(draw.x0, draw)
            scores = {name: found - before[name] for name, found in scores.items()}
        everyone = {name: ctx.gather(found).cpu() for name, found in scores.items()}
        group = ctx.gather(draw.group).cpu()
        if len(group.unique()) == len(group):
            group = torch.zeros_like(group)
        advantage, _ = advantages(everyone, ctx.rewards.weights, group)
        weights = 1 + (advantage / self.limit).clamp(-1, 1)
        return (weights / weights.mean()).float().to(draw.sample.device, non_blocking=True)[draw.sample]
