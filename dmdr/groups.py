"""Statistics within groups: samples of one prompt are compared with each other and with nothing else.

All in float64, over valid samples only. A group with fewer than two of them, or whose values do not differ by more than
rounding, has deviation exactly 0: a mean of equal float32 numbers is not, and dividing by its tiny spread would make
advantages of nothing.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # added to standard deviations of rewards, as Flow-GRPO and TRL do
ADVANTAGE_LIMIT = 5.0  # Flow-GRPO, DanceGRPO and DiffusionNFT clip advantages there

ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["normalize_then_sum", "sum_then_normalize"]


def spread_out(values: Tensor) -> bool:
    """Whether values [N] differ by more than rounding."""
    return bool(_differ(values.max(), values.min(), values.abs().mean()))


def _differ(greatest: Tensor, least: Tensor, size: Tensor) -> Tensor:
    return greatest - least > 1e-6 * size.clamp_min(1.0)


def scored(scores: Mapping[str, Tensor]) -> Tensor:
    """Samples that every reward has a finite score for, [N] bool."""
    return torch.stack([score.isfinite() for score in scores.values()]).all(0)


def comparable(group: Tensor, valid: Tensor) -> Tensor:
    """Valid samples whose group holds another valid one, [N] bool."""
    index, number = _index(group)
    count = torch.zeros(number, dtype=torch.int64, device=group.device).index_add_(0, index, valid.long())
    return valid & (count >= 2)[index]


def group_deviation(values: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """value - mean of its group, [N] float64.

    Args:
        values: [N]; ignored where not valid.
        group: Group of each sample, [N] int64, any numbers.
        valid: Samples that count, [N] bool.

    Returns:
        0 for a sample that is not valid, in a group with fewer than two valid samples, or in one of equal values.
    """
    counted = comparable(group, valid)
    values = torch.where(counted, values.double(), 0.0)
    index, number = _index(group)
    size, total = _sum(counted.double(), index, number), _sum(values, index, number)
    extreme = torch.full((number,), torch.inf, dtype=torch.float64, device=values.device)
    greatest = (-extreme).scatter_reduce(0, index, values.where(counted, -torch.inf), "amax")
    least = extreme.scatter_reduce(0, index, values.where(counted, torch.inf), "amin")
    differ = _differ(greatest, least, _sum(values.abs(), index, number) / size.clamp_min(1))
    deviation = values - (total / size.clamp_min(1))[index]
    return torch.where(counted & differ[index], deviation, 0.0)


def group_std(deviation: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Root mean square of `group_deviation` over each sample's group, [N] float64 (the biased standard deviation)."""
    index, number = _index(group)
    size = _sum(valid.double(), index, number)
    return (_sum(deviation**2, index, number) / size.clamp_min(1)).sqrt()[index]


def advantages(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    scale_rewards: ScaleRewards = "batch",
    aggregation: Aggregation = "normalize_then_sum",
) -> tuple[Tensor, Tensor]:
    """How much better each sample is than its group.

    Args:
        scores: Raw rewards of the global batch by name, each [N].
        weights: Weight of each name.
        group: Group of each sample, [N].
        scale_rewards: Unit of a deviation: the standard deviation of its "group", of the whole "batch", or 1 ("none").
        aggregation: "normalize_then_sum" scales each reward before the weighted sum, so that none is silenced by
            another's variance, and brings the sum to unit size over the batch (GDPO, arXiv 2601.05242; TRL), unless
            there is no scale. "sum_then_normalize" scales the sum alone (Flow-GRPO, arXiv 2505.05470).

    Returns:
        Advantages [N] float64 in [-5, 5], exactly 0 in a group of equal rewards, and the valid samples [N] bool: those
        with finite rewards whose group holds another such.
    """
    device, group = group.device, group.cpu()  # a few numbers, which are looked at again and again
    scores = {name: score.cpu() for name, score in scores.items()}
    valid = comparable(group, scored(scores))
    if aggregation == "sum_then_normalize":
        total = torch.stack([weights[name] * score.double() for name, score in scores.items()]).sum(0)
        advantage = _scaled(total, group, valid, scale_rewards)
    else:
        apart = [weights[name] * _scaled(score, group, valid, scale_rewards) for name, score in scores.items()]
        advantage = torch.stack(apart).sum(0)
        if scale_rewards != "none":
            advantage = advantage / (_rms(advantage[valid]) + STD_FLOOR)
    advantage = advantage.clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)
    return advantage.to(device, non_blocking=True), valid.to(device, non_blocking=True)


def _scaled(values: Tensor, group: Tensor, valid: Tensor, unit: ScaleRewards) -> Tensor:
    """Deviation from the group's mean in that unit, [N] float64."""
    deviation = group_deviation(values, group, valid)
    if unit == "none":
        return deviation
    if unit == "group":
        return deviation / (group_std(deviation, group, valid) + STD_FLOOR)
    usable = values[valid].double()
    return deviation / (_rms(usable - usable.mean()) + STD_FLOOR)


def _rms(values: Tensor) -> Tensor:
    return (values**2).mean().sqrt() if len(values) else values.new_zeros(())


def _index(group: Tensor) -> tuple[Tensor, int]:
    found, index = group.unique(return_inverse=True)
    return index, len(found)


def _sum(values: Tensor, index: Tensor, number: int) -> Tensor:
    return torch.zeros(number, dtype=torch.float64, device=values.device).index_add_(0, index, values)
