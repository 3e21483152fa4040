"""Reward-tilted distribution matching (RT-DM; DMDR, arXiv 2511.13649, section 2.4, eq. 4) as a weight per sample."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dmdr.groups import comparable, group_deviation, scored, spread_out
from dmdr.protocols import Context, Needs, require
from dmdr.types import Direction, Draw

logger = logging.getLogger("dmdr")

Divergence = Literal["forward_kl", "js", "softened_reverse_kl", "hellinger", "jeffreys", "neyman", "reverse_kl"]
Baseline = Literal["batch", "prompt_group", "ema"]

ROUNDING = 1e-6  # rewards that differ by less, in their own size or in standard deviations, are equal
DECAY = 0.99  # of averages over time, per call
LOGIT_LIMIT = 10.0  # of exponents that enter an average over time, where one of them would stay; as in f-distill


def standardised(
    scores: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of rewards, each in units of its own standard deviation over the valid samples.

    Args:
        scores: Raw rewards of the global batch by name, each [N] float32, NaN or infinite where not applicable.
        weights: Weight of each name.
        group: Group of each sample, [N] int64, where rewards count as deviations from the mean of their group. The
            standard deviation is over all of those.

    Returns:
        The sum [N] float64 (0 where not valid; a constant reward adds 0), and the valid samples [N] bool: those that
        every reward has scored and, with groups, that have another one to be compared with.
    """
    finite = scored(scores)
    valid = finite if group is None else comparable(group, finite)
    total = torch.zeros_like(valid, dtype=torch.float64)
    for name, score in scores.items():
        usable = (score.double() if group is None else group_deviation(score, group, finite))[valid]
        if len(usable) > 1 and spread_out(usable):
            total[valid] += weights[name] * (usable - usable.mean()) / usable.std(correction=0)
    return total, valid


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0 (least) to 1 (greatest), [N] float64; values that are equal up to rounding share their mean rank."""
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values - ROUNDING)
    up_to = torch.searchsorted(ordered, values + ROUNDING, right=True)
    return (below + up_to - 1).double() / (2 * max(len(values) - 1, 1))


def density_ratio(rewards: Tensor, beta: float, valid: Tensor, *, linear: bool = False) -> Tensor:
    """Estimate of p_tilted / p at each sample: exp(r / beta) / mean exp(r / beta).

    Args:
        rewards: [N], the whole global batch.
        beta: Temperature in units of the reward; > 0.
        valid: Samples that count, [N] bool.
        linear: To first order in 1 / beta instead: 1 + (r - mean r) / beta, which may be negative.

    Returns:
        [N] float64, mean one over the valid samples; exactly 1 for the others, and where the rewards do not differ.
    """
    ratio = torch.ones(len(rewards), dtype=torch.float64, device=rewards.device)
    usable = rewards[valid].double()
    if len(usable) < 2 or not spread_out(usable):
        return ratio
    if linear:
        ratio[valid] = 1 + (usable - usable.mean()) / beta
    else:
        w = ((usable - usable.max()) / beta).exp()
        ratio[valid] = w / w.mean()
    return ratio


def divergence_weight(name: Divergence, ratio: Tensor) -> Tensor:
    """h(rho) of f-distill (Xu et al. 2025, arXiv 2502.15681): the weight that makes DMD descend another f-divergence.

    h(rho) = f''(rho) rho^2 up to a constant, for the divergence E_student f(rho) with rho = p_target / p_student. DMD
    itself descends the reverse KL divergence, h = 1; RT-DM weighs by rho, the forward one. `neyman` and
    `softened_reverse_kl` fall with rho: they press harder where the target has little mass.

    Args:
        ratio: rho, any shape, > 0.
    """
    weights: dict[Divergence, Callable[[], Tensor]] = {
        "forward_kl": lambda: ratio,
        "js": lambda: 1 - 1 / (1 + ratio),
        "softened_reverse_kl": lambda: 1 / (1 + ratio),
        "hellinger": lambda: ratio.sqrt(),
        "jeffreys": lambda: 1 + ratio,
        "neyman": lambda: 1 / ratio,
        "reverse_kl": lambda: torch.ones_like(ratio),
    }
    return weights[name]()


def bounded(
    ratio: Tensor,
    valid: Tensor,
    clip: tuple[float, float],
    divergence: Divergence = "forward_kl",
    mean: Callable[[Tensor], Tensor | float] = torch.mean,
) -> Tensor:
    """Weights from density ratios: clipped (as in f-distill, before h: so each h is bounded), h, brought to mean one.

    Args:
        ratio: [N] float64.
        valid: Samples that count, [N] bool; the others get the neutral weight 1.
        mean: What the valid samples' weights are divided by.

    Returns:
        [N] float32.
    """
    weights = torch.ones_like(ratio)
    h = divergence_weight(divergence, ratio[valid].clamp(*clip))
    weights[valid] = h / mean(h)
    return weights.float()


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 as a share of N: 1 for equal weights, 1 / N if one sample takes all."""
    return weights.sum() ** 2 / (weights**2).sum() / len(weights)


@dataclass
class Moments:
    """Mean and variance over time: exponential moving averages of mean and mean square, corrected for their start.

    Attributes:
        count: Calls so far.
        mean, var: Over all values so far; the share of a call falls by `DECAY` with each later one.
    """

    count: int = 0
    mean: float = 0.0
    var: float = 0.0

    def add(self, values: Tensor) -> "Moments":
        """Count in values [n], if any. Written with differences: equal values keep exactly their mean."""
        if len(values):
            self.count += 1
            rate = (1 - DECAY) / (1 - DECAY**self.count)
            change = values.mean().item() - self.mean
            self.var = (1 - rate) * (self.var + rate * change**2) + rate * values.var(correction=0).item()
            self.mean += rate * change
        return self

    def standardise(self, values: Tensor) -> Tensor:
        """(values - mean) / std, the values counted in, which bounds it: a few early ones have next to no spread.

        Returns:
            [n] float64; 0 at the first call, and as long as nothing has differed.
        """
        self.add(values)
        std = math.sqrt(self.var)
        if self.count < 2 or std <= ROUNDING * max(1.0, abs(self.mean)):
            return torch.zeros_like(values)
        return (values - self.mean) / std


@dataclass
class RewardTilt:
    """RT-DM: the reward of the finished image as a constant weight of its sample's DMD gradient.

    This is the weight of a forward-KL-like divergence to p_teacher exp(r / beta), not the gradient of the reverse KL to
    it: where the student can match the teacher exactly, the direction is zero and so is the weighted one. It moves mass
    towards high reward only where the student cannot match the teacher everywhere, and saturates there.

    Attributes:
        reward_tilt: Temperature in standard deviations of the (standardised, summed) reward; 1 to 2 is usual, 0 is off.
        tilt_weight: How the weight rises with z, the reward in standard deviations. "exp" is exp(z / reward_tilt).
            "linear" is 1 + z / reward_tilt, its first order, which no outlier dominates. "rank" is "exp" of the rank,
            in standard deviations of the ranks: only the order counts.
        tilt_divergence: Weight h of the density ratio that "exp" estimates, as in f-distill (arXiv 2502.15681); RT-DM
            itself is forward_kl.
        tilt_baseline: What a reward is compared with, by default the first of these that applies: "prompt_group", the
            other images of its prompt, where there are any; "ema", those of the last hundred updates or so, for a
            global batch of one; "batch", the global batch. By group, a sample without another valid one has weight 1.
            Over time, weights have mean one over time and not over the batch, the first call has weight 1, and the
            rank is the one of a Gaussian reward.
        tilt_clip: Least and greatest density ratio, before the mean is brought back to one.

    Raises:
        ConfigError: For an invalid value.
    """

    reward_tilt: float = 1.5
    tilt_weight: Literal["exp", "linear", "rank"] = "exp"
    tilt_divergence: Divergence = "forward_kl"
    tilt_baseline: Baseline | None = None
    tilt_clip: list[float] = field(default_factory=lambda: [0.1, 5.0])
    _moments: dict[str, Moments] = field(default_factory=lambda: defaultdict(Moments), init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self, "reward_tilt", self.reward_tilt >= 0, "at least 0")
        clip = self.tilt_clip
        require(
            self,
            "tilt_clip",
            len(clip) == 2 and 0 < clip[0] <= 1 <= clip[1],
            "two numbers above 0, the first at most 1 and the second at least 1",
        )
        if self.tilt_divergence != "forward_kl":
            what = f"exp with --tilt_divergence {self.tilt_divergence}"
            require(self, "tilt_weight", self.tilt_weight == "exp", what)

    @property
    def idle(self) -> bool:
        return self.reward_tilt == 0

    @property
    def needs(self) -> Needs:
        return Needs(group_size=2 if self.tilt_baseline == "prompt_group" else 1)

    def __call__(self, draw: Draw, direction: Direction, ctx: Context) -> Tensor:
        scores, group = ctx.global_scores()
        scores, group = {name: score.cpu() for name, score in scores.items()}, group.cpu()  # each is looked at often
        shares = {name: share for name, (share, _) in ctx.rewards.parts.items()}
        clip = low, high = self.tilt_clip[0], self.tilt_clip[1]
        baseline = self.tilt_baseline or automatic_baseline(group)
        if baseline == "ema":
            valid = scored(scores)
            ratio = self._ratio_over_time(scores, shares, valid)
            weights = bounded(ratio, valid, clip, self.tilt_divergence, lambda h: self._moments["weight"].add(h).mean)
        else:
            rewards, valid = standardised(scores, shares, group if baseline == "prompt_group" else None)
            if self.tilt_weight == "rank":
                rewards[valid] = ranks(rewards[valid])
            std = rewards[valid].std(correction=0).item() if valid.any() else 0.0
            ratio = density_ratio(
                rewards, max(self.reward_tilt * std, 1e-12), valid, linear=self.tilt_weight == "linear"
            )
            weights = bounded(ratio, valid, clip, self.tilt_divergence)
            if baseline == "batch" and len(group) == 1:
                self._warn()
        ctx.log(
            {
                "tilt/effective_sample_size": effective_sample_size(weights),
                "tilt/max": weights.max(),
                "tilt/clipped": ((ratio < low) | (ratio > high)).double().mean(),
            }
        )
        return weights.to(draw.sample.device, non_blocking=True)[draw.sample]

    def _ratio_over_time(self, scores: Mapping[str, Tensor], shares: Mapping[str, float], valid: Tensor) -> Tensor:
        """`density_ratio` of the global batch against the calls so far, [N] float64; they learn from valid samples."""
        parts = [
            shares[name] * self._moments[f"reward/{name}"].standardise(score[valid].double())
            for name, score in scores.items()
        ]
        total = torch.stack(parts).sum(0)  # of deviations, so that its mean is 0 already
        size = math.sqrt(self._moments["square"].add(total**2).mean)
        z = total / size if size > ROUNDING else torch.zeros_like(total)
        if self.tilt_weight == "rank":
            z = math.sqrt(12) * (torch.special.ndtr(z) - 0.5)  # ranks in [0, 1] have a variance of 1 / 12
        ratio = torch.ones_like(valid, dtype=torch.float64)
        if self.tilt_weight == "linear":
            ratio[valid] = 1 + z / self.reward_tilt
        else:
            w = (z / self.reward_tilt).clamp(-LOGIT_LIMIT, LOGIT_LIMIT).exp()
            ratio[valid] = w / self._moments["ratio"].add(w).mean
        return ratio

    def _warn(self) -> None:
        if not self._warned:
            logger.warning("RT-DM gives weight 1 to a global batch of one image: use --tilt_baseline ema")
            self._warned = True

    def state_dict(self) -> dict[str, tuple[int, float, float]]:
        """What the averages over time hold; empty for the other baselines."""
        return {name: astuple(moments) for name, moments in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, tuple[int, float, float]]) -> None:
        self._moments.clear()
        self._moments.update({name: Moments(*values) for name, values in state.items()})


def automatic_baseline(group: Tensor) -> Baseline:
    """By the groups [N] of the global batch: "prompt_group" if two share one, "ema" for a single sample, or "batch"."""
    if len(group.unique()) < len(group):
        return "prompt_group"
    return "ema" if len(group) == 1 else "batch"
