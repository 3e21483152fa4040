"""GenEval 2: does a model that sees the image answer questions about the prompt's parts as the prompt would?

The benchmark, and a reward that asks the same of any prompts with such questions.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, Layout
from dmdr.errors import ConfigError
from dmdr.prompts import read_prompts
from dmdr_benchmarks.figures import by_group, pooled, sums_by_kind
from dmdr_benchmarks.questions import AsksJudge, Judge, wordings

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
        atoms = atoms_of(self._judge, images, [row["vqa_list"] for row in rows])
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


@dataclass
class GenEval2Reward(AsksJudge):
    """How probable a vision-language model finds the right answers to questions about an image, in [0, 1].

    The prompts need a column `vqa_list`, as in `geneval2_data.jsonl`: a list of questions, each with its answer in one
    word, `[["How many mugs are in the image?", "three"], ["Are the mugs blue?", "Yes"]]`. An image whose row has none
    there has no score (NaN). The data of GenEval 2 are under CC BY-NC 4.0; who trains on them cannot evaluate on them.

    Attributes:
        mean: Of the questions of an image: "arithmetic", or "geometric", for which one wrong answer spoils all.

    Source: Kamath et al. 2025, arXiv:2512.16853 (Soft-TIFA). Deviates as the benchmark `geneval2` does.
    """

    differentiable = False  # not annotated, hence no flag; nor is the next
    columns = ("vqa_list",)
    mean: Literal["arithmetic", "geometric"] = "arithmetic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean not in ("arithmetic", "geometric"):
            raise ConfigError(f"mean must be 'arithmetic' or 'geometric', not {self.mean!r}")

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] float32 in [0, 1] and the column `vqa_list` -> [B] float32 in [0, 1], NaN without questions.

        Raises:
            ConfigError: If a row has something else in the column.
        """
        rows = columns["vqa_list"]
        for row in rows:
            if row is not None and not _are_questions(row):
                raise ConfigError(f"the column vqa_list must hold lists of [question, answer], not {row!r:.80}")
        asked = [i for i, row in enumerate(rows) if row is not None]
        scores = torch.full((len(images),), math.nan)
        if asked:
            mean = torch.mean if self.mean == "arithmetic" else geometric_mean
            atoms = atoms_of(self._judge, images[asked], [rows[i] for i in asked])
            scores[asked] = torch.stack([mean(of) for of in atoms]).float()
        return scores.to(images.device)


def atoms_of(judge: Judge, images: Tensor, asked: Sequence[Sequence[Sequence[str]]]) -> tuple[Tensor, ...]:
    """How probable the right answers are.

    Args:
        judge: Who is asked.
        images: [B, 3, H, W] in [0, 1].
        asked: Of each image, [question, answer] pairs.

    Returns: Of each image, its values [N] float64 in [0, 1] on the CPU.
    """
    questions = [(i, question + INSTRUCTION) for i, pairs in enumerate(asked) for question, _ in pairs]
    choices = [[wordings(answer)] for pairs in asked for _, answer in pairs]
    values = judge.first_token_probabilities(images, questions, choices)[:, 0]
    return values.split([len(pairs) for pairs in asked])


def geometric_mean(values: Tensor) -> Tensor:
    """Of values [N] of at least 0, a float64 scalar; 0 if one is."""
    return values.double().log().mean().exp()


def _check(row: Row, where: str) -> None:
    """Refuse a row whose questions cannot be asked.

    Raises:
        ConfigError: Names the place, and what it must hold.
    """
    asked, skills, count = row.get("vqa_list"), row.get("skills"), row.get("atom_count")
    if not _are_questions(asked):
        raise ConfigError(f"{where}: vqa_list must be a list of [question, answer], not {asked!r:.80}")
    if not isinstance(skills, list) or len(skills) != len(asked) or not all(isinstance(one, str) for one in skills):
        raise ConfigError(f"{where}: skills must name that of each of its {len(asked)} questions, not {skills!r:.80}")
    if type(count) is not int or count < 1:
        raise ConfigError(f"{where}: atom_count must be a whole number of at least 1, not {count!r:.80}")


def _are_questions(asked: Any) -> TypeGuard[list[list[str]]]:
    return (
        isinstance(asked, list)
        and bool(asked)
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
            for pair in asked
        )
    )
