"""Distribution matching distillation: renoising, the fake score's target, and the direction."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dmdr.paths import Prediction, add_noise, expand, guided
from dmdr.protocols import Context, Denoiser, GuidanceRule, GuidedDenoiser
from dmdr.types import Direction, Draw, Renoised, Term

# Renoise times stay clear of both ends: towards t = 0 the direction is a difference of nearly equal numbers
# (DMD2 keeps to 2 % .. 98 % of the schedule for the same reason).
T_MIN, T_MAX = 0.02, 0.98


def renoised_at(t: Tensor, purpose: str, draw: Draw, ctx: Context) -> Renoised:
    """The student's answers `draw.x0` [B, *latent] at times t [B], with noise that is keyed by `purpose` and sample."""
    eps = ctx.random.normal(f"{purpose}/eps", draw.sample, tuple(draw.x0.shape[1:])).to(draw.x0.dtype)
    x_t = add_noise(ctx.backend.path, draw.x0, eps, t)
    return Renoised(x_t, t, draw.x0, eps, torch.ones(len(draw), device=draw.x0.device))


def renoised_to_grid(
    x: Tensor, purpose: str, draw: Draw, ctx: Context, rows: Tensor | None = None, start: Tensor | None = None
) -> Renoised:
    """Clean latents x [B, *latent] at the student's own times, one drawn for each.

    At the first time x_t is pure noise, even if the path still has signal there, because the student starts from noise.
    `eps` of the result is the noise that makes this x_t of x at the time t.

    Args:
        x: Clean latents, [B, *latent].
        purpose: Begins the names of the random numbers; two calls with the same one draw the same.
        rows: The rows of `draw` whose sample index keys the time and the noise, [B]; those of x by default.
        start: The noise that each x was made from, `rollout.x_t[0]`, [B, *latent], which is its state at the first
            time. Without it, as of images that the student has not made, that noise is drawn, too. A regression on
            images that do not belong to their noise would shrink a one-step student to their mean.
    """
    key = draw.sample if rows is None else draw.sample[rows]
    i = ctx.random.integers(f"{purpose}/index", key, ctx.sampler.num_inference_steps)
    noise = ctx.random.normal(f"{purpose}/eps", key, tuple(x.shape[1:])).to(x.dtype)
    t = ctx.sampler.t.to(x.device, non_blocking=True)[i]
    first = (i == 0).view(-1, *[1] * (x.ndim - 1))
    x_t = torch.where(first, noise if start is None else start, add_noise(ctx.backend.path, x, noise, t))
    eps = Prediction(x, "x0", x_t, t, ctx.backend.path).eps
    return Renoised(x_t, t, x, eps, torch.ones(len(x), device=x.device))


def denoising_error(prediction: Prediction, renoised: Renoised) -> Tensor:
    """Weighted denoising loss per sample, [B], in the network's own parameterisation."""
    error = (prediction.value - prediction.target(renoised.x0, renoised.eps)) ** 2
    return renoised.weight * error.flatten(1).mean(1)


def teach(teacher: GuidedDenoiser, renoised: Renoised | Draw, draw: Draw, ctx: Context) -> tuple[Tensor, Tensor]:
    """What the teacher answers at `renoised.x_t`, two tensors [B, *latent]: c, and ca, so that c - ca is guided.

    c is its conditional answer, and the guided one is what the family makes of it (`GuidanceRule`) at guidance w, drawn
    per sample from `ctx.guidance`. Where the rule is the usual u + w (c - u), ca = -(w - 1) (c - u). With `draw` itself
    in place of `renoised` all are at the student's own state. Two passes through a network.
    """
    x_t, t, cond = renoised.x_t, renoised.t, draw.cond
    c = teacher(x_t, t, cond, guidance=1.0, fake_mix=ctx.fake_mix)
    x0 = c.x0
    if ctx.guidance == (1.0, 1.0):
        return x0, torch.zeros_like(x0)
    rule = ctx.backend if isinstance(ctx.backend, GuidanceRule) else None
    other = teacher(x_t, t, cond, guidance=rule.other_guidance() if rule else 0.0, fake_mix=ctx.fake_mix)
    w = ctx.random.uniform("guidance", draw.sample, *ctx.guidance).to(c.value.device)
    return x0, x0 - (rule.guided if rule else guided)(c, other, w).x0


def normalised(anchor: Tensor, target: Tensor, dm: Tensor, ca: Tensor, floor: float) -> Direction:
    """dm + ca over mean|anchor - target| of each sample (DMD, eq. 8); all are [B, *latent].

    Args:
        target: What the guided teacher makes of the anchor.
        floor: Lower bound of the normaliser, in latent units.
    """
    distance = (anchor - target).abs().flatten(1).mean(1).clamp_min(floor)
    dm, ca = dm / expand(distance, dm), ca / expand(distance, ca)
    return Direction(dm + ca, {"dm": dm, "ca": ca})


@dataclass(frozen=True)
class DMD:
    """Reverse KL between student and teacher (Yin et al. 2023, arXiv 2311.18828, eq. 7; normaliser of eq. 8):

        direction = (x0_fake - x0_teacher) / mean|x0 - x0_teacher|        per sample, at a renoised x_t

    The teacher is guided, x0_teacher = u + w (c - u). The direction is the sum of `dm` = x0_fake - c and
    `ca` = -(w - 1) (c - u), both over the same normaliser (Decoupled DMD, arXiv 2511.22677).

    Attributes:
        floor: Lower bound of the normaliser, in latent units.
    """

    parts: ClassVar[tuple[str, ...]] = ("dm", "ca")
    floor: float = 1e-6

    def anchor(self, prediction: Prediction, draw: Draw, ctx: Context) -> Tensor:
        """What the direction acts on: the student's clean sample, [B, *latent]."""
        return prediction.x0

    def renoise(self, draw: Draw, ctx: Context) -> tuple[Renoised, ...]:
        """The student's answers at times t ~ Beta(ctx.renoise); the fake score learns exactly where it is asked."""
        t = ctx.random.beta("renoise/t", draw.sample, *ctx.renoise).clamp(T_MIN, T_MAX)
        return (renoised_at(t, "renoise", draw, ctx),)

    def fake_loss(self, draw: Draw, fake: Denoiser, ctx: Context) -> Term:
        """Denoising loss on the student's answers, per sample, in the network's own parameterisation."""
        errors = [denoising_error(fake(r.x_t, r.t, draw.cond), r) for r in self.renoise(draw, ctx)]
        return Term(torch.stack(errors).sum(0))

    @torch.no_grad()
    def direction(self, draw: Draw, teacher: GuidedDenoiser, fake: Denoiser, ctx: Context) -> Direction:
        """Where matching wants x0 to move from, [B, *latent]; no gradient reaches teacher or fake score."""
        (renoised,) = self.renoise(draw, ctx)
        c, ca = teach(teacher, renoised, draw, ctx)
        dm = fake(renoised.x_t, renoised.t, draw.cond).x0 - c
        return normalised(draw.x0, c - ca, dm, ca, self.floor)
