"""DPG-Bench: does the image hold all that a long prompt says, by yes-or-no questions that depend on each other?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, Layout
from dmdr.errors import ConfigError
from dmdr.prompts import read_prompts
from dmdr_benchmarks.figures import pooled, sums_by_kind
from dmdr_benchmarks.questions import AsksJudge, wordings

INSTRUCTION = " Answer yes or no."
COLUMNS = ("item_id", "proposition_id", "dependency", "category_broad", "question_natural_language")

Row = Mapping[str, Any]


@dataclass
class DPG(AsksJudge):
    """DPG-Bench: 1,065 long prompts, four images each, and a tree of yes-or-no questions about each prompt.

    A question counts 1 if the judge finds yes more probable than no. It counts 0 if one that it depends on does, in
    the order of the file. An image is the mean of its questions; `dpg` is 100 times the mean of the images. The
    categories are 100 times the mean of the judge's answers before questions depend on each other, as published.

    Deviates from the published scorer, whose judge mPLUG-large does not run with a current transformers: numbers of
    other judges are not comparable. The published scorer leaves out the first question of its file; here it counts. It
    takes the categories from the last image of each prompt alone; here from all. It takes them off the column `tuple`;
    here they are the column `category_broad`. It skips an item that fails, such as one with a question that depends on
    an unknown one; here only this dependence is ignored.

    Source: Hu et al. 2024, arXiv:2403.05135, and dpg_bench/compute_dpg_bench.py of github.com/TencentQQGYLab/ELLA.
    """

    images_per_prompt: ClassVar[int] = 4
    layout: ClassVar[Layout] = "grids"

    def about(self) -> str:
        """Who judged, and who did for the published numbers."""
        return (
            f"DPG-Bench with the judge {self.judge}; published numbers are of mPLUG-large and are not comparable. "
            "Categories are of all images, before questions depend on each other."
        )

    def rows(self, prompts: str, column: str) -> list[dict[str, Any]]:
        """A row of each item of a file like `dpg_bench.csv`, in the order in which they come first.

        Its fields are `prompt` (the column `text`), `item_id`, and lists of its questions: `questions`, `parents`
        (indices of those that each depends on) and `categories`. Of questions with one number the last counts, as in
        the published scorer. A .jsonl file holds such rows themselves, as they are written beside images.

        Args:
            prompts: Path of the file, or the id of a dataset with the same columns.
            column: That of the prompts; `prompt`, the default, stands for the published `text`.

        Raises:
            ConfigError: If it cannot be read, or a column is missing or cannot be understood. Names file and row.
        """
        written = prompts.endswith(".jsonl")
        name = column if written or column != "prompt" else "text"
        lines = read_prompts(prompts, column=name, repeated=True).rows
        if written:
            return [_item(line, f"--prompts: {prompts} row {number}") for number, line in enumerate(lines, start=1)]
        items: dict[str, dict[int, Row]] = {}
        for number, line in enumerate(lines, start=1):
            question = _question(line, f"--prompts: {prompts} row {number}")
            items.setdefault(question["item_id"], {})[question["number"]] = question
        found = []
        for item, questions in items.items():
            texts = [one["prompt"] for one in questions.values() if one["prompt"].strip()]
            if not texts:
                raise ConfigError(f"--prompts: {prompts}: item {item} has no text")
            index = {number: i for i, number in enumerate(questions)}
            found.append(
                {
                    "prompt": texts[0],
                    "item_id": item,
                    "questions": [one["question"] for one in questions.values()],
                    "parents": [[index[p] for p in one["parents"] if p in index] for one in questions.values()],
                    "categories": [one["category"] for one in questions.values()],
                }
            )
        return found

    def answers(self, images: Tensor, rows: Sequence[Row]) -> dict[str, Tensor | list[str]]:
        """`score` [B] float64 in [0, 1], and B texts `yes`: a JSON list of 1 where the judge said yes, 0 elsewhere.

        Args:
            images: [B, 3, H, W] float32 in [0, 1].
            rows: Of each image.
        """
        asked = [(i, question + INSTRUCTION) for i, row in enumerate(rows) for question in row["questions"]]
        choices = [[wordings("yes"), wordings("no")]] * len(asked)
        yes, no = self._judge.first_token_probabilities(images, asked, choices).T
        said = [of.int().tolist() for of in (yes > no).split([len(row["questions"]) for row in rows])]
        scores = [cascaded(of, row["parents"]) for of, row in zip(said, rows, strict=True)]
        return {
            "score": torch.tensor([sum(of) / len(of) for of in scores], dtype=torch.float64),
            "yes": [json.dumps(of) for of in said],
        }

    def figures(self, answers: Answers, rows: Sequence[Row], reference: Answers | None) -> dict[str, Figure]:
        """`dpg` and each category, in [0, 100]."""
        said = [[100.0 * value for value in json.loads(text)] for text in answers.texts("yes")]
        kinds = sums_by_kind(said, [row["categories"] for row in rows])
        return {
            "dpg": Figure.mean(100 * answers.tensor("score").whole(), rows, decimals=2),
            **{kind: pooled(*sums, rows, decimals=2) for kind, sums in kinds.items()},
        }


def cascaded(said: Sequence[int], parents: Sequence[Sequence[int]]) -> list[int]:
    """Answers of which one is 0 if one it depends on is 0, or was made so before.

    Args:
        said: 0 or 1 of each question.
        parents: Indices of the questions that each depends on.
    """
    found = list(said)
    for i, of in enumerate(parents):
        if any(found[parent] == 0 for parent in of):
            found[i] = 0
    return found


def _item(row: Row, where: str) -> dict[str, Any]:
    """A row as `DPG.rows` gave it.

    Raises:
        ConfigError: If it is none.
    """
    lists = [row.get(name) for name in ("questions", "parents", "categories")]
    counts = {len(of) if isinstance(of, list) else 0 for of in lists}
    if "item_id" not in row or len(counts) != 1 or counts == {0}:
        raise ConfigError(f"{where} is no item of DPG-Bench with its questions; give the published dpg_bench.csv")
    return dict(row)


def _question(line: Row, where: str) -> Row:
    """A line of the file, understood.

    Raises:
        ConfigError: Names the place, and what it must hold.
    """
    if missing := [name for name in COLUMNS if name not in line]:
        raise ConfigError(f"{where} has no column '{missing[0]}'; DPG-Bench's file has text, {', '.join(COLUMNS)}")
    for name in ("item_id", "category_broad", "question_natural_language"):
        if line[name] is None or not str(line[name]).strip():
            raise ConfigError(f"{where}: {name} is empty")
    if set(str(line["item_id"])) & set("/\\"):
        raise ConfigError(f"{where}: item_id {line['item_id']} cannot name a file; remove its slash")
    try:
        number = int(str(line["proposition_id"]))
        parents = [int(parent) for parent in str(line["dependency"] or "0").split(",")]
    except ValueError as error:
        what = f"proposition_id {line['proposition_id']!r:.40} and dependency {line['dependency']!r:.40}"
        raise ConfigError(f"{where}: {what} must be a whole number, and such numbers with commas between") from error
    return {
        "prompt": line["prompt"],
        "item_id": str(line["item_id"]).strip(),
        "number": number,
        "question": str(line["question_natural_language"]).strip(),
        "parents": [parent for parent in parents if parent],
        "category": str(line["category_broad"]).strip(),
    }
