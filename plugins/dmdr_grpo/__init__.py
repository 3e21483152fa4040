"""GRPO: a policy gradient on the student's own stochastic steps, for rewards that need no gradient.

Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) on the few-step student, as in DMDR (arXiv 2511.13649): the sampler's
noisy steps are Gaussian policies, the images of a prompt are compared with each other, and the last step, which is
deterministic, never enters a ratio.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dmdr.errors import ConfigError, TrainingError
from dmdr.groups import Aggregation, ScaleRewards, advantages
from dmdr.paths import Prediction
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Rollout, Term

logger = logging.getLogger("dmdr")


@dataclass
class GRPO:
    """Clipped policy gradient (Shao et al. 2024, arXiv 2402.03300, eq. 3) over the mean of the policy steps:

        L = max(-A rho, -A clip(rho, 1 - epsilon / D, 1 + epsilon_high / D)) + beta KL(student || reference)

    Log-probabilities are means over the D latent elements, so that L and its weight carry over between resolutions.

    Attributes:
        epsilon: Clip range of the summed log-ratio, as in PPO; divided by the latent size D inside. Published
            per-element ranges of 1e-5 and 1e-4 at D = 65536 are 0.66 and 6.6 here.
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
            log_prob=True,
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
            x_t, t = rollout.x_t[i], rollout.t[i].to(draw.x_t.device).expand(len(draw))
            prediction = ctx.backend.student(x_t, t, draw.cond)
            if draw.iteration == 0:
                self.require_reproduced(i, prediction, draw, ctx)
            log_ratio, balance = self.log_ratio(i, prediction, rollout, ctx)
            rho = log_ratio.double().exp()
            clipped = rho.clamp(1 - low, 1 + high)
            loss = balance * torch.maximum(-advantage * rho, -advantage * clipped)
            metrics = {"clip_fraction": (rho != clipped).float(), "log_ratio": log_ratio * draw.x0[0].numel()}
            if self.beta:
                mean, std = ctx.sampler.moments(i, prediction)
                with torch.no_grad():
                    reference, _ = ctx.sampler.moments(i, ctx.backend.reference(x_t, t, draw.cond))
                kl = ((mean - reference) ** 2 / (2 * std**2)).flatten(1).mean(1)
                loss, metrics = loss + self.beta * kl, metrics | {"kl": kl}
            # What is not valid has advantage 0, but its KL must not count either.
            loss = torch.where(valid, loss, 0.0) / len(steps)
            yield Term(loss.float(), valid, metrics=metrics | {"advantage": advantage.abs()})

    def log_ratio(self, i: int, prediction: Prediction, rollout: Rollout, ctx: Context) -> tuple[Tensor, float]:
        """Logarithm of step i's ratio, [B] and a mean over the elements, and what its loss is multiplied with.

        GRPO-Guard's is (log-ratio + its bias) std = mean(noise (mean - old mean)), the noise being the rollout's; its
        loss is divided by the length of the step.
        """
        if self.ratio == "plain":
            assert rollout.log_prob is not None
            return ctx.sampler.log_prob(i, prediction, rollout.x_t[i + 1]) - rollout.log_prob[i], 1.0
        mean, std = ctx.sampler.moments(i, prediction)
        old, _ = ctx.sampler.moments(i, replace(prediction, value=rollout.x0[i], kind="x0"))
        log_ratio = ((rollout.x_t[i + 1] - old) / std * (mean - old)).flatten(1).mean(1)
        return log_ratio, 1 / (rollout.t[i] - rollout.t[i + 1]).item()

    def advantages(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`groups.advantages` by this objective's settings."""
        return advantages(scores, weights, group, self.scale_rewards, self.multi_objective_aggregation)

    @torch.no_grad()
    def require_reproduced(self, i: int, prediction: Prediction, draw: Draw, ctx: Context) -> None:
        """Stop if the log-probability of step i before the first update is not the rollout's.

        Ratios would be wrong from the start, without a word. Bitwise on the CPU; elsewhere a tenth of the clip range.

        Raises:
            TrainingError: In every process, if it differs in any.
        """
        assert draw.rollout.log_prob is not None
        log_prob = ctx.sampler.log_prob(i, prediction, draw.rollout.x_t[i + 1])
        allowed = 0.0 if log_prob.device.type == "cpu" else 0.1 * self.epsilon / draw.x0[0].numel()
        off = ctx.gather((log_prob - draw.rollout.log_prob[i]).abs().max()[None]).max().item()
        if not off <= allowed:
            raise TrainingError(
                f"grpo: before the first update the log-probability of step {i} is off by {off:.3g} per element from "
                f"the rollout's (allowed: {allowed:.3g}); training and rollout do not compute the same, so every ratio "
                "would be wrong: check precision, dropout, batch sizes and whether the weights changed in between"
            )
