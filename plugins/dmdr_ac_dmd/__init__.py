"""AC-DMD: every student step is matched where it ends, at its own noise level, instead of at a clean image.

The first stage of RTDMD (arXiv 2605.26108, code Harahan/RTDMD), stated for any noise path. The fake score is trained on
states that are still noisy, by ambient denoising (Daras et al. 2024, arXiv 2404.10177), and kept consistent along its
own trajectories (Daras et al. 2023, arXiv 2302.09057). Differences from the published code: times are drawn per sample
and never cross the level s, the direction's normaliser has a floor and no noise that is not the state's own, and
nothing that is not finite is replaced.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmdr.matching import DMD, denoising_error, level, renoise_times, state_after, teach
from dmdr.paths import Prediction, add_noise_from, expand
from dmdr.protocols import Context, Denoiser, GuidedDenoiser
from dmdr.times import T_MIN
from dmdr.types import Direction, Draw, Renoised, Term

MIN_GAP = 0.01  # least distance between s and a renoise time, and
MAX_WEIGHT = 10.0  # greatest 1 / sigma_ts^2 that the fake loss makes good for; both as published
STEP_MIN, STEP_MAX = 0.001, 0.2  # how far the consistency term goes back in time, as published


@dataclass(frozen=True)
class ACDMD(DMD):
    """With x_s the state after the student's step, and the moves to s those of the sampler:

        direction = (x_s(x0_fake) - x_s(x0_teacher)) / mean|x_s - x_s(x0_teacher)|        per sample, at a renoised x_t

    On the student's last step s = 0, and the direction is DMD's.

    Attributes:
        floor: Lower bound of the normaliser, in latent units.
        time_weight: Weight of the direction by its renoise time: "none" as in DMD's code, or "alpha", alpha_t.
        consistency: Weight of the fake score's consistency term, published as 0.01; costs two more passes of the fake
            score. 0 leaves it out.
    """

    time_weight: Literal["none", "alpha"] = "none"
    consistency: float = 0.01

    def anchor(self, prediction: Prediction, draw: Draw, ctx: Context) -> Tensor:
        """The mean of x_s, [B, *latent]: its noise is a constant, and only the gradient of an anchor counts."""
        return ctx.sampler.moments(draw.index, prediction)[0]

    def renoise(self, draw: Draw, ctx: Context) -> tuple[Renoised, ...]:
        """x_s at times t = s + (1 - s) u, with u of the run's law, and the pair that the fake score regresses on.

        With a = alpha_t / alpha_s and sigma_ts^2 = sigma_t^2 - a^2 sigma_s^2, x_t = a x_s + sigma_ts eps is what it
        would be had clean data been noised. The noise of x_s is not known, but the score is: E[eps | x_t] / sigma_ts
        equals E[the whole noise | x_t] / sigma_t. So the whole noise and the clean data may be replaced by

            eps* = (sigma_t / sigma_ts) eps,    x0* = (x_t - sigma_t eps*) / alpha_t
                                                    = x_s / alpha_s - (alpha_t sigma_s^2 / (alpha_s^2 sigma_ts)) eps

        whose posterior means are the true ones. At s = 0 they are x_s and eps. On rectified flow eps* - x0* is the
        published v* = -x_s / (1 - s) + eps (t + (1 - t) s^2 / (1 - s)^2) / sigma_ts. Both grow with 1 / sigma_ts
        towards s, where the weight min(1 / sigma_ts^2, 10) sigma_ts^2 fades the sample out.
        """
        path, s, x_s = ctx.backend.path, level(draw), state_after(draw, ctx)
        t = renoise_times("renoise/t", draw, ctx, low=s)
        t = torch.maximum(t, (s + MIN_GAP).clamp(max=1))  # above s even where s exceeds T_MAX
        eps = ctx.random.normal("renoise/eps", draw.sample, tuple(x_s.shape[1:])).to(x_s.dtype)
        x_t, variance = add_noise_from(path, x_s, s, eps, t)
        alpha_s, sigma_s, sigma_t, std = path.alpha(s), path.sigma(s), path.sigma(t), variance.sqrt()
        a = path.alpha(t) / alpha_s
        x0 = expand(1 / alpha_s, x_s) * x_s - expand(a * sigma_s**2 / (alpha_s * std), x_s) * eps
        weight = (MAX_WEIGHT * variance).clamp(max=1).float()
        return (Renoised(x_t, t, x0, expand(sigma_t / std, x_s) * eps, weight),)

    def fake_loss(self, draw: Draw, fake: Denoiser, ctx: Context) -> Term:
        """Denoising loss plus `consistency` times the squared gap of the fake score's own answers, per sample."""
        (renoised,) = self.renoise(draw, ctx)
        prediction = fake(renoised.x_t, renoised.t, draw.cond)
        error = denoising_error(prediction, renoised)
        if not self.consistency:
            return Term(error)
        gap = self.gap(prediction, draw, fake, ctx)
        # What is not finite stays so: the update is then skipped.
        return Term(error + self.consistency * gap, metrics={"consistency": gap.detach()})

    def gap(self, prediction: Prediction, draw: Draw, fake: Denoiser, ctx: Context) -> Tensor:
        """Unbiased estimate of mean (E[h(x', t')] - h(x_t, t))^2 per sample, [B]; it may be negative.

        h is the fake score's x0, and x' the sampler's move from x_t to t' < t with the fake score's own answer: along
        a diffusion process E[x0 | x_t] is a martingale. The product of two independent moves' gaps has no variance of
        h(x') in its mean, as the square of one would. t' stays where the fake score learns: not below s, nor T_MIN.
        """
        back = ctx.random.uniform("consistency/t", draw.sample, STEP_MIN, STEP_MAX)
        t = torch.maximum(prediction.t - back, level(draw).clamp_min(T_MIN))
        with torch.no_grad():  # the moves are given: only what is answered at their two ends is trained
            mean, std = ctx.sampler.transition(prediction, t)

        def gap(number: int) -> Tensor:
            z = ctx.random.normal(f"consistency/{number}", draw.sample, tuple(mean.shape[1:])).to(mean.dtype)
            return fake(mean + std * z, t, draw.cond).x0 - prediction.x0

        first = gap(0)
        second = gap(1) if ctx.sampler.eta else first  # an ODE's two moves are one
        return (first * second).flatten(1).mean(1)

    @torch.no_grad()
    def direction(self, draw: Draw, teacher: GuidedDenoiser, fake: Denoiser, ctx: Context) -> Direction:
        """Where matching wants x_s to move from, [B, *latent]; no gradient reaches teacher or fake score."""
        (renoised,) = self.renoise(draw, ctx)
        x_t, t, s = renoised.x_t, renoised.t, level(draw)

        def moved(x0: Tensor) -> Tensor:
            # The published moves end with noise, the same for teacher and fake score. It cancels in their difference,
            # and would only inflate the normaliser: the means do.
            return ctx.sampler.transition(Prediction(x0, "x0", x_t, t, ctx.backend.path), s)[0]

        c, ca = teach(teacher, renoised, draw, ctx)
        own, conditional, guided = moved(fake(x_t, t, draw.cond).x0), moved(c), moved(c - ca)
        return self.scaled(state_after(draw, ctx), guided, own - conditional, conditional - guided, t, draw, ctx)
