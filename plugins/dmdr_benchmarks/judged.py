"""What the judge of a named model says: the evaluation of a run, for what is no run any more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, Layout
from dmdr.errors import ConfigError
from dmdr.metrics import NEIGHBOURS, Moments, frechet_distance_of_moments, inception_score, neighbours
from dmdr.prompts import read_prompts, split_columns
from dmdr.protocols import Judge, NamedModel, RewardSum

CHUNK = 128  # of the judge's own images at a time


@dataclass
class Judged:
    """Accuracy, Frechet distance, precision, recall and inception score by the judge of --model, and rewards.

    They are the metrics that a run evaluates its student by. Without --prompts, the prompts are the model's own.
    """

    images_per_prompt: ClassVar[int] = 2
    layout: ClassVar[Layout] = "flat"
    reward: ClassVar[str] = "none"

    def ask(self, model: NamedModel | None) -> None:
        judge = model.judge() if model else None
        if model is None or judge is None:
            raise ConfigError("benchmark 'judge' needs a model that brings a judge: --model digits")
        self._model, self._judge = model, judge
        self._rewards: RewardSum | None = None

    def use(self, rewards: RewardSum) -> None:
        self._rewards = rewards

    def about(self) -> str:
        real = len(self._judge.reference())
        means = "accuracy and rewards, which are raw, are means over prompts"
        return f"By {type(self._judge).__name__}, against {real:,} real images; {means}."

    def rows(self, prompts: str, column: str) -> Sequence[Mapping[str, Any]]:
        return read_prompts(prompts, column=column, repeated=True).rows

    def own_rows(self) -> Sequence[Mapping[str, Any]]:
        """As `dmdr.benchmarks.BringsRows`."""
        return self._model.prompts()

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device  # the judge is loaded, and it goes where the images are

    def answers(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor | Sequence[str]]:
        prompts, columns = split_columns([dict(row) for row in rows])
        judge: Judge = self._judge
        found = {"accuracy": judge.correct(images, prompts), "features": judge.features(images)}
        found["embedding"] = judge.embed(images)
        if hasattr(judge, "probabilities"):
            found["probabilities"] = judge.probabilities(images)
        if self._rewards:
            scores = self._rewards.each(images, prompts, **columns)
            total = {"reward/total": self._rewards.total(scores)} if len(scores) > 1 else {}
            found |= {f"reward/{name}": value for name, value in scores.items()} | total
        return found

    def figures(
        self, answers: Answers, rows: Sequence[Mapping[str, Any]], reference: Answers | None
    ) -> Mapping[str, Figure]:
        found = {"accuracy": Figure.mean(answers.tensor("accuracy").whole(), rows)}
        real = self._judge.reference()
        if min(len(answers), len(real)) > NEIGHBOURS:
            features, points = (
                torch.cat([look(part.to(self._device)).cpu() for part in real.split(CHUNK)])
                for look in (self._judge.features, self._judge.embed)
            )
            near = neighbours(points, answers.tensor("embedding"), device=self._device)
            distance = frechet_distance_of_moments(Moments.of(features), Moments.of(answers.tensor("features")))
            found |= {"frechet_distance": Figure(distance, decimals=2)}
            found |= {"precision": Figure(near.precision), "recall": Figure(near.recall)}
        if hasattr(self._judge, "probabilities"):
            found["inception_score"] = Figure(inception_score(answers.tensor("probabilities")), decimals=2)
        names: list[str] = list(self._rewards.parts) if self._rewards else []
        for name in [*names, *(["total"] if len(names) > 1 else [])]:
            found[f"reward/{name}"] = Figure.mean(answers.tensor(f"reward/{name}").whole(), rows)
        return found
