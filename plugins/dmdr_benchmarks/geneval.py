"""GenEval: are the objects of a prompt there, in the right number, colour and place?"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, Layout, prompts_of
from dmdr.errors import ConfigError
from dmdr.prompts import read_prompts
from dmdr_benchmarks.detector import Colours, Detector, Found
from dmdr_benchmarks.figures import by_group
from dmdr_benchmarks.geneval_rules import TAGS, THRESHOLD, Row, check, kept, lacks, without_nulls


@dataclass
class GenEval:
    """GenEval: 553 prompts, four images each; an image is right or wrong.

    The rules are the published ones. The networks are not: the published detector, Mask2Former of mmdetection 2, cannot
    be installed any more. The one here is the same architecture, from another training run. Images come to it at the
    published size, and its answers are read in the published order of steps. Both networks run in float32.

    `overall` is the mean of the accuracies by tag. A tag that no prompt has is left out of it.

    Attributes:
        detector: A folder or hub id of a transformers `Mask2FormerForUniversalSegmentation` with COCO's 80 instance
            classes.
        detector_size: Shortest edge, in pixels, to which images are brought for the detector.
        colour_model: A folder or hub id of a transformers `CLIPModel`, which names the colours.
        chunk_size: Images that go through the detector at a time.

    Source: Ghosh et al. 2023, arXiv:2310.11513, and evaluation/evaluate_images.py of github.com/djghosh13/geneval.
    """

    images_per_prompt: ClassVar[int] = 4
    layout: ClassVar[Layout] = "samples"
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    detector_size: int = 800
    colour_model: str = "openai/clip-vit-large-patch14"
    chunk_size: int = 4

    def __post_init__(self) -> None:
        for name in ("detector_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    def about(self) -> str:
        """Which networks looked, and which did for the published numbers."""
        return (
            f"GenEval with the detector {self.detector} of transformers and colours by {self.colour_model}; published "
            "numbers are of mmdetection's Mask2Former and are not comparable in all digits."
        )

    def rows(self, prompts: str, column: str) -> list[dict[str, Any]]:
        """The rows of a file like `evaluation_metadata.jsonl`, in order; nulls are left out.

        Args:
            prompts: Its path, or the id of a dataset with the same columns.
            column: That of the prompts.

        Raises:
            ConfigError: If it cannot be read, or asks for something that GenEval does not know. Names file and row.
        """
        found = read_prompts(prompts, column=column, repeated=True).rows
        rows = [{name: without_nulls(value) for name, value in row.items() if value is not None} for row in found]
        for number, row in enumerate(rows, start=1):
            check(row, f"--prompts: {prompts} row {number}")
        return rows

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load detector and CLIP model, in float32 whatever `dtype` is.

        Raises:
            ConfigError: If one cannot be loaded.
        """
        self._detector = Detector(self.detector, self.detector_size, device)
        self._colours = Colours(self.colour_model, device)

    def answers(self, images: Tensor, rows: Sequence[Row]) -> dict[str, Tensor | list[str]]:
        """`correct` [B] float32, 1 where an image shows what its prompt asks for, and B texts: the `reason` why not.

        Args:
            images: [B, 3, H, W] float32 in [0, 1].
            rows: Of each image.
        """
        reasons: list[str] = []
        for part in images.split(self.chunk_size):
            for image, found in zip(part, self._detector(part, THRESHOLD), strict=True):
                row = rows[len(reasons)]

                def name_colours(objects: Sequence[Found], label: str, image: Tensor = image) -> Sequence[str]:
                    return self._colours(image, objects, label)

                reasons.append(lacks(row, kept(found, row["tag"]), name_colours))
        return {"correct": torch.tensor([float(not reason) for reason in reasons]), "reason": reasons}

    def figures(self, answers: Answers, rows: Sequence[Row], reference: Answers | None) -> dict[str, Figure]:
        """`overall` and the accuracy of each tag, in [0, 1].

        The standard error of `overall` is sqrt(sum of the tags' variances) / number of tags.
        """
        correct = answers.tensor("correct").whole().double()
        tags = [row["tag"] for row in rows]
        by_tag = {tag: Figure.mean(by_group(correct, tags, tag), rows) for tag in TAGS if tag in tags}
        value = sum(figure.value for figure in by_tag.values()) / len(by_tag)
        error = math.sqrt(sum(figure.error**2 for figure in by_tag.values())) / len(by_tag)
        # A prompt weighs so that the mean of all prompts is the mean of the tags' accuracies.
        count = Counter(tag for tag, _ in set(zip(tags, prompts_of(rows), strict=True)))
        weights = [count.total() / (len(count) * count[tag]) for tag in tags]
        values = correct * torch.tensor(weights, dtype=torch.float64)
        return {"overall": Figure(value, error, values, strata=tags), **by_tag}
