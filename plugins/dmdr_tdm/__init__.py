"""TDM: every student step is matched at the times of its own segment of the student's trajectory.

Trajectory Distribution Matching (Luo et al. 2025, arXiv 2503.06674), as its published code (Luo-Yihong/TDM) has it,
stated for any noise path. Left out: the pseudo-Huber metric, which changes the size of the direction, and students of
several numbers of steps at once. Times are drawn per sample by the law of the run, uniform as published from the end of
DynaRS on.
"""

from dataclasses import dataclass

import torch

from dmdr.matching import DMD, level, renoise_times, state_after
from dmdr.paths import add_noise_from, expand
from dmdr.protocols import Context, Denoiser
from dmdr.types import Draw, Renoised, Term

MAX_SNR = 5.0  # of the fake loss, as published (min-SNR, Hang et al. 2023, arXiv 2303.09556)


@dataclass(frozen=True)
class TDM(DMD):
    """DMD's direction at an x_t that goes on from the state x_s after the student's step (eq. 5 and 6):

        x_t = a x_s + sigma_ts z    with a = alpha_t / alpha_s, sigma_ts^2 = sigma_t^2 - a^2 sigma_s^2, t in (s, t_i]

    The student steps from t_i to s. Segments do not overlap: at each time, the fake score sees what one step makes. It
    shows where the state of a deterministic step went, and with --eta 0, as published, the noise in x_s is the
    student's own. The direction moves the student's x0, since x_s is made of it.
    """

    def renoise(self, draw: Draw, ctx: Context) -> tuple[Renoised, ...]:
        """x_s at times of the step's segment, and the pair that the fake score regresses on: the student's x0 and

            eps = (x_t - alpha_t x0) / sigma_t,

        the mixture of the student's noise and z. Where the student's is no unit Gaussian, eps is none either: the
        weight has the ratio of the densities that z and eps give x_t (eq. 7), to the power of one over the number of
        elements, as in the published code.
        """
        path, s, x_s = ctx.backend.path, level(draw), state_after(draw, ctx)
        first = torch.where(draw.index == 0, 1.0, draw.t)  # which is pure noise, whatever time the student is told
        t = torch.maximum(renoise_times("renoise/t", draw, ctx, low=s, high=first), s)
        z = ctx.random.normal("renoise/eps", draw.sample, tuple(x_s.shape[1:])).to(x_s.dtype)
        x_t, _ = add_noise_from(path, x_s, s, z, t)
        alpha, sigma = path.alpha(t), path.sigma(t)
        eps = (x_t - expand(alpha, x_t) * draw.x0) / expand(sigma, x_t)
        importance = (0.5 * (z**2 - eps**2).flatten(1).mean(1)).exp()
        weight = ((alpha / sigma) ** 2).clamp(max=MAX_SNR) * importance
        return (Renoised(x_t, t, draw.x0, eps, weight.float()),)

    def fake_loss(self, draw: Draw, fake: Denoiser, ctx: Context) -> Term:
        """Squared error of the fake score's x0, weighted by min(SNR, 5) and the ratio of densities, per sample."""
        (renoised,) = self.renoise(draw, ctx)
        error = (fake(renoised.x_t, renoised.t, draw.cond).x0 - renoised.x0) ** 2
        return Term(renoised.weight * error.flatten(1).mean(1))
