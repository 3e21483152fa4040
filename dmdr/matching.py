"""Distribution matching distillation: renoising, the fake score's target, and the direction."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.paths import NoisePath, Prediction, add_noise, expand, guided
from dmdr.protocols import Context, Denoiser, GuidanceRule, GuidedDenoiser
from dmdr.sampling import shift_times, unshift_times
from dmdr.times import T_MAX, T_MIN
from dmdr.types import Direction, Draw, Renoised, Term

TimeWeight = Literal["none", "alpha", "sigma", "sigma3"]
UNNORMALISED = ("sigma", "sigma3")
FLOOR = 1e-6  # of normalisers, in latent units


def renoise_times(
    purpose: str,
    draw: Draw,
    ctx: Context,
    *,
    low: Tensor | float = 0.0,
    high: Tensor | float = 1.0,
    shifted: bool = False,
    keys: Tensor | None = None,
) -> Tensor:
    """Times to noise the student's answers to, by the law of the run (--renoise_times), [B] float64.

    They are low + (high - low) u, with u of the law, in times before the shift where the law or the caller shifts them;
    and they stay within [T_MIN, T_MAX].

    Args:
        purpose: Names the random numbers; two calls with the same one draw the same.
        low, high: The interval that they lie in, a number or [B] of them; all times by default.
        shifted: Shift them as the model's grid is, whatever the law.
        keys: What each time belongs to, [B] int64; the sample by default.
    """
    share = ctx.renoise.shares(ctx.random, purpose, draw.sample if keys is None else keys)
    if not (shifted or ctx.renoise.shifted):
        return (low + (high - low) * share).clamp(T_MIN, T_MAX)
    shift = ctx.backend.shift
    low, high = (unshift_times(torch.as_tensor(end, dtype=torch.float64), shift) for end in (low, high))
    return shift_times(low + (high - low) * share, shift).clamp(T_MIN, T_MAX)


def level(draw: Draw) -> Tensor:
    """Time s at which each sample's drawn step ends, [B] float64; 0 for the last step."""
    return draw.rollout.t.to(draw.index.device, non_blocking=True)[draw.index + 1]


def state_after(draw: Draw, ctx: Context) -> Tensor:
    """x_s, the state after the drawn step as the student takes it now, with the noise of the rollout, [B, *latent]."""
    if not draw.iteration:
        return draw.x_next

    def mean(x0: Tensor) -> Tensor:
        return ctx.sampler.moments(draw.index, Prediction(x0, "x0", draw.x_t, draw.t, ctx.backend.path))[0]

    then = draw.rollout.pick(draw.index).x0
    return draw.x_next - mean(then) + mean(draw.x0)


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

    At times outside of `ctx.guidance_interval` ca is exactly 0 (Kynkäänniemi et al. 2024, arXiv 2404.07724). That saves
    no pass: which samples are outside is not known to the host, nor the same in all processes.
    """
    x_t, t, cond = renoised.x_t, renoised.t, draw.cond
    c = teacher(x_t, t, cond, guidance=1.0, fake_mix=ctx.fake_mix)
    x0 = c.x0
    if ctx.guidance == (1.0, 1.0):
        return x0, torch.zeros_like(x0)
    rule = ctx.backend if isinstance(ctx.backend, GuidanceRule) else None
    other = teacher(x_t, t, cond, guidance=rule.other_guidance() if rule else 0.0, fake_mix=ctx.fake_mix)
    w = ctx.random.uniform("guidance", draw.sample, *ctx.guidance).to(c.value.device)
    ca = x0 - (rule.guided if rule else guided)(c, other, w).x0
    low, high = ctx.guidance_interval
    return x0, torch.where(expand((t >= low) & (t <= high), ca).bool(), ca, 0.0)


def weight_at(t: Tensor, name: TimeWeight, path: NoisePath) -> Tensor:
    """What `DMD.time_weight` multiplies a difference of x0 with at times t [B], [B].

    A difference of scores is alpha_t / sigma_t^2 times one of x0, and eq. 7 of DMD weighs it by w_t alpha_t.
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    return {"none": torch.ones_like(alpha), "alpha": alpha, "sigma": alpha / sigma, "sigma3": alpha * sigma}[name]


@dataclass(frozen=True)
class DMD:
    """Reverse KL between student and teacher (Yin et al. 2023, arXiv 2311.18828, eq. 7; normaliser of eq. 8):

        direction = (x0_fake - x0_teacher) / mean|x0 - x0_teacher|        per sample, at a renoised x_t

    The teacher is guided, x0_teacher = u + w (c - u). The direction is the sum of `dm` = x0_fake - c and
    `ca` = -(w - 1) (c - u), both over the same normaliser (Decoupled DMD, arXiv 2511.22677).

    Attributes:
        floor: Lower bound of the normaliser, in latent units.
        time_weight: Weight of the direction by its renoise time: "none" as in DMD's code; "alpha" is eq. 7 and 8 as
            they are printed, alpha_t times that. "sigma" and "sigma3" have w_t = sigma_t / alpha_t and
            sigma_t^3 / alpha_t in eq. 7 in place of eq. 8, which DMD's ablation compares it with: alpha_t / sigma_t and
            alpha_t sigma_t times the difference, without a normaliser.

    Raises:
        ConfigError: A `floor` beside a `time_weight` without a normaliser.
    """

    parts: ClassVar[tuple[str, ...]] = ("dm", "ca")
    floor: float = FLOOR
    time_weight: TimeWeight = "none"

    def __post_init__(self) -> None:
        if self.time_weight in UNNORMALISED and self.floor != FLOOR:
            raise ConfigError(f"--floor is not read with --time_weight {self.time_weight}; leave it out")

    def anchor(self, prediction: Prediction, draw: Draw, ctx: Context) -> Tensor:
        """What the direction acts on: the student's clean sample, [B, *latent]."""
        return prediction.x0

    def renoise(self, draw: Draw, ctx: Context) -> tuple[Renoised, ...]:
        """The student's answers at times of the run's law; the fake score learns exactly where it is asked."""
        return (renoised_at(renoise_times("renoise/t", draw, ctx), "renoise", draw, ctx),)

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
        return self.scaled(draw.x0, c - ca, dm, ca, renoised.t, draw, ctx)

    def distance(self, anchor: Tensor, target: Tensor, draw: Draw) -> Tensor:
        """What a direction is divided by (eq. 8), [B]: mean|anchor - target| of each sample, at least `floor`."""
        return (anchor - target).abs().flatten(1).mean(1).clamp_min(self.floor)

    def scaled(
        self,
        anchor: Tensor,
        target: Tensor,
        dm: Tensor,
        ca: Tensor,
        t: Tensor,
        draw: Draw,
        ctx: Context,
        t_ca: Tensor | None = None,
    ) -> Direction:
        """dm + ca in the size that the student's loss has them in.

        Args:
            anchor: What moves, [B, *latent].
            target: What the guided teacher makes of the anchor.
            dm, ca: The two parts, before they are normalised.
            t: Times of `dm`, [B].
            t_ca: Times of `ca`; t by default.
        """
        if self.time_weight not in UNNORMALISED:
            distance = self.distance(anchor, target, draw)
            dm, ca = dm / expand(distance, dm), ca / expand(distance, ca)
        if self.time_weight != "none":
            path = ctx.backend.path
            dm = expand(weight_at(t, self.time_weight, path), dm) * dm
            ca = expand(weight_at(t if t_ca is None else t_ca, self.time_weight, path), ca) * ca
        return Direction(dm + ca, {"dm": dm, "ca": ca})
