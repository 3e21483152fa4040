"""Rewards made of rewards: a weighted sum whose parts stay visible."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError, TrainingError
from dmdr.groups import judged
from dmdr.protocols import Reward


class RewardError(TrainingError):
    """A reward that failed, or broke its contract; one line that names it."""


class Rewards:
    """total = sum_k weight_k * score_k, itself a `Reward`.

    Attributes:
        parts: name -> (weight, reward), in the order of the sum.
        differentiable: Whether every part is.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Reward]]) -> None:
        """Check and keep the parts.

        Args:
            parts: At least one; weights are finite.

        Raises:
            ConfigError: If there is none.
        """
        if not parts:
            raise ConfigError("a sum of rewards needs at least one")
        self.parts = dict(parts)
        self.differentiable = all(reward.differentiable for _, reward in self.parts.values())

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights of every part, frozen.

        Raises:
            ConfigError: If a part refuses its settings or its checkpoint (a ValueError); names the reward.
        """
        for name, (_, reward) in self.parts.items():
            try:
                reward.prepare(device, dtype)
            except ValueError as error:
                raise ConfigError(f"reward '{name}': {_line(error)}") from error

    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        """Raw scores, before their weights.

        Args:
            images: [B, 3, H, W] float32 in [0, 1]; gradients flow back where a part is differentiable.
            prompts: B strings.
            columns: Further columns of the prompt rows, each of length B; every reward is given all of them.

        Returns:
            name -> [B] float32, higher is better. NaN marks a sample that a reward could not judge.

        Raises:
            RewardError: If a reward raises, or returns anything but [B] float32.
            ValueError: If prompts or a column are not as many as the images.
        """
        count = len(images)
        for name, column in {"prompts": prompts, **columns}.items():
            if len(column) != count:
                raise ValueError(f"{count} images, but {len(column)} {name}")
        scores: dict[str, Tensor] = {}
        for name, (_, reward) in self.parts.items():
            try:
                score = reward(images, prompts, **columns)
            except Exception as error:
                raise RewardError(f"reward '{name}' failed: {type(error).__name__}: {_line(error)}") from error
            if not isinstance(score, Tensor) or score.shape != (count,) or score.dtype != torch.float32:
                got = f"{score.dtype} {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
                raise RewardError(f"reward '{name}' returned {got}; expected torch.float32 [{count}]")
            scores[name] = score
        return scores

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what `each` returned, [B] float32; NaN where any part is."""
        return torch.stack([weight * scores[name] for name, (weight, _) in self.parts.items()]).sum(0)

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """`total(each(...))`, [B] float32."""
        return self.total(self.each(images, prompts, **columns))

    @staticmethod
    def require_finite(scores: Mapping[str, Tensor]) -> None:
        """Stop on rewards that have judged nothing.

        Args:
            scores: name -> scores of the global batch: one process alone may well hold no finite one.

        Raises:
            RewardError: If a reward has no finite score, which it names, or no sample has one of every reward.
        """
        for name, score in scores.items():
            if not score.isfinite().any():
                raise RewardError(f"reward '{name}' has no finite score among the {score.numel()} of the global batch")
        if not judged(scores).any():
            raise RewardError(f"no sample of the global batch has a finite score of every reward: {', '.join(scores)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
