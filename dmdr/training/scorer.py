"""Rewards of a rollout's finished images, on all processes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from dmdr.groups import scored
from dmdr.protocols import Backend
from dmdr.rewards import RewardError, Rewards
from dmdr.types import Rollout

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
    """

    rewards: Rewards
    backend: Backend
    accelerator: Accelerator
    micro_batch_size: int
    silent: int = 0

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
                images, cond = self.backend.decode(rollout.final[part]), rollout.cond[part]
                for name, score in self.rewards.each(images, cond.prompts, **cond.columns).items():
                    scores[name].append(score)
        except RewardError as error:
            failure = error
        failed = torch.tensor([failure is not None], device=rollout.final.device)
        if self.accelerator.gather(failed).any():  # all processes stop, and the main one saves
            raise failure or RewardError("a reward failed in another process")
        own = {name: torch.cat(score) for name, score in scores.items()}
        everyone = {name: self.accelerator.gather(score) for name, score in own.items()}
        self.silent = 0 if scored(everyone).any() else self.silent + 1
        if self.silent >= PATIENCE:
            self.rewards.require_finite(everyone)
        return Scores(own, everyone, self.accelerator.gather(rollout.group))
