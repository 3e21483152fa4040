"""DPO: preferences between images of a prompt, for rewards that need no gradient, or for none at all.

Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) compares denoising errors. PSO (arXiv 2410.03190) compares what a
few-step student really does: the transitions of its own sampler.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dmdr.errors import ConfigError
from dmdr.images import check_headers
from dmdr.matching import renoised_to_grid
from dmdr.paths import Prediction
from dmdr.protocols import Context, Needs
from dmdr.types import Condition, Draw, Rollout, Term
from dmdr_dpo.pairs import Pair, best_and_worst, latents_of, read_pairs

logger = logging.getLogger("dmdr")


@dataclass
class DPO:
    """Direct preference optimisation of winner w over loser l (Rafailov et al. 2023, arXiv 2305.18290, eq. 7):

        L = -log sigmoid(beta z),    z = [log p(w) - log p_ref(w)] - [log p(l) - log p_ref(l)]

    with p of the student, p_ref of the student as stage 1 left it, and by form

        transition    log p(x) = sum_i log N(x_{i + 1}; mu(x_i), std_i^2)       over the stochastic steps that made x
        diffusion     log p(x) = -D/2 mean (output - target)^2                  at one of the student's own times

    z is a sum over the D latent elements: beside the matching gradient, that of L grows as sqrt(D).
    `--rl_balance grad_norm` holds the ratio of the two.

    Online, w and l are the best and the worst image of each group. Loss and metrics sit in the row of the winner, and
    only the images of a pair pass through the networks; all transitions of a pair are one graph.

    PSO online is the transition form; its authors' code has a loss for each transition (each_transition). It also clips
    the ratio of the probabilities to 1 +- 0.1, in the mean over the elements. That is left out: so far off, a step has
    moved by about half a standard deviation in each element, which matching does not allow. PSO offline is the
    diffusion form with pairs, the rejected image of each drawn by the distilled student itself (dmdr-sample).

    Attributes:
        beta: Strength of the preference on the summed log-ratio z, of all D latent elements. Published values are for
            the mean, beta_mean = beta D: 5000 at D = 16384 (Diffusion-DPO) is 0.305 here.
        loss_type: Of u = beta z, as in TRL: "sigmoid" -log sigmoid(u), "hinge" relu(1 - u), or "ipo", which is
            (z - 1 / (2 beta))^2.
        label_smoothing: Share of preferences that are taken to be wrong (sigmoid only), in [0, 0.5).
        margin: Best and worst reward of a group must differ by more than this; equal rewards never make a pair.
        form: "transition" (PSO) or "diffusion" (Diffusion-DPO); by default transition where the student has stochastic
            steps, else diffusion. With a single step diffusion is experimental. The network is told a time that does
            not match its pure noise, so that its clean image is compared instead of its output; and a pair shares new
            noise, since on their own noise its images have no error.
        pairs: Preferences from a JSONL file instead of a reward, with prompt, chosen and rejected in each line: paths
            of images of the training resolution (the first of several), relative to the file. They are of the diffusion
            form.
        each_transition: Each transition of a pair is compared on its own, and the loss is the mean of theirs, with one
            graph at a time; else z is the sum over the transitions. PSO's beta of 50 for the mean of D = 65536 elements
            is 0.00076 here.
        sync_ref_model: Make the reference what the student is, every ref_model_sync_steps steps. A run has one
            reference: with GRPO beside it, its KL is to the same.
        ref_model_sync_steps: Steps between two such.
    """

    beta: float = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    margin: float = 0.0
    form: Literal["transition", "diffusion"] | None = None
    pairs: str | None = None
    each_transition: bool = False
    sync_ref_model: bool = False
    ref_model_sync_steps: int = 512
    _pairs: list[Pair] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"dpo: beta must be above 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"dpo: label_smoothing must be in [0, 0.5), not {self.label_smoothing}")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ConfigError(f"dpo: label_smoothing works only with loss_type sigmoid, not {self.loss_type}")
        if not self.margin >= 0:
            raise ConfigError(f"dpo: margin must be at least 0, not {self.margin}")
        if self.ref_model_sync_steps < 1:
            raise ConfigError(f"dpo: ref_model_sync_steps must be at least 1, not {self.ref_model_sync_steps}")
        if self.ref_model_sync_steps != type(self).ref_model_sync_steps and not self.sync_ref_model:
            raise ConfigError("dpo: ref_model_sync_steps is not read without sync_ref_model")
        if self.each_transition and (self.form == "diffusion" or self.pairs is not None):
            raise ConfigError("dpo: each_transition is of the form transition, without pairs")
        if self.pairs is not None:
            if self.form == "transition":
                raise ConfigError("dpo: form transition cannot use pairs; it needs trajectories of the student")
            if self.margin:
                raise ConfigError("dpo: margin is that of rewards, which pairs do without; leave it out")
            self._pairs = read_pairs(self.pairs)

    @property
    def needs(self) -> Needs:
        return Needs(
            reward=self.pairs is None,
            group_size=2 if self.pairs is None else 1,
            roles=("reference",),
            stochastic_steps=1 if self.form == "transition" or self.each_transition else 0,
        )

    def prompts(self) -> list[str]:
        """Those of the given pairs."""
        return [pair.prompt for pair in self._pairs]

    def setup(self, ctx: Context) -> None:
        check_headers(file for pair in self._pairs for file in (pair.chosen, pair.rejected))
        mean = self.beta * torch.Size(ctx.backend.latent_shape).numel()
        logger.info(
            "dpo: form %s; beta %g on the summed log-ratio is %.4g on the mean", self.form_in(ctx), self.beta, mean
        )

    def form_in(self, ctx: Context) -> str:
        if self.pairs is not None or not stochastic_steps(ctx):
            return "diffusion"
        return self.form or "transition"

    def after_update(self, ctx: Context) -> None:
        if self.sync_ref_model and (ctx.step + 1) % self.ref_model_sync_steps == 0:
            ctx.backend.snapshot()

    def __call__(self, draw: Draw, ctx: Context) -> Term | Iterator[Term]:
        if self.pairs is not None:
            rows, found = one_at_least((draw.sample % 2 == 0).nonzero().flatten())  # a pair is two images
            z = diffusion(*self.stored_pairs(draw, rows, ctx), None, draw, rows, ctx)
            return self.term(draw, rows, found, z)
        reward = ctx.rewards.total(ctx.scores(draw.rollout))
        best, worst = best_and_worst(reward, draw.group, self.margin)
        (rows, found), (losers, _) = one_at_least(best), one_at_least(worst)
        both = torch.cat([rows, losers])
        cond, gap = draw.cond.ordered(both.cpu()), reward[rows] - reward[losers]
        if self.form_in(ctx) == "transition":
            each, count = transitions(draw.rollout, both, cond, ctx), stochastic_steps(ctx)
            if self.each_transition:
                return (self.term(draw, rows, found, z, 1 / count, gap=gap) for z in each)
            z = torch.stack(list(each)).sum(0)
        else:
            start = draw.rollout.x_t[0, both] if ctx.sampler.num_inference_steps > 1 else None
            z = diffusion(draw.rollout.final[both], cond, start, draw, rows, ctx)
        return self.term(draw, rows, found, z, gap=gap)

    def term(self, draw: Draw, rows: Tensor, found: bool, z: Tensor, share: float = 1.0, **metrics: Tensor) -> Term:
        """Losses and metrics of the pairs, each [P], in the rows of their winners, [B]; valid where they are pairs.

        Args:
            found: Whether there are pairs.
            z: Log-ratio of each.
            share: What the loss is multiplied with.
        """

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(len(draw)).index_copy(0, rows, values)

        told = {"accuracy": (z > 0).float(), "logit": (self.beta * z).detach().abs(), **metrics}
        valid = torch.zeros_like(draw.mask).index_fill(0, rows, found)
        loss = torch.where(valid, spread(share * self.loss(z)), 0.0)
        return Term(loss, valid, metrics={name: spread(values) for name, values in told.items()})

    def loss(self, z: Tensor) -> Tensor:
        """Loss of each log-ratio z, [P]."""
        u = self.beta * z
        if self.loss_type == "hinge":
            return (1 - u).relu()
        if self.loss_type == "ipo":
            return (z - 1 / (2 * self.beta)) ** 2
        return -(1 - self.label_smoothing) * logsigmoid(u) - self.label_smoothing * logsigmoid(-u)

    def stored_pairs(self, draw: Draw, rows: Tensor, ctx: Context) -> tuple[Tensor, Condition]:
        """Latents [2 P, *latent] and condition of one drawn pair for each of P rows: the chosen, then the rejected."""
        index = ctx.random.integers("dpo/pair", draw.sample[rows], len(self._pairs))
        drawn = [self._pairs[i] for i in index.tolist()]
        files = [pair.chosen for pair in drawn] + [pair.rejected for pair in drawn]
        return latents_of(files, ctx.backend).to(draw.x_t), ctx.backend.encode([pair.prompt for pair in drawn] * 2)


def transitions(rollout: Rollout, both: Tensor, cond: Condition, ctx: Context) -> Iterator[Tensor]:
    """z of each transition that made the images (PSO), [P]; rows `both` are P winners, then their losers."""
    for i in range(stochastic_steps(ctx)):
        log_prob = partial(ctx.sampler.log_prob, i, x_next=rollout.x_t[i + 1, both])
        t = rollout.t[i].to(both.device, non_blocking=True).expand(len(both))
        yield log_ratio(log_prob, rollout.x_t[i, both], t, cond, ctx)


def diffusion(x: Tensor, cond: Condition, start: Tensor | None, draw: Draw, rows: Tensor, ctx: Context) -> Tensor:
    """z of denoising the images at one of the student's own times (Diffusion-DPO, eq. 14), [P].

    Args:
        x: Clean latents of P winners, then of their losers, [2 P, *latent].
        start: The noise that each was made from, its state at the first of the times; None for given images.
        rows: Rows of the winners, whose indices in the global batch draw the time and the noise that a pair shares.
    """
    at = renoised_to_grid(x, "dpo", draw, ctx, rows.repeat(2), start)

    def log_p(prediction: Prediction) -> Tensor:
        one_step = ctx.sampler.num_inference_steps == 1
        error = prediction.x0 - x if one_step else prediction.value - prediction.target(x, at.eps)
        return -0.5 * (error**2).flatten(1).mean(1)

    return log_ratio(log_p, at.x_t, at.t, cond, ctx)


def log_ratio(log_p: Callable[[Prediction], Tensor], x_t: Tensor, t: Tensor, cond: Condition, ctx: Context) -> Tensor:
    """z = [log p - log p_ref](winner) - [log p - log p_ref](loser), summed over the latent, [P].

    Args:
        log_p: Of a prediction at x_t, [2 P], as the mean over the latent's elements.
        x_t, t, cond: The networks' input: P winners, then their losers.
    """
    with torch.no_grad():
        reference = log_p(ctx.backend.reference(x_t, t, cond))
    winner, loser = (log_p(ctx.backend.student(x_t, t, cond)) - reference).chunk(2)
    return x_t[0].numel() * (winner - loser)


def one_at_least(rows: Tensor) -> tuple[Tensor, bool]:
    """Rows [P], and whether there were any; the first one stands in where there is none.

    All processes must make the same passes through a network that they share (--shard).
    """
    return (rows, True) if len(rows) else (rows.new_zeros(1), False)


def stochastic_steps(ctx: Context) -> int:
    """Steps of the sampler that have a density: all but the last, or none."""
    return ctx.sampler.num_inference_steps - 1 if ctx.sampler.eta > 0 else 0
