"""The table of a benchmark: a line a model, with standard errors and differences to a baseline; as text, Markdown,
LaTeX, JSON, and a CSV file of all images."""

import csv
import io
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dmdr.benchmarks import Figure
from dmdr.evaluation.answers import Store
from dmdr.evaluation.pictures import Pictures
from dmdr.prompts import Row
from dmdr.statistics import Estimate, bootstrap, prompt_means

LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "\\": "\\textbackslash{}",
}


@dataclass(frozen=True)
class Measured:
    """A model's figures.

    Attributes:
        name: What the model is called.
        figures: By column.
        prompts: Of each image (`benchmarks.prompts_of`).
    """

    name: str
    figures: Mapping[str, Figure]
    prompts: Sequence[Hashable]


@dataclass(frozen=True)
class Table:
    """Models beside each other.

    Attributes:
        about: A sentence over the table.
        models: One line each; those of one name are repetitions, such as seeds, and share a line.
        baseline: The one that the others are compared with, if any; repetitions are not.
    """

    about: str
    models: Sequence[Measured]
    baseline: Measured | None = None

    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for model in self.models for name in model.figures))

    def _groups(self) -> dict[str, list[Measured]]:
        """The repetitions of each model."""
        found: dict[str, list[Measured]] = {}
        for model in self.models:
            found.setdefault(model.name, []).append(model)
        return found

    @cached_property
    def differences(self) -> dict[str, dict[str, Estimate]]:
        """Of each model to the baseline, by column: of the means of the prompts that both have images of."""
        found: dict[str, dict[str, Estimate]] = {}
        base, groups = self.baseline, self._groups()
        for model in self.models if base else ():
            if base is None or model is base or len(groups[model.name]) > 1:
                continue
            for name, figure in model.figures.items():
                other = base.figures.get(name)
                if figure.values is None or other is None or other.values is None:
                    continue
                means, others = _by_prompt(model, figure.values), _by_prompt(base, other.values)
                if common := [prompt for prompt in means if prompt in others]:
                    difference = torch.tensor([means[prompt] - others[prompt] for prompt in common])
                    kinds = dict(zip(model.prompts, figure.strata, strict=True)) if figure.strata else None
                    strata = [kinds[prompt] for prompt in common] if kinds else None
                    found.setdefault(model.name, {})[name] = bootstrap(difference, strata)
        return found

    def parts(self) -> list[tuple[str, list[list[str]]]]:
        """Title and cells of the table, and of the differences where there are some; the first line is the heading."""
        columns = self.columns()
        lines = [["model", *columns, "images"]]
        about, groups = self.about, self._groups()
        for name, group in groups.items():
            cells = [
                _cells([model.figures[column] for model in group if column in model.figures]) for column in columns
            ]
            lines.append([name, *cells, str(sum(len(model.prompts) for model in group))])
        if any(len(group) > 1 for group in groups.values()):
            about += " Where a model has repetitions, such as seeds: their mean, and half their range."
        if self.baseline and not self.differences:
            what = "no column is a mean over prompts of which both have images"
            about += f" No difference to {self.baseline.name}: {what}."
        found = [(about, lines)]
        if differences := self.differences:
            compared = [name for name in columns if any(name in each for each in differences.values())]
            assert self.baseline is not None
            lines = [["model", *compared]]
            for other, each in differences.items():
                decimals = {name: self.baseline.figures[name].decimals for name in compared}
                lines.append([other, *(_interval(each.get(name), decimals[name]) for name in compared)])
            about = (
                f"Difference to {self.baseline.name} on the same prompts, with a 95 % bootstrap interval over prompts."
            )
            found.append((about, lines))
        return found

    def as_text(self) -> str:
        return "\n\n".join(f"{about}\n{_aligned(lines)}" for about, lines in self.parts())

    def as_markdown(self) -> str:
        text = []
        for about, (heading, *lines) in self.parts():
            cells = [heading, ["---", *["---:"] * (len(heading) - 1)], *lines]
            rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
            text.append(f"{about}\n\n" + "\n".join(rows) + "\n")
        return "\n".join(text)

    def as_latex(self) -> str:
        text = []
        for about, (heading, *lines) in self.parts():
            head, *body = (" & ".join(map(_latex, line)) + r" \\" for line in (heading, *lines))
            columns = "l" + "r" * (len(heading) - 1)
            rows = "\n".join([r"\toprule", head, r"\midrule", *body, r"\bottomrule"])
            text.append(f"% {about}\n\\begin{{tabular}}{{{columns}}}\n{rows}\n\\end{{tabular}}\n")
        return "\n".join(text)

    def as_json(self) -> str:
        """All figures of each repetition, unrounded; what is not finite is null."""
        models = {name: [_as_json(model) for model in group] for name, group in self._groups().items()}
        differences = {
            model: {
                name: {
                    "mean": _number(one.mean),
                    "low": _number(one.low),
                    "high": _number(one.high),
                    "prompts": one.count,
                    "left_out": one.left_out,
                }
                for name, one in each.items()
            }
            for model, each in self.differences.items()
        }
        content: dict[str, Any] = {"about": self.about, "models": models}
        if self.baseline:
            content |= {"baseline": self.baseline.name, "differences": differences}
        return json.dumps(content, indent=2) + "\n"


def as_csv(pictures: Pictures, rows: Sequence[Row], answers: Store) -> bytes:
    """A line an image: its name, its prompt, each answer that is one number (empty if not finite) or a text."""
    numbers, texts = answers.names()
    columns = [answers.tensor(name).whole().tolist() for name in numbers]
    said = [answers.texts(name) for name in texts]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "prompt", *numbers, *texts])
    for i, row in enumerate(rows):
        cells = (f"{values[i]:.9g}" if math.isfinite(values[i]) else "" for values in columns)  # all of a float32
        writer.writerow([pictures.name(i), row["prompt"], *cells, *(each[i] for each in said)])
    return text.getvalue().encode("utf-8", "backslashreplace")  # a file's name need not be text


def _by_prompt(model: Measured, values: Tensor) -> dict[Hashable, float]:
    """The mean of each prompt's images; those without a prompt belong to no other model's."""
    order = list(dict.fromkeys(model.prompts))
    means = prompt_means(values, model.prompts).tolist()
    return {prompt: mean for prompt, mean in zip(order, means, strict=True) if isinstance(prompt, str)}


def _as_json(model: Measured) -> dict[str, Any]:
    figures = {
        name: {"value": _number(figure.value), "standard_error": _number(figure.error)}
        for name, figure in model.figures.items()
    }
    return {"images": len(model.prompts), "prompts": len(set(model.prompts)), "figures": figures}


def _cells(figures: Sequence[Figure]) -> str:
    """A figure, or the mean of those of several repetitions."""
    if len(figures) <= 1:
        return _cell(figures[0]) if figures else "-"
    values = [figure.value for figure in figures]
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    return _cell(Figure(mean, spread, decimals=figures[0].decimals))


def _cell(figure: Figure) -> str:
    if not math.isfinite(figure.value):
        return "-"
    text = f"{figure.value:.{figure.decimals}f}"
    return f"{text} ± {figure.error:.{figure.decimals}f}" if math.isfinite(figure.error) else text


def _interval(estimate: Estimate | None, decimals: int) -> str:
    if estimate is None or not math.isfinite(estimate.mean):
        return "-"
    text = f"{estimate.mean:+.{decimals}f}"
    if math.isfinite(estimate.low):
        text += f" ({estimate.low:+.{decimals}f} to {estimate.high:+.{decimals}f})"
    return text


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def _latex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text).replace("±", r"$\pm$")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
