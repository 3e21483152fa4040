"""The preference table: what reward models say of images, in the scales that papers print."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, Layout
from dmdr.prompts import read_prompts, split_columns
from dmdr.protocols import RewardSum


@dataclass
class Preference:
    """Mean rewards over prompts: by default the five of the DMDR paper and its successors (arXiv 2511.13649, table 1).

    A reward with an attribute `printed_times` is multiplied by it: cosines are printed times 100.
    """

    images_per_prompt: ClassVar[int] = 1
    layout: ClassVar[Layout] = "flat"
    reads_prompts: ClassVar[bool] = False  # only its rewards do
    reward: ClassVar[str] = "clip+aesthetic+pickscore+hps+imagereward"

    def use(self, rewards: RewardSum) -> None:
        self._rewards = rewards

    def about(self) -> str:
        times = {name: _times(reward) for name, (_, reward) in self._rewards.parts.items()}
        scaled = ", ".join(f"{name} times {times[name]:g}" for name in times if times[name] != 1)
        return f"Mean rewards over prompts, and their standard errors{f'; {scaled}' if scaled else ''}."

    def rows(self, prompts: str, column: str) -> Sequence[Mapping[str, Any]]:
        return read_prompts(prompts, column=column, repeated=True).rows

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing: the rewards are loaded."""

    def answers(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor | Sequence[str]]:
        prompts, columns = split_columns([dict(row) for row in rows])
        scores = self._rewards.each(images, prompts, **columns)
        weighted = any(weight != 1 for weight in self._rewards.weights.values())
        return scores | ({"total": self._rewards.total(scores)} if weighted else {})

    def figures(
        self, answers: Answers, rows: Sequence[Mapping[str, Any]], reference: Answers | None
    ) -> Mapping[str, Figure]:
        parts = self._rewards.parts
        times = {name: _times(reward) for name, (_, reward) in parts.items()}
        if any(weight != 1 for weight in self._rewards.weights.values()):
            times["total"] = 1.0
        return {name: Figure.mean(times[name] * answers.tensor(name).whole().double(), rows) for name in times}


def _times(reward: object) -> float:
    return float(getattr(reward, "printed_times", 1.0))
