"""Figures of some of the images, and of questions of which a prompt has several."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmdr.benchmarks import Figure, prompts_of
from dmdr.statistics import prompt_means, standard_error


def pooled(sums: Tensor, counts: Tensor, rows: Sequence[Mapping[str, Any]], decimals: int = 4) -> Figure:
    """The mean over all questions of a kind: a prompt with two of them weighs twice.

    A ratio of two means, whose standard error is that of its linear part.

    Args:
        sums: Of the values of each image's questions, [N] float64.
        counts: Of the questions, [N] float64; images without any are left out.
        rows: Of each image.
        decimals: Digits after the point.
    """
    asked, prompts = counts > 0, prompts_of(rows)
    sums, counts = (torch.where(asked, values, math.nan) for values in (sums, counts))
    tops, bottoms = prompt_means(sums, prompts), prompt_means(counts, prompts)
    weight = 1 / float(bottoms.nanmean())
    value = float(tops.nanmean()) * weight
    return Figure(value, standard_error((tops - value * bottoms) * weight), sums * weight, decimals)


def by_group(values: Tensor, groups: Sequence[Any], which: Any) -> Tensor:
    """Values [N] of one group's images; NaN for those of others."""
    return torch.where(torch.tensor([group == which for group in groups]), values, math.nan)


def sums_by_kind(
    lists: Sequence[Sequence[float]], kinds: Sequence[Sequence[str]]
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Of each kind of question, in the order in which they come first: sum of values and number of each image.

    Args:
        lists: Of each of N images, a value of each of its questions.
        kinds: Of these questions, in the same order.

    Returns: By kind, two tensors [N] float64.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for i, (values, row) in enumerate(zip(lists, kinds, strict=True)):
        for value, kind in zip(values, row, strict=True):
            if kind not in found:
                found[kind] = torch.zeros(len(lists), dtype=torch.float64), torch.zeros(len(lists), dtype=torch.float64)
            sums, counts = found[kind]
            sums[i] += value
            counts[i] += 1
    return found
