"""Distribution matching distillation: renoising, the fake score's target, and the direction."""

from dataclasses import dataclass

import torch

from dmdr.paths import Prediction, add_noise, expand
from dmdr.protocols import Context, Denoiser, GuidedDenoiser
from dmdr.types import Direction, Draw, Renoised, Term

# Renoise times stay clear of both ends: towards t = 0 the direction is a difference of nearly equal numbers
# (DMD2 keeps to 2 % .. 98 % of the schedule for the same reason).
T_MIN, T_MAX = 0.02, 0.98


@dataclass(frozen=True)
class DMD:
    """Reverse KL between student and teacher (Yin et al. 2023, arXiv 2311.18828, eq. 7; normaliser of eq. 8):

        direction = (x0_fake - x0_teacher) / mean|x0 - x0_teacher|        per sample, at a renoised x_t

    The teacher is guided, x0_teacher = u + w (c - u). The direction is the sum of `dm` = x0_fake - c and
    `ca` = -(w - 1) (c - u), both over the same normaliser (Decoupled DMD, arXiv 2511.22677).

    Attributes:
        floor: Lower bound of the normaliser, in latent units.
    """

    floor: float = 1e-6

    def anchor(self, prediction: Prediction, draw: Draw, ctx: Context) -> torch.Tensor:
        """What the direction acts on: the student's clean sample, [B, *latent]."""
        return prediction.x0

    def renoise(self, draw: Draw, ctx: Context) -> tuple[Renoised, ...]:
        """The student's answers at times t ~ Beta(ctx.renoise); the fake score learns exactly where it is asked."""
        again = f"/{draw.iteration}" if draw.iteration else ""
        t = ctx.random.beta(f"renoise/t{again}", draw.sample, *ctx.renoise).clamp(T_MIN, T_MAX)
        eps = ctx.random.normal(f"renoise/eps{again}", draw.sample, tuple(draw.x0.shape[1:])).to(draw.x0.dtype)
        x_t = add_noise(ctx.backend.path, draw.x0, eps, t)
        return (Renoised(x_t, t, draw.x0, eps, torch.ones(len(draw), device=draw.x0.device)),)

    def fake_loss(self, draw: Draw, fake: Denoiser, ctx: Context) -> Term:
        """Denoising loss on the student's answers, per sample, in the network's own parameterisation."""
        losses = []
        for renoised in self.renoise(draw, ctx):
            prediction = fake(renoised.x_t, renoised.t, draw.cond)
            error = (prediction.value - prediction.target(renoised.x0, renoised.eps)) ** 2
            losses.append(renoised.weight * error.flatten(1).mean(1))
        return Term(torch.stack(losses).sum(0))

    @torch.no_grad()
    def direction(self, draw: Draw, teacher: GuidedDenoiser, fake: Denoiser, ctx: Context) -> Direction:
        """Where matching wants x0 to move from, [B, *latent]; no gradient reaches teacher or fake score."""
        (renoised,) = self.renoise(draw, ctx)
        x_t, t, cond = renoised.x_t, renoised.t, draw.cond
        c = teacher(x_t, t, cond, guidance=1.0, fake_mix=ctx.fake_mix).x0
        dm = fake(x_t, t, cond).x0 - c
        if ctx.guidance == (1.0, 1.0):
            ca = torch.zeros_like(dm)
        else:
            u = teacher(x_t, t, cond, guidance=0.0, fake_mix=ctx.fake_mix).x0
            w = expand(ctx.random.uniform("guidance", draw.sample, *ctx.guidance), dm).to(dm.dtype)
            ca = -(w - 1) * (c - u)
        distance = (draw.x0 - (c - ca)).abs().flatten(1).mean(1).clamp_min(self.floor)
        dm, ca = dm / expand(distance, dm), ca / expand(distance, ca)
        return Direction(dm + ca, {"dm": dm, "ca": ca})
