"""All metrics of a set of images that a run draws: what its judge and its rewards say of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dmdr.metrics import NEIGHBOURS, frechet_distance, inception_score, neighbours
from dmdr.protocols import Judge
from dmdr.rewards import RewardError


class Scorer(Protocol):
    """What `evaluate` asks of the run's rewards (`dmdr.rewards.Rewards`)."""

    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        """Raw reward by name, each [B]."""

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum, [B]."""


@dataclass(frozen=True)
class Evaluation:
    """What there is to say of a set of images.

    Attributes:
        metrics: By name.
        totals: Weighted sum of the rewards of each image, [N], under `reward` and `eval_reward`, where there are such.
    """

    metrics: dict[str, float]
    totals: dict[str, Tensor]


@torch.no_grad()
def evaluate(
    images: Tensor,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    judge: Judge | None,
    rewards: Scorer | None,
    eval_rewards: Scorer | None = None,
    *,
    chunk: int = 128,
    device: torch.device | None = None,
    together: Callable[[Tensor], Tensor] = lambda values: values,
) -> Evaluation:
    """All metrics of one set of images: a column of the metric table.

    With a judge: `accuracy` in [0, 1], `frechet_distance` of `judge.features`, `precision` and `recall` of
    `judge.embed`, each against all of `judge.reference()`; the last three are left out of an evaluation of k = 3 images
    or fewer, where they mean nothing; `inception_score` in [1, C], of a judge that has `probabilities`. With rewards:
    `reward/<name>` and `reward/total`, means over the images whose reward is finite (NaN where none is); the same under
    `eval_reward/` for those that only measure.

    Args:
        images: [B, 3, H, W] float32 in [0, 1], B >= 1.
        prompts: What each image shall show, B strings.
        columns: Further columns of the prompt rows, each of length B.
        judge: The model's independent eye, or None.
        rewards, eval_rewards: The run's rewards, and those that only measure, or None.
        chunk: Images that the judge and the rewards see at a time.
        device: Where they are seen; where `images` lie by default.
        together: Where several processes each have a share of the images: their values, [B, ...] -> [all, ...].

    Raises:
        ValueError: There is no image, or the lengths differ.
        RewardError: In all processes, if a reward fails in one.
    """
    lengths = {"prompts": len(prompts)} | {name: len(column) for name, column in columns.items()}
    wrong = [f"{length} {name}" for name, length in lengths.items() if length != len(images)]
    if len(images) == 0 or wrong:
        raise ValueError(f"{len(images)} images to evaluate" + "".join(f", {text}" for text in wrong))
    device = images.device if device is None else device
    starts = range(0, len(images), chunk)
    metrics: dict[str, float] = {}
    totals: dict[str, Tensor] = {}

    if judge is not None:
        parts = [judge.correct(images[i : i + chunk].to(device), prompts[i : i + chunk]).float().cpu() for i in starts]
        correct = together(torch.cat(parts))
        metrics["accuracy"] = correct.mean().item()
        if hasattr(judge, "probabilities"):
            metrics["inception_score"] = inception_score(together(_map(judge.probabilities, images, chunk, device)))
        real = judge.reference()
        if min(len(correct), len(real)) > NEIGHBOURS:
            features, points = (
                [_map(function, real, chunk, device), together(_map(function, images, chunk, device))]
                for function in (judge.features, judge.embed)
            )
            metrics["frechet_distance"] = frechet_distance(features[0], features[1])
            near = neighbours(points[0], points[1])
            metrics["precision"], metrics["recall"] = near.precision, near.recall

    for kind, scorer in (("reward", rewards), ("eval_reward", eval_rewards)):
        if scorer is None:
            continue
        scored, failure = [], None
        try:
            for i in starts:
                row = {name: column[i : i + chunk] for name, column in columns.items()}
                scored.append(scorer.each(images[i : i + chunk].to(device), prompts[i : i + chunk], **row))
        except RewardError as error:  # the others would wait for this process
            failure = error
        if together(torch.full((len(images),), failure is not None)).any():
            raise failure or RewardError("a reward failed in another process")
        # The total is taken of all images at once, in case it depends on the statistics of its batch.
        scores = {name: together(torch.cat([part[name] for part in scored])) for name in scored[0]}
        metrics |= {f"{kind}/{name}": _finite_mean(values) for name, values in scores.items()}
        totals[kind] = scorer.total(scores)
        metrics[f"{kind}/total"] = _finite_mean(totals[kind])
    return Evaluation(metrics, totals)


def _map(function: Callable[[Tensor], Tensor], images: Tensor, chunk: int, device: torch.device) -> Tensor:
    """`function` of all images, chunk by chunk on `device`; the result on the CPU."""
    return torch.cat([function(part.to(device)).float().cpu() for part in images.split(chunk)])


def _finite_mean(values: Tensor) -> float:
    values = values.cpu().double()
    return values[values.isfinite()].mean().item()
