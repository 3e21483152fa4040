"""GRPO: a policy gradient on the student's own stochastic steps, for rewards that need no gradient.

Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) on the few-step student, as in DMDR (arXiv 2511.13649): the sampler's
noisy steps are Gaussian policies, the images of a prompt are compared with each other, and the last step, which is
deterministic, never enters a ratio.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from dmdr.errors import ConfigError, TrainingError
from dmdr.groups import Aggregation, ScaleRewards, advantages
from dmdr.paths import Prediction
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Rollout, Term

logger = logging.getLogger("dmdr")
MOVED = 0.1  # standard deviations of a step, root mean square over the latent


@dataclass
class GRPO:
    """Clipped policy gradient (Shao et al. 2024, arXiv 2402.03300, eq. 3) over the mean of the policy steps:

        L = max(-A rho, -A clip(rho, 1 - epsilon / D, 1 + epsilon_high / D)) + beta KL(student || reference)

    Log-probabilities are means over the D latent elements. Beside the matching gradient, that of L falls as 1/sqrt(D),
    since the noises of the elements are independent. `--rl_balance grad_norm` holds the ratio of the two.

    The ratio is 1 at the first use of a rollout, whatever kernels have made it: it is taken to the means that the
    student with gradient had then, as TRL does.

    Attributes:
        epsilon: Clip range of the log-ratio, summed over the latent, as in PPO; divided by the latent size D inside.
            Published per-element ranges of 1e-5 and 1e-4 at D = 65536 are 0.66 and 6.6 here. The "guard" ratio is
            smaller than the plain one by the noise of its step: the same epsilon clips it later.
        epsilon_high: Upper clip range; epsilon by default.
        ratio: "guard" is GRPO-Guard's normalised ratio (arXiv 2510.22319): unbiased, and balanced over the steps.
            "plain" is the ratio of the transition probabilities.
        num_iterations: Updates per rollout; the fake score stays fixed meanwhile.
        beta: Weight of the KL divergence to the stage-1 student; 0 needs no reference.
        scale_rewards: What an advantage, reward minus mean of the group, is divided by: the standard deviation of its
            "group", of the whole "batch", or nothing ("none").
        multi_objective_aggregation: "normalize_then_sum" scales each reward before the weighted sum, so that none is
            silenced by another's variance, and brings the sum, of one or several, to unit size over the batch (GDPO,
            arXiv 2601.05242; TRL). "sum_then_normalize" scales the sum alone, by scale_rewards (Flow-GRPO).
        policy_steps: Student steps that are trained: "all" stochastic ones, "early:N" the first N, or "random:N" drawn
            anew for each rollout. The images of a group share the noise of the others.
        init_same_noise: The images of a group share their initial noise, so that only trained steps tell them apart.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    ratio: Literal["guard", "plain"] = "guard"
    num_iterations: int = 1
    beta: float = 0.0
    scale_rewards: ScaleRewards = "batch"
    multi_objective_aggregation: Aggregation = "normalize_then_sum"
    policy_steps: str = "all"
    init_same_noise: bool = True
    _first: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or (self.epsilon_high is not None and self.epsilon_high <= 0):
            raise ConfigError("grpo: epsilon and epsilon_high must be above 0")
        if self.num_iterations < 1:
            raise ConfigError(f"grpo: num_iterations must be at least 1, not {self.num_iterations}")
        if self.beta < 0:
            raise ConfigError(f"grpo: beta must be at least 0, not {self.beta}")
        if not re.fullmatch(r"all|(early|random):[1-9]\d*", self.policy_steps):
            raise ConfigError(f"grpo: policy_steps must be all, early:N or random:N, not '{self.policy_steps}'")

    @property
    def needs(self) -> Needs:
        return Needs(
            group_size=2,
            stochastic_steps=1 if self.policy_steps == "all" else int(self.policy_steps.partition(":")[2]),
            roles=("reference",) if self.beta else (),
            updates_per_rollout=self.num_iterations,
        )

    def setup(self, ctx: Context) -> None:
        size = torch.Size(ctx.backend.latent_shape).numel()
        logger.info("grpo: epsilon %g on the summed log-ratio is %.3g per element", self.epsilon, self.epsilon / size)

    def shared_noise(self, ctx: Context) -> set[int]:
        trained = self.trained_steps(ctx)
        shared = {i + 1 for i in range(ctx.sampler.num_inference_steps - 1) if i not in trained}
        return shared | {0} if self.init_same_noise else shared

    def trained_steps(self, ctx: Context) -> list[int]:
        """The stochastic steps of this update, the same for all samples and processes."""
        stochastic = torch.arange(ctx.sampler.num_inference_steps - 1)
        if self.policy_steps == "all":
            return stochastic.tolist()
        window, count = self.policy_steps.split(":")
        order = stochastic if window == "early" else ctx.random.of_rollout.uniform("grpo/steps", stochastic).argsort()
        return sorted(order[: int(count)].tolist())

    def __call__(self, draw: Draw, ctx: Context) -> Iterator[Term]:
        scores, group = ctx.global_scores()
        advantage, valid = self.advantages(scores, ctx.rewards.weights, group)
        advantage, valid = advantage[draw.sample], valid[draw.sample]
        rollout, steps = draw.rollout, self.trained_steps(ctx)
        low, high = (e / draw.x0[0].numel() for e in (self.epsilon, self.epsilon_high or self.epsilon))
        for i in steps:
            x_t, t = rollout.x_t[i], rollout.t[i].to(draw.x_t.device, non_blocking=True).expand(len(draw))
            prediction = ctx.backend.student(x_t, t, draw.cond)
            log_ratio, balance = self.log_ratio(i, prediction, self.old(i, prediction, draw, ctx), draw.rollout, ctx)
            rho = log_ratio.double().exp()
            clipped = rho.clamp(1 - low, 1 + high)
            loss = balance * torch.maximum(-advantage * rho, -advantage * clipped)
            metrics = {"clip_fraction": (rho != clipped).float(), "log_ratio": log_ratio * draw.x0[0].numel()}
            if self.beta:
                kl = ctx.sampler.kl(i, prediction, ctx.backend.reference(x_t, t, draw.cond))
                loss, metrics = loss + self.beta * kl, metrics | {"kl": kl}
            # What is not valid has advantage 0, but its KL must not count either.
            loss = torch.where(valid, loss, 0.0) / len(steps)
            yield Term(loss.float(), valid, metrics=metrics | {"advantage": advantage.abs()})

    def old(self, i: int, prediction: Prediction, draw: Draw, ctx: Context) -> Prediction:
        """What the student answered at step i in the first use of this rollout; what made it, where it had none."""
        if draw.iteration == 0:
            self.check_replay(i, prediction, draw, ctx)
            first = prediction.value.detach()
            if self.num_iterations > 1:
                self._first[i, int(draw.sample[0])] = first
            return replace(prediction, value=first)
        if (key := (i, int(draw.sample[0]))) in self._first:
            return replace(prediction, value=self._first[key])
        return replace(prediction, value=draw.rollout.x0[i], kind="x0")

    def log_ratio(
        self, i: int, prediction: Prediction, old: Prediction, rollout: Rollout, ctx: Context
    ) -> tuple[Tensor, float]:
        """Logarithm of step i's ratio, [B] and a mean over the elements, and what its loss is multiplied with.

        GRPO-Guard's is (log-ratio + its bias) std = mean(noise (mean - old mean)), the noise being the rollout's; its
        loss is divided by the length of the step.
        """
        x_next = rollout.x_t[i + 1]
        if self.ratio == "plain":
            return ctx.sampler.log_prob(i, prediction, x_next) - ctx.sampler.log_prob(i, old, x_next), 1.0
        (mean, std), (before, _) = ctx.sampler.moments(i, prediction), ctx.sampler.moments(i, old)
        log_ratio = ((x_next - before) / std * (mean - before)).flatten(1).mean(1)
        return log_ratio, 1 / (rollout.t[i] - rollout.t[i + 1]).item()

    def advantages(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`groups.advantages` by this objective's settings."""
        return advantages(scores, weights, group, self.scale_rewards, self.multi_objective_aggregation)

    @torch.no_grad()
    def check_replay(self, i: int, prediction: Prediction, draw: Draw, ctx: Context) -> None:
        """Stop if the student with gradient is not the one that made the rollout.

        Another kernel or a compiled graph rounds otherwise. That moves the mean of a step by about a thousandth of its
        standard deviation (measured on a small compiled SD3 in bf16, on a CPU). Dropout and other weights move it more.

        Raises:
            TrainingError: In every process, if a mean has moved by more than `MOVED` in any.
        """
        (mean, std), (rollout, _) = (
            ctx.sampler.moments(i, found)
            for found in (prediction, replace(prediction, value=draw.rollout.x0[i], kind="x0"))
        )
        off = ctx.gather(((mean - rollout) / std).square().mean().sqrt()[None]).max().item()
        if not off <= MOVED:
            raise TrainingError(
                f"grpo: before the first update the mean of step {i} is {off:.2g} standard deviations from the "
                f"rollout's (allowed: {MOVED}); training and rollout do not compute the same, so every ratio would be "
                "wrong: check precision, dropout, and whether the weights changed in between"
            )
