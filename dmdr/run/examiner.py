"""A benchmark in a run: it is asked about the images of each evaluation, in memory."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from dmdr.benchmarks import Benchmark, ComparesWithImages, Figure, KeptAnswers
from dmdr.errors import ConfigError
from dmdr.evaluation.answers import Given, after_each_other, answers_about
from dmdr.evaluation.pictures import batches, pictures_in
from dmdr.prompts import Row
from dmdr.run.device import failing_together, on_main_process, share_of, together

TEACHER = "teacher"  # what --reference_images may name
CHUNK = 32  # images at a time


class Examiner:
    """Asks a benchmark in all processes, each about a share; all must call each method together.

    Args:
        benchmark: Not prepared.
        title: What users call it.
        accelerator: The processes.
        draw_reference: Draws the images of the teacher that others are compared with, unless they are there; returns
            their folder. Called where --reference_images is 'teacher'.
    """

    def __init__(self, benchmark: Benchmark, title: str, accelerator: Any, draw_reference: Callable[[], Path]) -> None:
        self.benchmark, self.title, self.accelerator = benchmark, title, accelerator
        self._draw_reference = draw_reference

    def prepare(self, dtype: torch.dtype) -> None:
        """Load the benchmark's networks.

        Raises:
            ConfigError: If it refuses its settings.
        """
        with failing_together():
            try:
                self.benchmark.prepare(self.accelerator.device, dtype)
            except (OSError, ValueError) as error:
                raise ConfigError(f"benchmark '{self.title}': {error}") from error

    def __call__(self, pictures: Tensor, rows: Sequence[Row]) -> dict[str, Figure]:
        """The figures of an evaluation, by column.

        Args:
            pictures: This process's share of the images, [B, 3, H, W] in [0, 1] (`device.share_of`).
            rows: Of all images.
        """
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
        place = self.benchmark.compared_with() if isinstance(self.benchmark, ComparesWithImages) else None
        if place is None:
            return None
        folder = self._draw_reference() if place == TEACHER else Path(place)
        pictures = on_main_process(self.accelerator, lambda: pictures_in(folder))
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
