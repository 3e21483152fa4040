"""DiffusionNFT: reinforcement learning on the forward process, without likelihoods and without a reward's gradient.

Zheng et al. 2025 (arXiv 2509.16117), adapted to a few-step student.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmdr.ema import EMA
from dmdr.errors import ConfigError
from dmdr.groups import ADVANTAGE_LIMIT, advantages
from dmdr.matching import renoised_to_grid
from dmdr.protocols import Context, Needs
from dmdr.states import load_strict
from dmdr.types import Draw, Term

FLOOR = 1e-5  # of the normaliser, in latent units


@dataclass
class DiffusionNFT:
    """Positive and negative policies, mixed of the student and an old policy, denoise the student's own images:

        L = (r L+ + (1 - r) L-) / beta + kl_beta mean (x_theta - x_ref)^2,    r = clip(A / 5, -1, 1) / 2 + 1/2
        L+- = mean (x+- - x)^2 / sg(mean |x+- - x|)
        x+ = beta x_theta + (1 - beta) x_old,    x- = (1 + beta) x_old - beta x_theta

    with x a finished image, A its advantage within its group (`dmdr.groups.advantages`), and x_theta, x_old, x_ref what
    student, old policy and stage-1 student make of x, noised to one of the student's own times. Where x_theta = x_old
    the gradient is A / 5 times that of the normalised denoising error: good images are learnt and bad ones unlearnt
    alike.

    Errors are means over the latent: the strength beside matching depends little on its size.

    Source: arXiv 2509.16117, Algorithm 1, and its implementation, whose constant factor 5 is left to rl_weight.
    Adapted: predictions are clean images, which at a given x_t are affine in the velocity, so that the mixtures are the
    same; times are those of the student's steps; images are of the student itself, not of the old policy.
    The authors advise against it for step-distilled models, which it blurs: it is meant to go with a matching loss. A
    student of one step is refused: its images are its own answers to their noise, so that there is no error to learn
    from.

    Attributes:
        beta: How far the two policies lie from the old one; published: 1, or 0.1 with several rewards.
        kl_beta: Weight of the distance to the stage-1 student; 0 needs no reference. Published: 1e-4 for velocities,
            beside the factor 5, which is 2e-5 / t^2 here.
        old_decay: Greatest decay of the old policy, an average of the student's parameters that moves once per step.
            At 0 the old policy is the student itself, without its gradient, which saves a copy and a pass.
        old_decay_ramp: The decay is this times the step until then.
    """

    beta: float = 1.0
    kl_beta: float = 0.0
    old_decay: float = 0.5
    old_decay_ramp: float = 0.001
    _old: EMA | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"nft: beta must be above 0, not {self.beta}")
        if not 0 <= self.kl_beta < math.inf:
            raise ConfigError(f"nft: kl_beta must be at least 0, not {self.kl_beta}")
        if not 0 <= self.old_decay < 1:
            raise ConfigError(f"nft: old_decay must be in [0, 1), not {self.old_decay}")
        if not 0 < self.old_decay_ramp < math.inf:
            raise ConfigError(f"nft: old_decay_ramp must be above 0, not {self.old_decay_ramp}")

    @property
    def needs(self) -> Needs:
        return Needs(group_size=2, student_steps=2, roles=("reference",) if self.kl_beta else ())

    def setup(self, ctx: Context) -> None:
        if self.old_decay:
            self._old = EMA(ctx.backend.parameters("student"), 0.0)

    def after_update(self, ctx: Context) -> None:
        if self._old:
            self._old.decay = min(self.old_decay_ramp * ctx.step, self.old_decay)
            self._old.update()

    def state_dict(self) -> dict[str, Tensor]:
        """The old policy; empty where it is the student itself."""
        return dict(self._old.average) if self._old else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self._old and state:
            load_strict(self._old.average, state, "nft: the old policy of the checkpoint")

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        scores, group = ctx.global_scores()
        advantage, valid = advantages(scores, ctx.rewards.weights, group)
        valid = valid[draw.sample]
        r = optimality(advantage[draw.sample]).to(draw.x0.dtype)
        x = draw.rollout.final
        at = renoised_to_grid(x, "nft", draw, ctx, start=draw.rollout.x_t[0])
        before = self.old(at.x_t, at.t, draw, ctx)  # first: it may write to the parameters of the student's graph
        student = ctx.backend.student(at.x_t, at.t, draw.cond).x0
        old = student.detach() if before is None else before
        positive, negative = mixtures(student, old, self.beta)
        loss = (r * normalised_error(positive, x) + (1 - r) * normalised_error(negative, x)) / self.beta
        metrics = {"optimality": r, "error": mean((student - x) ** 2), "moved": mean((student - old).abs())}
        if self.kl_beta:
            with torch.no_grad():
                reference = ctx.backend.reference(at.x_t, at.t, draw.cond).x0
            kl = mean((student - reference) ** 2)
            loss, metrics = loss + self.kl_beta * kl, metrics | {"kl": kl}
        return Term(loss, valid, metrics=metrics)

    @torch.no_grad()
    def old(self, x_t: Tensor, t: Tensor, draw: Draw, ctx: Context) -> Tensor | None:
        """The old policy's answer, [B, *latent]; None where it is the student's."""
        if self._old is None:
            return None
        with self._old.applied():
            return ctx.backend.student(x_t, t, draw.cond).x0


def optimality(advantage: Tensor) -> Tensor:
    """r, the probability in [0, 1] that a sample is optimal: 1/2 for one that is as good as its group."""
    return (advantage / ADVANTAGE_LIMIT).clamp(-1, 1) / 2 + 0.5


def mixtures(student: Tensor, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Positive and negative policy; both are the old one where the student is."""
    return beta * student + (1 - beta) * old, (1 + beta) * old - beta * student


def normalised_error(answer: Tensor, x: Tensor) -> Tensor:
    """Squared error over absolute error, whose size alone therefore does not depend on the time, [B]."""
    error = answer - x
    return mean(error**2) / mean(error.abs()).detach().clamp_min(FLOOR)


def mean(values: Tensor) -> Tensor:
    """Over the elements of each sample, [B]."""
    return values.flatten(1).mean(1)
