"""Decoupled DMD (Liu et al. 2025, arXiv 2511.22677): guidance and distribution matching at renoise times of their own.

In the paper t = 0 is noise and t = 1 is data, the reverse of ours: its constraint tau_CA > t is a renoise time *below*
the student's here. What x_t shows at noisier levels is settled; guidance there would only exaggerate it (section 4.1).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from dmdr.matching import DMD, renoise_times, renoised_at, teach
from dmdr.protocols import Context, Denoiser, GuidedDenoiser
from dmdr.sampling import shift_times, unshift_times
from dmdr.times import T_MAX, T_MIN
from dmdr.types import Direction, Draw, Renoised


@dataclass(frozen=True)
class Decoupled(DMD):
    """DMD's direction from two renoised states (eq. 8), with x0_teacher = c(tau_dm) + (w - 1) (c - u)(tau_ca):

        direction = (x0_fake(tau_dm) - x0_teacher) / mean|x0 - x0_teacher|        per sample

    tau_dm is DMD's time, shifted as the grid is, where the fake score learns, too; tau_ca is drawn below the student's
    time. Four network calls instead of three; without guidance two, as DMD at shifted times. The one normaliser keeps
    the ratio of eq. 8 between the parts, is DMD's own where the times agree, and bounds the direction as there: with
    one of tau_ca alone, which may be close to data where the distance is small, a `dm` from close to noise would be
    without bound.

    Attributes:
        floor: Lower bound of the normaliser, in latent units.
        ca_time: Renoise time of the guidance: "cleaner" than the student's time, over all that is left to settle (the
            first step: everything), or "shared" with distribution matching, which is DMD at shifted times.
    """

    ca_time: Literal["cleaner", "shared"] = "cleaner"

    def renoise(self, draw: Draw, ctx: Context) -> tuple[Renoised, ...]:
        """DMD's times, shifted as the grid's are (the authors in Tongyi-MAI/Z-Image, issue 78: both are)."""
        return (renoised_at(renoise_times("renoise/t", draw, ctx, shifted=True), "renoise", draw, ctx),)

    def renoise_ca(self, draw: Draw, ctx: Context) -> Renoised:
        """The student's answers at cleaner times than its input: uniform before the timestep shift, as the grid's are.

        The first input is pure noise, whatever time the student is told: all times are cleaner. DynaRS moves tau_dm
        only, as vvvvvjdy/dmdr, issue 4, has it.
        """
        shift = ctx.backend.shift
        share = ctx.random.uniform("renoise/ca/t", draw.sample)
        level = torch.where(draw.index == 0, 1.0, draw.t)
        t = shift_times(share * unshift_times(level, shift), shift).clamp(T_MIN, T_MAX)
        return renoised_at(t, "renoise/ca", draw, ctx)

    @torch.no_grad()
    def direction(self, draw: Draw, teacher: GuidedDenoiser, fake: Denoiser, ctx: Context) -> Direction:
        """Where matching wants x0 to move from, [B, *latent]; no gradient reaches teacher or fake score."""
        if self.ca_time == "shared" or ctx.guidance == (1.0, 1.0):
            return super().direction(draw, teacher, fake, ctx)
        (at_dm,) = self.renoise(draw, ctx)
        c = teacher(at_dm.x_t, at_dm.t, draw.cond, guidance=1.0, fake_mix=ctx.fake_mix).x0
        dm = fake(at_dm.x_t, at_dm.t, draw.cond).x0 - c
        at_ca = self.renoise_ca(draw, ctx)
        _, ca = teach(teacher, at_ca, draw, ctx)
        return self.scaled(draw.x0, c - ca, dm, ca, at_dm.t, draw, ctx, at_ca.t)
