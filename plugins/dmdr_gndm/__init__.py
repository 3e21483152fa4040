"""GNDM: distribution matching with the normaliser of a group instead of one for each sample.

After the abstract of *R_dm: Re-conceptualizing Distribution Matching as a Reward for Diffusion Distillation* (Fan et
al. 2026, arXiv 2603.28460), which normalises the direction by group-mean statistics, as RL does with rewards. The full
text was not available, nor is there published code: what is averaged here, and that a group shares its time, was chosen
for this implementation. The paper's sum with rewards and its importance sampling are left out.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dmdr.matching import DMD, renoise_times, renoised_at
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Renoised


@dataclass(frozen=True)
class GNDM(DMD):
    """DMD with d its mean|x0 - x0_teacher| and the mean of d over the images of a prompt (--num_generations):

        direction = (x0_fake - x0_teacher) / mean_group(d)        per sample, at a renoised x_t

    Within a group, samples that are far from the teacher move further than those near it; in DMD all move alike. The
    images of a group are renoised to one time, since d depends on it.

    Attributes:
        floor: Lower bound of the normaliser, in latent units.
        time_weight: Weight of the direction by its renoise time: "none" as in DMD's code, or "alpha", alpha_t.
    """

    time_weight: Literal["none", "alpha"] = "none"
    needs: ClassVar[Needs] = Needs(reward=False, group_size=2, finished=False)

    def renoise(self, draw: Draw, ctx: Context) -> tuple[Renoised, ...]:
        """The student's answers at times of the run's law, one for each group."""
        t = renoise_times("renoise/t", draw, ctx, keys=draw.group)
        return (renoised_at(t, "renoise", draw, ctx),)

    def distance(self, anchor: Tensor, target: Tensor, draw: Draw) -> Tensor:
        """The mean over each sample's group of DMD's."""
        own = (anchor - target).abs().flatten(1).mean(1)
        together = draw.group[:, None] == draw.group  # [B, B]; a micro-batch holds whole groups
        return ((together * own).sum(1) / together.sum(1)).clamp_min(self.floor)
