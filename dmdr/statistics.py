"""How sure a mean is: standard errors and intervals where several images share a prompt.

The unit is the prompt: images of one prompt are alike, so that their mean counts as one observation. Two models are
compared pair by pair, on the same prompts and the same initial noise.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: Over the prompts.
        low, high: The interval; NaN where there is but one prompt.
        count: Prompts that it is of.
        left_out: Prompts without a finite value.
    """

    mean: float
    low: float
    high: float
    count: int
    left_out: int = 0


def numbered(prompts: Sequence[Hashable]) -> tuple[Tensor, int]:
    """The number of each image's prompt, [N] int64, by which prompt comes first, and how many prompts there are.

    Args:
        prompts: Of each image.
    """
    number: dict[Hashable, int] = {}
    return torch.tensor([number.setdefault(prompt, len(number)) for prompt in prompts], dtype=torch.int64), len(number)


def prompt_means(values: Tensor, prompts: Sequence[Hashable]) -> Tensor:
    """The mean of each prompt's images, [P] float64, in the order in which the prompts come first.

    Args:
        values: Of each image, [N], any float dtype; those that are not finite are left out.
        prompts: Of each image.

    Returns: NaN for a prompt whose values are all not finite.
    """
    index, number = numbered(prompts)
    found = values.detach().cpu().double()
    finite = found.isfinite()
    sums = torch.zeros(number, dtype=torch.float64).index_add_(0, index, torch.where(finite, found, 0.0))
    counts = torch.zeros(number, dtype=torch.float64).index_add_(0, index, finite.double())
    return sums / counts  # 0 / 0 is NaN


def standard_error(values: Tensor) -> float:
    """Of the mean of independent finite values [P]; NaN of fewer than two."""
    found = values[values.isfinite()].double()
    return float(found.std() / math.sqrt(len(found))) if len(found) > 1 else math.nan


def jackknife(
    statistic: Callable[[Tensor], Tensor], prompts: Sequence[Hashable], *, groups: int = 10, seed: int = 0
) -> Tensor:
    """Standard errors of statistics of a set, such as distances, by leaving out a part of the prompts at a time.

    Args:
        statistic: Of the images of these indices [n] int64, rising: K numbers, [K].
        prompts: Of each image; those of a prompt are left out together.
        groups: Parts; at most as many as there are prompts.
        seed: Of the parts.

    Returns: [K] float64; NaN where there is one prompt.

    Source: Busing et al. 1999, "Delete-m Jackknife for Unequal m", for parts of one size.
    """
    index, number = numbered(prompts)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(min(groups, number))
    if len(parts) < 2:
        return torch.full_like(statistic(torch.arange(len(index))), math.nan, dtype=torch.float64)
    found = torch.stack([statistic((~torch.isin(index, part)).nonzero()[:, 0]) for part in parts]).double()
    return ((len(parts) - 1) / len(parts) * (found - found.mean(0)).square().sum(0)).sqrt()


def bootstrap(
    values: Tensor,
    strata: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of independent values with a bootstrap interval, corrected for bias and acceleration (BCa).

    Args:
        values: One of each prompt, [P]; differences of pairs, for a comparison. Those not finite are left out.
        strata: Of each value: another experiment would have as many of each kind; all are of one kind by default.
        level: Share of all experiments in which the interval is to hold the true mean.
        resamples: Samples that are drawn from the values.
        seed: Of the draws.

    Source: Efron 1987, "Better Bootstrap Confidence Intervals", eq. 6.15 to 6.17.
    """
    found = values.detach().cpu().double().numpy()
    x = found[np.isfinite(found)]
    count, left_out = len(x), len(found) - len(x)
    if count < 2:
        return Estimate(float(x.mean()) if count else math.nan, math.nan, math.nan, count, left_out)
    mean, random, normal = float(x.mean()), np.random.default_rng(seed), NormalDist()
    if np.ptp(x) == 0:
        return Estimate(mean, mean, mean, count, left_out)
    rows = max(1, 2**22 // count)  # resamples at a time, which bounds the memory
    kinds: dict[Hashable, list[float]] = {}
    kept = (
        [0] * count
        if strata is None
        else [kind for kind, value in zip(strata, found, strict=True) if np.isfinite(value)]
    )
    for kind, value in zip(kept, x, strict=True):
        kinds.setdefault(kind, []).append(value)
    groups = [np.array(group) for group in kinds.values()]
    means = np.zeros(resamples)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        for group in groups:
            drawn = random.integers(len(group), size=(size, len(group)))
            means[start : start + size] += group[drawn].sum(1) / count
    means = np.sort(means)
    share = ((means < mean).mean() + (means <= mean).mean()) / 2
    bias = normal.inv_cdf(min(max(float(share), 1 / resamples), 1 - 1 / resamples))
    jackknife = mean - (mean * count - x) / (count - 1)
    acceleration = float((jackknife**3).sum() / (6 * ((jackknife**2).sum() ** 1.5)))

    def end(tail: float) -> float:
        z = bias + normal.inv_cdf(tail)
        return float(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z))))

    return Estimate(mean, end((1 - level) / 2), end((1 + level) / 2), count, left_out)


def paired(
    values: Tensor,
    others: Tensor,
    prompts: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean difference of two models on the same prompts and noise, with its interval.

    Args:
        values, others: Of each image, [N]; an image without a finite value in one is left out of both.
        prompts: Of each image.
        level, resamples, seed: As in `bootstrap`.

    Raises:
        ValueError: If the lengths differ.
    """
    if not len(values) == len(others) == len(prompts):
        raise ValueError(f"{len(values)} and {len(others)} values of {len(prompts)} prompts cannot be paired")
    difference = values.detach().cpu().double() - others.detach().cpu().double()
    return bootstrap(prompt_means(difference, prompts), level=level, resamples=resamples, seed=seed)


def wilson(successes: int, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share, for `successes` of `count` independent trials.

    Raises:
        ValueError: If there is no trial.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"{successes} of {count} is no share")
    z, p = NormalDist().inv_cdf((1 + level) / 2), successes / count
    centre = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
