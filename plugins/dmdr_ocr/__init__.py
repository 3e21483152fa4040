"""Text in images: a reward and a benchmark that read it and compare it with what the prompt quotes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, Layout
from dmdr.errors import ConfigError
from dmdr.prompts import read_prompts
from dmdr_ocr.reader import Reader, engine
from dmdr_ocr.rules import Agreement, agreement, target_of

__all__ = ["OCR", "Agreement", "OCRAccuracy", "Reader", "agreement", "target_of"]


@dataclass
class _Reading:
    """What the reward and the benchmark share.

    Attributes:
        ocr_threads: Threads of each process that read an image.
    """

    ocr_threads: int = 1

    def __post_init__(self) -> None:
        if self.ocr_threads < 1:
            raise ConfigError(f"ocr_threads must be at least 1, not {self.ocr_threads}")
        self._reader: Reader | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the networks, on the CPU and in float32 whatever `device` and `dtype` are.

        Raises:
            ConfigError: If rapidocr or onnxruntime is not installed, or the networks cannot be loaded.
        """
        self._reader = Reader(self.ocr_threads)

    def _read(self, images: Tensor) -> list[str]:
        if self._reader is None:
            raise RuntimeError(f"{type(self).__name__} has no weights yet; call prepare(device, dtype) first")
        return self._reader.read(images)


@dataclass
class OCR(_Reading):
    """How well the text in an image is the one that the prompt has between double quotes, in [0, 1].

    The target is the text between the first pair of straight quotes, or else of curly ones. Rows with a column `text`
    have their target there; where it is None or blank, the quotes count. Without a target there is no score (NaN). The
    images are read on the CPU, at 0.4 s each on one core.

    A run on this reward alone can empty the images of all but text: add a reward of quality.

    Attributes:
        rule: "published" is Flow-GRPO's, which gives 1 to every text that contains the target: further text is free.
            "strict" takes off for each letter too many.

    Source: Flow-GRPO (Liu et al. 2025, arXiv:2505.05470). Deviates: its reader is PaddleOCR 2.9.1, to which it gives
        red and blue swapped.
    """

    differentiable = False  # not annotated, hence no flag
    rule: Literal["published", "strict"] = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("published", "strict"):
            raise ConfigError(f"rule must be 'published' or 'strict', not {self.rule!r}")

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] float32 in [0, 1], B prompts, optionally the column `text` -> [B] float32 in [0, 1] or NaN.

        Raises:
            ConfigError: If the column `text` holds something other than text.
        """
        targets = list(map(target_of, prompts, columns.get("text", [None] * len(prompts))))
        asked = [i for i, target in enumerate(targets) if target is not None]  # reading the others would take long
        scores = torch.full((len(images),), math.nan)
        for i, read in zip(asked, self._read(images[asked]), strict=True):
            scores[i] = getattr(agreement(read, targets[i]), self.rule)
        return scores.to(images.device)


@dataclass
class OCRAccuracy(_Reading):
    """OCR accuracy, the visual text rendering benchmark of Flow-GRPO: does the image show the text that was asked for?

    Its prompts are `dataset/ocr/test.txt` of github.com/yifan123/flow_grpo, or any others with a text between double
    quotes or in a column `text`; see `OCR`. Beside the published score, under which further text is free, there are a
    strict one and the share of exact matches. Case and spaces never count.

    Source: Flow-GRPO (Liu et al. 2025, arXiv:2505.05470). Deviates as `OCR` does.
    """

    images_per_prompt: ClassVar[int] = 1
    layout: ClassVar[Layout] = "flat"

    def about(self) -> str:
        """What read the images.

        Raises:
            ConfigError: If rapidocr or onnxruntime is not installed.
        """
        return f"Text was read by {engine()}. Published numbers were read by PaddleOCR 2.9.1: they differ."

    def rows(self, prompts: str, column: str) -> Sequence[Mapping[str, Any]]:
        """All rows of a prompt file or dataset, as often as they are there.

        Args:
            prompts: Path or hub id (--prompts).
            column: Column that holds the prompts.

        Raises:
            ConfigError: If it cannot be read, or a row has no target; names the row, counted without blank lines.
        """
        rows = read_prompts(prompts, repeated=True, column=column).rows
        for number, row in enumerate(rows, 1):
            try:
                target = target_of(row["prompt"], row.get("text"))
            except ConfigError as error:
                raise ConfigError(f"--prompts: {prompts}: row {number}: {error}") from error
            if target is None:
                what = "has no text between double quotes, nor one in a column 'text', for the image to show"
                raise ConfigError(f"--prompts: {prompts}: row {number} {what}: {row['prompt']!r:.80}")
        return rows

    def answers(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor | Sequence[str]]:
        """Of images [B, 3, H, W] in [0, 1]: `score` (published), `strict` and `exact`, each [B] float64; `read`."""
        texts = self._read(images)
        found = [
            agreement(text, target_of(row["prompt"], row.get("text"))) for text, row in zip(texts, rows, strict=True)
        ]
        score, strict, exact = torch.tensor(found, dtype=torch.float64).reshape(-1, 3).unbind(1)
        return {"score": score, "strict": strict, "exact": exact, "read": texts}

    def figures(
        self, answers: Answers, rows: Sequence[Mapping[str, Any]], reference: Answers | None
    ) -> Mapping[str, Figure]:
        """Means over the prompts, in [0, 1], with their standard errors."""
        names = {"OCR accuracy": "score", "strict": "strict", "exact match": "exact"}
        return {title: Figure.mean(answers.tensor(name).whole(), rows) for title, name in names.items()}
