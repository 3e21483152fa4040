"""TDM-R1: a diffusion model of good images, learned from scores, is a reward that the student can follow.

Luo et al. 2026 (arXiv 2603.07700). The reward itself needs no gradient.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr.errors import ConfigError
from dmdr.groups import advantages
from dmdr.matching import denoising_error, renoise_times, renoised_at, teach
from dmdr.paths import Prediction, expand
from dmdr.protocols import AddsRoles, Backend, Context, GuidedDenoiser, Needs, OwnLearner
from dmdr.types import Condition, Draw, Renoised, Term

SURROGATE = "surrogate"
FLOOR = 1e-6  # of the direction's normaliser, in latent units, as DMD's


@dataclass
class TDMR1:
    """The surrogate, a LoRA on the frozen network, learns to denoise good images better than the teacher, and bad ones
    worse; the student's answers then move from what the teacher makes of them to what the surrogate makes of them:

        surrogate:  softplus(beta mean_group(A (e - e_R))) / beta + reference_weight (e - e_R)^2
        student:    d L / d x0 = (x0_R - x0_S) / mean|x0 - x0_S| / numel

    with e and e_R the denoising errors of surrogate and teacher for a finished image at one noise level, and A its
    advantage within its group (`dmdr.groups.advantages`). x0_S and x0_R are guided as in matching, at a noise level of
    the student's answer. With `rl_weight 1` this weighs as much as DMD's direction, whose normaliser is alike.

    A sample is left out of the preference once (e - e_R)^2 is above `limit`, and e lies on the side of e_R that its
    advantage asks for.

    Source: arXiv 2603.07700, by what is public of it, Flow-Factory's implementation (X-GenGroup, `tdm_r1.py`): the
    losses, the limit and the defaults; the paper's text was not at hand.
    Adapted: it goes with any matching, where the published one is TDM, on deterministic trajectories whose every state
    shares the final score. Here the sampler may draw noise: the surrogate learns finished images alone, and the student
    follows it at each of its steps. Left out: the term for the teacher's guidance, which is a matching's `ca`; and the
    slow copy of the surrogate that bounds its steps, without which the digits end at the same figures.

    Attributes:
        beta: Sharpness of the preference; 10 in the recipe of SD3.5.
        reference_weight: Weight of the squared distance to the teacher's error.
        limit: Square of e - e_R, above which a sample is left out of the preference.
        surrogate_learning_rate: Learning rate of the surrogate.
        surrogate_rank: Rank of the surrogate's LoRA.
        surrogate_alpha: Alpha of the surrogate's LoRA; its strength is alpha / rank.
    """

    beta: float = 10.0
    reference_weight: float = 1e-3
    limit: float = 0.05
    surrogate_learning_rate: float = 3e-4
    surrogate_rank: int = 32
    surrogate_alpha: float = 64.0

    def __post_init__(self) -> None:
        for name in ("beta", "limit", "surrogate_learning_rate", "surrogate_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"tdm_r1: {name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.reference_weight < math.inf:
            raise ConfigError(f"tdm_r1: reference_weight must be at least 0, not {self.reference_weight}")
        if self.surrogate_rank < 1:
            raise ConfigError(f"tdm_r1: surrogate_rank must be at least 1, not {self.surrogate_rank}")

    @property
    def needs(self) -> Needs:
        return Needs(group_size=2, times=True, guided=True)

    def learners(self, backend: Backend, device: torch.device) -> Sequence[OwnLearner]:
        if not isinstance(backend, AddsRoles):
            raise ConfigError(f"--rl tdm_r1: {type(backend).__name__} cannot train a further role, the surrogate")
        parameters = backend.add_role(SURROGATE, rank=self.surrogate_rank, alpha=self.surrogate_alpha)
        return [OwnLearner(SURROGATE, parameters, self.surrogate_learning_rate)]

    def __call__(self, draw: Draw, ctx: Context) -> Iterator[Term]:
        yield self.of_surrogate(draw, ctx)
        yield self.of_student(draw, ctx)

    def of_surrogate(self, draw: Draw, ctx: Context) -> Term:
        """The loss of the surrogate on finished images."""
        scores, group = ctx.global_scores()
        advantage, valid = (found[draw.sample] for found in advantages(scores, ctx.rewards.weights, group))
        at = noised("tdm_r1/image", replace(draw, x0=draw.rollout.final), ctx)
        error = denoising_error(surrogate(ctx)(at.x_t, at.t, draw.cond), at)
        reference = denoising_error(ctx.backend.teacher(at.x_t, at.t, draw.cond), at)
        advantage = advantage.to(error.dtype)
        gap = error - reference
        stops = (advantage * gap.detach() < 0) & (gap.detach() ** 2 > self.limit)
        loss = preference(torch.where(stops, gap.detach(), gap), advantage, draw.group, valid, self.beta)
        metrics = {"gap": gap, "preferred": -(advantage * gap), "stopped": stops.float()}
        return Term(loss + self.reference_weight * gap**2, valid, metrics=metrics, trains=SURROGATE)

    @torch.no_grad()
    def of_student(self, draw: Draw, ctx: Context) -> Term:
        """The gradient at the student's answers."""
        at = noised("tdm_r1/answer", draw, ctx)
        found = []
        for network in (ctx.backend.teacher, surrogate(ctx)):
            c, ca = teach(network, at, draw, ctx)
            found.append(c - ca)
        grad = towards(draw.x0, *found)
        size = grad.flatten(1)
        return Term(0.5 * (size**2).mean(1), grad=grad / size.shape[1])


def surrogate(ctx: Context) -> GuidedDenoiser:
    """The surrogate, asked as the teacher is; nothing is mixed into it."""
    backend = ctx.backend
    assert isinstance(backend, AddsRoles)

    def answer(x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float = 1.0, fake_mix: float = 0.0) -> Prediction:
        return backend.ask_role(x_t, t, cond, role=SURROGATE, guidance=guidance)

    return answer


def noised(purpose: str, draw: Draw, ctx: Context) -> Renoised:
    """`draw.x0` at times of the run's law (`--renoise_times`)."""
    return renoised_at(renoise_times(f"{purpose}/t", draw, ctx), purpose, draw, ctx)


def preference(gap: Tensor, advantage: Tensor, group: Tensor, valid: Tensor, beta: float) -> Tensor:
    """softplus(beta mean(A gap)) / beta of each sample's group, [B]; the mean is over its valid samples.

    Args:
        gap: e - e_R, [B].
        advantage: A, [B].
        group: Of each sample, [B]; whole groups.
        valid: Samples that count, [B] bool.
    """
    same = (group[:, None] == group) & valid
    mean = (same * torch.where(valid, advantage * gap, 0.0)).sum(1) / same.sum(1).clamp_min(1)
    return F.softplus(beta * mean) / beta


def towards(x0: Tensor, teacher: Tensor, surrogate: Tensor) -> Tensor:
    """(x0_R - x0_S) / mean|x0 - x0_S| of each sample, [B, *latent]."""
    distance = (x0 - surrogate).abs().flatten(1).mean(1).clamp_min(FLOOR)
    return (teacher - surrogate) / expand(distance, teacher)
