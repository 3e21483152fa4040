"""A benchmark for DMDR: what is asked about images, and the figures that come of the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, Layout
from dmdr.prompts import read_prompts

__all__ = ["Brightness"]


@dataclass
class Brightness:
    """How bright images are, and how many are dark.

    The text under Attributes is what `dmdr-eval --benchmark brightness --help` says of the flags.

    Attributes:
        dark: An image with a lower mean than this is dark; in [0, 1].
    """

    images_per_prompt: ClassVar[int] = 2
    layout: ClassVar[Layout] = "flat"  # 0000.png, 0001.png, ...
    reads_prompts: ClassVar[bool] = False  # a folder of images needs none
    dark: float = 0.25

    def about(self) -> str:
        """The sentence over the table."""
        return f"Mean of all pixels, and share of images whose mean is below {self.dark}."

    def rows(self, prompts: str, column: str) -> Sequence[Mapping[str, Any]]:
        """The rows of --prompts, one a prompt; where a benchmark refuses a row that it can ask nothing about."""
        return read_prompts(prompts, column=column, repeated=True).rows

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Where a benchmark loads its networks, frozen, onto the device; this one has none."""

    def answers(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor | Sequence[str]]:
        """[B, 3, H, W] float32 in [0, 1] and B rows -> tensors [B, ...] or B texts, which are kept on disk."""
        return {"level": images.mean((1, 2, 3))}

    def figures(
        self, answers: Answers, rows: Sequence[Mapping[str, Any]], reference: Answers | None
    ) -> Mapping[str, Figure]:
        """The cells of the table, from the answers about all N images; `Figure.mean` adds standard errors."""
        level = answers.tensor("level").whole()  # [N]
        return {"mean": Figure.mean(level, rows), "share of dark": Figure.mean((level < self.dark).double(), rows)}
