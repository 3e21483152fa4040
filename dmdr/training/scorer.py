"""Rewards of a rollout's finished images, on all processes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from dmdr.groups import scored
from dmdr.protocols import Backend
from dmdr.rewards import RewardError, Rewards
from dmdr.training.phases import gather, phase
from dmdr.types import Condition, Rollout

logger = logging.getLogger("dmdr")
PATIENCE = 10  # batches in a row without a scored sample, before the run stops: a small one may have none by chance


class Scores(NamedTuple):
    """Raw rewards by name, float32; NaN where one could not score.

    Attributes:
        own: Of this process's samples, each [B].
        everyone: Of the global batch, each [N]; row i is the sample of index i.
        group: Group of each sample of the global batch, [N] int64.
    """

    own: dict[str, Tensor]
    everyone: dict[str, Tensor]
    group: Tensor


@dataclass
class RolloutScorer:
    """Decodes and scores rollouts, and stops a run whose rewards score nothing.

    Attributes:
        rewards: The run's rewards, prepared.
        micro_batch_size: Images that are decoded and scored at a time.
        silent: Batches in a row that no reward could score.
        warned: Rewards that have left a sample without a score.
    """

    rewards: Rewards
    backend: Backend
    accelerator: Accelerator
    micro_batch_size: int
    silent: int = 0
    warned: set[str] = field(default_factory=set)

    @phase("reward")
    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Scores:
        """The scores of its finished images.

        Raises:
            RewardError: In all processes where a reward fails in one, or where none has scored a batch for PATIENCE
                batches.
        """
        scores: dict[str, list[Tensor]] = {name: [] for name in self.rewards.parts}
        failure: RewardError | None = None
        try:
            for start in range(0, len(rollout.cond), self.micro_batch_size):
                part = slice(start, start + self.micro_batch_size)
                found = self.rewards.each_of(rollout.final[part], rollout.cond[part], self.backend)
                for name, score in found.items():
                    scores[name].append(score)
        except RewardError as error:
            failure = error
        failed = torch.tensor([failure is not None], device=rollout.final.device)
        if gather(self.accelerator, failed).any():  # all processes stop, and the main one saves
            raise failure or RewardError("a reward failed in another process")
        own = {name: torch.cat(score) for name, score in scores.items()}
        everyone = {name: gather(self.accelerator, score) for name, score in own.items()}
        self.silent = 0 if scored(everyone).any() else self.silent + 1
        if self.silent >= PATIENCE:
            self.rewards.require_finite(everyone)
        return Scores(own, everyone, gather(self.accelerator, rollout.group))

    def means(self, scores: Scores) -> dict[str, Tensor]:
        """Mean rewards of the global batch, over the finite scores: raw and weighted by name, and their total."""
        finite = {name: torch.where(s.isfinite(), s, torch.nan) for name, s in scores.everyone.items()}
        means = {name: score.nanmean() for name, score in finite.items()}
        line = {f"reward/{name}": mean for name, mean in means.items()}
        weights = self.rewards.weights
        line |= {f"reward_weighted/{name}": weights[name] * mean.double() for name, mean in means.items()}
        return line | {"reward/total": self.rewards.total(finite).nanmean()}

    def warn(self, line: Mapping[str, float], step: int) -> None:
        """Say of each reward the first time that it left images without a score; the log counts on."""
        for name in self.rewards.parts:
            count = line.get(f"unscored/{name}", 0)
            if count and name not in self.warned:
                self.warned.add(name)
                if self.accelerator.is_main_process:
                    what = "left %d images of step %d without a finite score; the log counts such images as unscored/%s"
                    logger.warning(f"the reward '%s' {what}", name, count, step, name)


class Watched(Rewards):
    """The same rewards, as objectives ask them; `see` is shown all scores."""

    def __init__(self, rewards: Rewards, see: Callable[[Mapping[str, Tensor]], None]) -> None:
        super().__init__(rewards.parts)
        self.see = see

    @phase("reward")
    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        scores = super().each(images, prompts, **columns)
        self.see(scores)
        return scores

    @phase("reward")
    def each_of(
        self, latents: Tensor, cond: Condition, backend: Backend, images: Tensor | None = None
    ) -> dict[str, Tensor]:
        scores = super().each_of(latents, cond, backend, images)
        self.see(scores)
        return scores
