"""GenEval 2: does a model that sees the image answer questions about the prompt's parts as the prompt would?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, Layout
from dmdr.errors import ConfigError
from dmdr.prompts import read_prompts
from dmdr_benchmarks.figures import by_group, pooled, sums_by_kind
from dmdr_benchmarks.questions import AsksJudge, wordings

INSTRUCTION = " Answer in one word."

Row = Mapping[str, Any]


@dataclass
class GenEval2(AsksJudge):
    """GenEval 2 by Soft-TIFA: 800 prompts of 3 to 10 atoms, one image each.

    An atom is a question with its answer, such as a count or an attribute. Its value is the probability that the
    judge's answer begins as the right one does. A prompt's values are averaged: `am` is the arithmetic mean, `gm` the
    geometric mean, which is 0 if an atom's value is. Both are times 100. Beside them are the mean over all atoms of a
    skill, and `gm` over all prompts of an `atom_count`.

    The data of the benchmark are under CC BY-NC 4.0, not for commercial use. They are no part of this package.

    Deviates from the published scorer: a token that begins two wordings of an answer counts once, and several questions
    go through the judge at a time, which moves probabilities by rounding.

    Source: Kamath et al. 2025, arXiv:2512.16853, and github.com/facebookresearch/GenEval2.
    """

    images_per_prompt: ClassVar[int] = 1
    layout: ClassVar[Layout] = "flat"

    def about(self) -> str:
        """Who judged, and the licence of the questions."""
        return (
            f"GenEval 2 (data CC BY-NC 4.0) by Soft-TIFA with the judge {self.judge}; published numbers are of "
            "Qwen3-VL-8B-Instruct with transformers 4.57."
        )

    def rows(self, prompts: str, column: str) -> list[dict[str, Any]]:
        """The rows of a file like `geneval2_data.jsonl`, in order.

        Args:
            prompts: Its path, or the id of a dataset with the same columns.
            column: That of the prompts.

        Raises:
            ConfigError: If it cannot be read, or a row has no questions. Names file and row.
        """
        rows = read_prompts(prompts, column=column, repeated=True).rows
        for number, row in enumerate(rows, start=1):
            _check(row, f"--prompts: {prompts} row {number}")
        return list(rows)

    def answers(self, images: Tensor, rows: Sequence[Row]) -> dict[str, Tensor | list[str]]:
        """`am` and `gm`, [B] float64 in [0, 1], and B texts `atoms`: the values of the questions as a JSON list.

        Args:
            images: [B, 3, H, W] float32 in [0, 1].
            rows: Of each image.
        """
        asked = [(i, question + INSTRUCTION) for i, row in enumerate(rows) for question, _ in row["vqa_list"]]
        choices = [[wordings(answer)] for row in rows for _, answer in row["vqa_list"]]
        values = self._judge.first_token_probabilities(images, asked, choices)[:, 0]
        atoms = values.split([len(row["vqa_list"]) for row in rows])
        return {
            "am": torch.stack([of.mean() for of in atoms]),
            "gm": torch.stack([geometric_mean(of) for of in atoms]),
            "atoms": [json.dumps(of.tolist()) for of in atoms],
        }

    def figures(self, answers: Answers, rows: Sequence[Row], reference: Answers | None) -> dict[str, Figure]:
        """`gm` and `am`, then `am` of each skill and `gm` of each number of atoms, all in [0, 100]."""
        counts = [row["atom_count"] for row in rows]
        gm, am = (answers.tensor(name).whole().double() * 100 for name in ("gm", "am"))
        atoms = [[100 * value for value in json.loads(text)] for text in answers.texts("atoms")]
        skills = sums_by_kind(atoms, [row["skills"] for row in rows])
        return {
            "gm": Figure.mean(gm, rows, decimals=2),
            "am": Figure.mean(am, rows, decimals=2),
            **{skill: pooled(*sums, rows, decimals=2) for skill, sums in skills.items()},
            **{f"{n} atoms": Figure.mean(by_group(gm, counts, n), rows, decimals=2) for n in sorted(set(counts))},
        }


def geometric_mean(values: Tensor) -> Tensor:
    """Of values [N] of at least 0, a float64 scalar; 0 if one is."""
    return values.double().log().mean().exp()


def _check(row: Row, where: str) -> None:
    """Refuse a row whose questions cannot be asked.

    Raises:
        ConfigError: Names the place, and what it must hold.
    """
    asked, skills, count = row.get("vqa_list"), row.get("skills"), row.get("atom_count")
    pairs = isinstance(asked, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        for pair in asked
    )
    if not pairs or not asked:
        raise ConfigError(f"{where}: vqa_list must be a list of [question, answer], not {asked!r:.80}")
    if not isinstance(skills, list) or len(skills) != len(asked) or not all(isinstance(one, str) for one in skills):
        raise ConfigError(f"{where}: skills must name that of each of its {len(asked)} questions, not {skills!r:.80}")
    if type(count) is not int or count < 1:
        raise ConfigError(f"{where}: atom_count must be a whole number of at least 1, not {count!r:.80}")
