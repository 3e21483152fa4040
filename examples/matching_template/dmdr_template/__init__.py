"""A matching for DMDR: how the student's distribution is compared with the teacher's."""

from dataclasses import dataclass, field

import torch

from dmdr.matching import DMD, TimeWeight
from dmdr.paths import expand
from dmdr.protocols import Context, Denoiser, GuidedDenoiser
from dmdr.types import Direction, Draw

__all__ = ["UnitDMD"]


@dataclass(frozen=True)
class UnitDMD(DMD):
    """DMD with a direction of the same length for each sample, instead of DMD's own normaliser.

    A matching has four methods: anchor, renoise, fake_loss and direction. Those that are not written here are DMD's.
    The text under Attributes is what `dmdr-train --matching unit_dmd --help` says of the flags.

    Attributes:
        length: Root mean square of the direction, in latent units.
    """

    length: float = 1.0
    floor: float = field(default=1e-6, init=False)  # flags of DMD; with init=False they are none here
    time_weight: TimeWeight = field(default="none", init=False)

    @torch.no_grad()
    def direction(self, draw: Draw, teacher: GuidedDenoiser, fake: Denoiser, ctx: Context) -> Direction:
        """Where x0 shall move from, [B, *latent]; the parts add up to the total."""
        found = super().direction(draw, teacher, fake, ctx)
        size = found.total.square().flatten(1).mean(1).sqrt()  # [B]
        scale = expand(self.length / size.clamp_min(self.floor), found.total)
        return Direction(scale * found.total, {name: scale * part for name, part in found.parts.items()})
