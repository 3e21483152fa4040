"""DPG-Bench's formulas on hand-made answers, and its judge in small."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmark_parts import build_judge
from dmdr.benchmarks import Benchmark, KeptAnswers
from dmdr.errors import ConfigError
from dmdr.statistics import prompt_means
from dmdr_benchmarks.dpg import DPG, cascaded
from dmdr_benchmarks.questions import Judge

CPU = torch.device("cpu")
HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
CAT, SEA = "A red cat, asleep on a mat.", 'A ship called "Sea" at dawn.'
LINES = [  # invented, in the published layout
    ("cat7", CAT, "", 1, "0", "entity", "whole", "entity - whole (cat)", "Is there a cat?"),
    ("cat7", CAT, "", 2, "1", "attribute", "color", "attribute - color (cat, red)", "Is the cat red?"),
    ("cat7", CAT, "", 3, "0", "entity", "whole", "entity - whole (mat)", "Is there a mat?"),
    ("cat7", CAT, "", 4, "1, 3", "relation", "spatial", "relation - spatial (cat, mat)", "Is the cat on the mat?"),
    ("sea1", SEA, "", 1, "0", "entity", "whole", "entity - whole (ship)", "Is there a ship?"),
    ("sea1", SEA, "", 2, "1", "other", "text", 'other - text (ship, "Sea")', 'Does the ship say "Sea"?'),
]


def written(folder: Path, lines: Any = LINES, header: str = HEADER) -> str:
    path = folder / "dpg_bench.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *lines])
    return str(path)


# --- Rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_an_item_with_its_questions(tmp_path: Path) -> None:
    cat, sea = DPG().rows(written(tmp_path), "prompt")
    assert cat == {
        "prompt": CAT,
        "item_id": "cat7",
        # with the first, which the published scorer leaves out
        "questions": ["Is there a cat?", "Is the cat red?", "Is there a mat?", "Is the cat on the mat?"],
        "parents": [[], [0], [], [0, 2]],
        "categories": ["entity", "attribute", "entity", "relation"],
    }
    assert sea["questions"][1] == 'Does the ship say "Sea"?' and sea["prompt"] == SEA and sea["item_id"] == "sea1"


def test_rows_that_lie_beside_images_are_read_as_they_are(tmp_path: Path) -> None:
    rows = DPG().rows(written(tmp_path), "prompt")
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert DPG().rows(str(path), "prompt") == rows
    for name in ("questions", "parents", "categories"):
        path.write_text("\n".join(json.dumps(row) for row in [rows[0], rows[1] | {name: None}]))
        with pytest.raises(ConfigError, match=f"--prompts: {path} row 2 is no item of DPG-Bench with its questions"):
            DPG().rows(str(path), "prompt")
    path.write_text(json.dumps({"prompt": "a cat"}))
    with pytest.raises(ConfigError, match="row 1 is no item of DPG-Bench with its questions; give the published"):
        DPG().rows(str(path), "prompt")


def test_items_may_have_numbers_for_names_and_texts_in_one_line_alone(tmp_path: Path) -> None:
    names = {"cat7": (7, CAT), "sea1": (8, "")}
    lines: list[Any] = [(*names[str(line[0])], *line[2:4], 0, *line[5:]) for line in LINES]
    lines[5] = (8, SEA, *lines[5][2:])
    cat, sea = DPG().rows(written(tmp_path, lines), "prompt")
    assert (cat["item_id"], sea["item_id"], sea["prompt"]) == ("7", "8", SEA)
    assert cat["parents"] == [[]] * 4


def test_numbers_that_come_twice_and_parents_that_are_unknown(tmp_path: Path) -> None:
    again = ("cat7", CAT, "", 2, "1,9", "attribute", "color", "", "Is the cat ginger?")
    cat, _ = DPG().rows(written(tmp_path, [*LINES, again]), "prompt")
    assert cat["questions"][1] == "Is the cat ginger?" and cat["parents"] == [[], [0], [], [0, 2]]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, "", "row 2: item_id is empty"),
        (0, "../cat7", "row 2: item_id ../cat7 cannot name a file; remove its slash"),
        (3, "two", "row 2: proposition_id 'two' and dependency '1' must be a whole number"),
        (4, "1;3", "row 2: proposition_id 2 and dependency '1;3' must be a whole number, and such numbers with commas"),
        (5, " ", "row 2: category_broad is empty"),
        (8, "", "row 2: question_natural_language is empty"),
    ],
)
def test_lines_that_cannot_be_understood_are_refused(tmp_path: Path, place: int, value: str, said: str) -> None:
    line = tuple(value if i == place else cell for i, cell in enumerate(LINES[1]))
    path = written(tmp_path, [LINES[0], line, *LINES[2:]])
    with pytest.raises(ConfigError, match=f"--prompts: {path} {said}"):
        DPG().rows(path, "prompt")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        DPG().rows(str(tmp_path / "none.csv"), "prompt")
    with pytest.raises(ConfigError, match="no column 'text'; give the column of the prompts with --prompt_column"):
        DPG().rows(written(tmp_path, header=HEADER.replace("text", "caption")), "prompt")
    assert DPG().rows(written(tmp_path, header=HEADER.replace("text", "caption")), "caption")[0]["prompt"] == CAT
    with pytest.raises(ConfigError, match="row 1 has no column 'dependency'; DPG-Bench's file has text, item_id"):
        DPG().rows(written(tmp_path, header=HEADER.replace("dependency", "parents")), "prompt")
    with pytest.raises(ConfigError, match="item sea1 has no text"):
        DPG().rows(written(tmp_path, [*LINES[:4], *((line[0], "", *line[2:]) for line in LINES[4:])]), "prompt")


# --- Formulas ---------------------------------------------------------------------------------------------------------


def test_a_question_is_zero_if_one_that_it_depends_on_is() -> None:
    parents = [[], [0], [], [0, 2]]
    assert cascaded([1, 1, 1, 1], parents) == [1, 1, 1, 1]
    assert cascaded([0, 1, 1, 1], parents) == [0, 0, 1, 0]
    assert cascaded([1, 1, 0, 1], parents) == [1, 1, 0, 0]
    assert cascaded([1, 0, 1, 1], parents) == [1, 0, 1, 1]  # nothing depends on the second
    chain = [[], [0], [1], [2]]
    assert cascaded([0, 1, 1, 1], chain) == [0, 0, 0, 0]  # by those that were made 0
    assert cascaded([1, 1, 0], [[1], [2], []]) == [1, 0, 0]  # in the order of the file: the first has been looked at
    said = [0, 1]
    cascaded(said, [[], [0]])
    assert said == [0, 1]  # the judge's answers stay, for the categories


def answered(rows: list[dict[str, Any]], *said: list[int]) -> KeptAnswers:
    scores = [sum(cascaded(of, row["parents"])) / len(of) for of, row in zip(said, rows, strict=True)]
    return KeptAnswers({"score": torch.tensor(scores, dtype=torch.float64), "yes": [json.dumps(of) for of in said]})


def test_figures_are_of_images_and_categories_of_questions(tmp_path: Path) -> None:
    cat, sea = DPG().rows(written(tmp_path), "prompt")
    rows = [cat, cat, sea, sea]  # two images each
    answers = answered(rows, [0, 1, 1, 1], [1, 1, 0, 1], [1, 0], [0, 1])
    figures = DPG().figures(answers, rows, None)
    assert list(figures) == ["dpg", "entity", "attribute", "relation", "other"]
    assert figures["dpg"].value == pytest.approx(100 * (0.25 + 0.5 + 0.5 + 0) / 4)
    assert figures["dpg"].error == pytest.approx(100 * torch.tensor([0.375, 0.25]).std().item() / math.sqrt(2))
    # of all images, before questions depend on each other
    assert figures["entity"].value == pytest.approx(100 * (0 + 1 + 1 + 0 + 1 + 0) / 6)
    assert figures["attribute"].value == figures["relation"].value == pytest.approx(100)
    assert figures["other"].value == pytest.approx(50)
    for figure in figures.values():
        assert figure.values is not None and figure.decimals == 2
        means = prompt_means(figure.values, [row["prompt"] for row in rows])
        assert means.nanmean().item() == pytest.approx(figure.value)


def test_it_is_a_benchmark_whose_flags_are_checked() -> None:
    assert isinstance(DPG(), Benchmark)
    assert (DPG.images_per_prompt, DPG.layout) == (4, "grids")
    assert "my/judge" in DPG(judge="my/judge").about() and "mPLUG" in DPG().about()
    with pytest.raises(ConfigError, match="chunk_size must be at least 1, not 0"):
        DPG(chunk_size=0)


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_images_are_judged_by_the_network(tmp_path: Path) -> None:
    rows = DPG().rows(written(tmp_path), "prompt")
    build_judge(tmp_path / "judge")
    benchmark = DPG(judge=str(tmp_path / "judge"), chunk_size=4)
    benchmark.prepare(CPU, torch.float32)
    noise = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(noise, (24, 24), mode="bicubic").clamp(0, 1)
    of = [rows[0], rows[1], rows[0], rows[1]]
    answers = benchmark.answers(images, of)

    judge = Judge(str(tmp_path / "judge"), 1, CPU, torch.float32)
    said = []
    for i, row in enumerate(of):
        asked = [(i, f"{question} Answer yes or no.") for question in row["questions"]]
        yes, no = judge.first_token_probabilities(images, asked, [[["yes", "Yes"], ["no", "No"]]] * len(asked)).T
        said.append((yes > no).int().tolist())
    assert [json.loads(str(text)) for text in answers["yes"]] == said
    assert len({answer for answers in said for answer in answers}) == 2  # there is a yes and a no
    scores = answers["score"]
    assert isinstance(scores, Tensor) and torch.equal(scores, answered(of, *said).tensor("score").whole())
    assert DPG().figures(KeptAnswers(answers), of, None)["dpg"].value == pytest.approx(100 * scores.mean().item())
