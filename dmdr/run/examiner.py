"""A benchmark in a run: it is asked about the images of each evaluation, in memory."""

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from dmdr.benchmarks import AsksTheModel, Benchmark, ComparesWithImages, Figure, KeptAnswers, ScoresByRewards
from dmdr.errors import ConfigError
from dmdr.evaluation import answers
from dmdr.evaluation.answers import Given, after_each_other, answers_about
from dmdr.evaluation.pictures import batches, pictures_in
from dmdr.prompts import Row
from dmdr.protocols import NamedModel
from dmdr.run.device import failing_together, on_main_process, share_of, together

TEACHER = "teacher"  # what stands for a run's teacher, in place of a folder
CHUNK = 32  # images at a time


class Examiner:
    """Asks a benchmark in all processes, each about a share; all must call each method together.

    Args:
        benchmark: Not prepared.
        title: What users call it.
        accelerator: The processes.
        rows: Prompt rows of all images of an evaluation.
        draw_reference: Draws the images of the teacher that others are compared with, unless they are there; returns
            their folder. Called where --reference_images is 'teacher'.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        title: str,
        accelerator: Any,
        rows: Sequence[Row],
        draw_reference: Callable[[], Path],
    ) -> None:
        self.benchmark, self.title, self.accelerator, self.rows = benchmark, title, accelerator, rows
        self._draw_reference = draw_reference

    def prepare(self, model: NamedModel | None, dtype: torch.dtype) -> None:
        """Refuse what no evaluation could be made with, and load the benchmark's networks.

        Args:
            model: The run's, if it has a name.
            dtype: Of the networks.

        Raises:
            ConfigError: If the benchmark cannot do with the run's prompts, its settings or the other images.
        """
        if isinstance(self.benchmark, ScoresByRewards):
            what = "scores by rewards, which an evaluation measures anyway (--eval_reward), as what a judge sees"
            raise ConfigError(f"--eval_benchmark {self.title} {what}")
        with failing_together():
            if isinstance(self.benchmark, AsksTheModel):
                self.benchmark.ask(model)
        self.rows = on_main_process(self.accelerator, self._read_rows)
        place = self._place
        if place not in (None, TEACHER):
            on_main_process(self.accelerator, lambda: len(pictures_in(place)))
        with failing_together():
            answers.prepare(self.benchmark, self.title, self.accelerator.device, dtype)

    def _read_rows(self) -> list[Row]:
        """The rows as the benchmark reads them from a file, where it refuses those that it can ask nothing about."""
        lines = [json.dumps(row, default=str) + "\n" for row in self.rows]
        distinct = list(dict.fromkeys(lines))
        with TemporaryDirectory() as folder:
            file = Path(folder) / "prompts.jsonl"
            file.write_text("".join(distinct), encoding="utf-8")
            try:
                found = [dict(row) for row in self.benchmark.rows(str(file), "prompt")]
            except ConfigError as error:
                said = str(error).replace(f"--prompts: {file}", "the run's prompts")
                raise ConfigError(f"--eval_benchmark {self.title}: {said}") from error
        if len(found) != len(distinct):
            what = f"reads {len(found)} of {len(distinct)} prompts of the run"
            raise ConfigError(f"--eval_benchmark {self.title} {what}; use dmdr-eval after the run")
        known = dict(zip(distinct, found, strict=True))
        return [known[line] for line in lines]

    @cached_property
    def _place(self) -> str | None:
        """Of the images that others are compared with."""
        return self.benchmark.compared_with() if isinstance(self.benchmark, ComparesWithImages) else None

    def __call__(self, pictures: Tensor) -> dict[str, Figure]:
        """The figures of an evaluation, by column.

        Args:
            pictures: This process's share of the images, [B, 3, H, W] in [0, 1] (`device.share_of`).
        """
        rows = self.rows
        own = [rows[index] for index in share_of(self.accelerator, len(rows))]
        # 8 bits, as of files: so that a benchmark says the same after the run
        seen = (pictures.clamp(0, 1) * 255).round() / 255
        with failing_together():
            parts = [
                answers_about(
                    self.benchmark, self.title, seen[i : i + CHUNK].to(self.accelerator.device), own[i : i + CHUNK]
                )
                for i in range(0, len(own), CHUNK)
            ]
        held, reference = self._everyones(after_each_other(parts), len(rows)), self._reference
        return on_main_process(self.accelerator, lambda: dict(self.benchmark.figures(held, rows, reference)))

    @cached_property
    def _reference(self) -> KeptAnswers | None:
        """The answers about the images that others are compared with."""
        if self._place is None:
            return None
        place = self._draw_reference() if self._place == TEACHER else self._place
        pictures = on_main_process(self.accelerator, lambda: pictures_in(place))
        own = share_of(self.accelerator, len(pictures))
        with failing_together():
            parts = [
                answers_about(
                    self.benchmark,
                    self.title,
                    pixels.to(self.accelerator.device).float() / 255,
                    [{"prompt": ""}] * len(pixels),
                )
                for _, pixels in batches(pictures, own, CHUNK)
            ]
        return self._everyones(after_each_other(parts), len(pictures))

    def _everyones(self, given: Given, count: int) -> KeptAnswers:
        """The answers of all processes' shares of so many images."""
        joined: dict[str, Any] = {}
        for name, value in given.items():
            if isinstance(value, Tensor):
                joined[name] = together(self.accelerator, value, count)
            else:
                joined[name] = gather_object(list(value))[:count]
        return KeptAnswers(joined)


def numbers(title: str, figures: dict[str, Figure]) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors of figures, by the names of metrics; without errors that are not known."""
    values = {f"{title}/{name}": figure.value for name, figure in figures.items()}
    errors = {f"{title}/{name}": one.error for name, one in figures.items() if math.isfinite(one.error)}
    return values, errors
