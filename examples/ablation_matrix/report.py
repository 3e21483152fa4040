"""The report of a matrix: `report.html`, `plots/`, `results.csv` and `table.md`, from what the run folders hold."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dmdr.evaluation.report import TEXT, inline_svg, template
from dmdr.images import embed, write_atomically

from .matrix import Block, Matrix
from .metrics import METRICS, Metric, metric
from .results import Result, Verdict, read, shown, verdict
from .runs import AXES, Run, last_line

COLOURS = ("#3b82d0", "#d9822b", "#2f9e63", "#b654c4", "#c94a4a")  # readable on light and on dark
Results = Mapping[str, Sequence[Result | None]]


@dataclass(frozen=True)
class Section:
    """A block as the page shows it."""

    block: Block
    plots: Sequence[tuple[str, Markup]]
    header: Sequence[tuple[str, Metric]]
    rows: Sequence[tuple[str, int, int, int, Sequence[str]]]  # cell, updates, samples, finished seeds, metrics
    missing: Sequence[tuple[str, str]]  # runs that are not finished, and why
    verdicts: Sequence[Verdict]
    pictures: Sequence[tuple[str, tuple[str, int, int]]]


def write_report(matrix: Matrix, root: Path, failed: Mapping[str, str]) -> list[str]:
    """Write all of it, from the runs that are finished.

    Args:
        failed: Why runs have failed, by their name; of others that are not finished the log tells.

    Returns: The verdicts, a line each.
    """
    found = {run.name: read(run, root) for run in matrix.runs}
    sections = []
    for block in matrix.blocks:
        results = {label: [found[run.name] for run in runs] for label, runs in block.cells.items()}
        sections.append(
            Section(
                block,
                [(name, draw(block, name, results, root)) for name in block.curves],
                [(name, metric(name)) for name in block.table],
                [_row(label, block, results[label]) for label in block.cells],
                _missing(block, found, root, failed),
                [verdict(claim, results) for claim in block.claims],
                _pictures(block, root),
            )
        )
    table, header = rows(matrix, found)
    write_atomically(root / "results.csv", _csv(header, table).encode())
    write_atomically(root / "table.md", _markdown(sections).encode())
    verdicts = [v for section in sections for v in section.verdicts]
    statuses = [v.status for v in verdicts]
    finished = sum(result is not None for result in found.values())
    html = template(Path(__file__).parent / "report.html.jinja").render(
        sections=sections,
        seeds=matrix.seeds,
        finished=finished,
        total=len(matrix.runs),
        counts={status: statuses.count(status) for status in dict.fromkeys(statuses)},
        header=header,
        table=table,
        settings=_common(matrix),
    )
    write_atomically(root / "report.html", html.encode())
    return [f"{section.block.name}: {v}" for section in sections for v in section.verdicts]


def rows(matrix: Matrix, found: Mapping[str, Result | None]) -> tuple[list[list[Any]], list[str]]:
    """One row per finished run: its stage 1, the cells that it is, its seed, all settings that vary, all metrics."""
    cells: dict[str, list[str]] = {run.name: [] for run in matrix.runs}
    for block in matrix.blocks:
        for label, runs in block.cells.items():
            for run in runs:
                cells[run.name].append(f"{block.name}: {label}")
    varied = _varied(matrix)
    settings = [name for name in ("rl", *AXES) if name in varied] + sorted(varied.difference(("rl", *AXES)))
    results = [(run, found[run.name]) for run in matrix.runs]
    names = dict.fromkeys([*METRICS, *(name for _, result in results if result for name in result.final)])
    metrics = [name for name in names if any(result and name in result.final for _, result in results)]
    header = ["run", "start", "cells", "seed", "updates", "samples", *settings, *metrics, "seconds"]
    table = []
    for run, result in results:
        if result is not None:
            values, config = run.values(), run.settings.config
            table.append(
                [
                    *(
                        run.name,
                        run.start.name if run.start else "",
                        "; ".join(cells[run.name]) or "stage 1",
                        run.seed,
                        run.updates,
                        config.num_eval_samples,
                    ),
                    *(values.get(name, "") for name in settings),
                    *(result.final.get(name, "") for name in metrics),
                    round(result.seconds, 1),
                ]
            )
    return table, header


def _varied(matrix: Matrix) -> set[str]:
    """Settings that differ between two runs and have no column of their own, and what the YAML tells plugins."""
    values: dict[str, set[str]] = {}
    for run in matrix.runs:
        for name, value in run.values().items():
            values.setdefault(name, set()).add(str(value))
    varied = {name for name, found in values.items() if len(found) > 1} - {"seed", "init_student", "num_eval_samples"}
    return varied | matrix.told


def _csv(header: Sequence[str], table: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *table])
    return text.getvalue()


def _row(label: str, block: Block, results: Sequence[Result | None]) -> tuple[str, int, int, int, list[str]]:
    run, done = block.cells[label][0], [result for result in results if result is not None]
    texts = [shown(name, [result.final[name] for result in done if name in result.final]) for name in block.table]
    return label, run.updates, run.settings.config.num_eval_samples, len(done), texts


def _missing(
    block: Block, found: Mapping[str, Result | None], root: Path, failed: Mapping[str, str]
) -> list[tuple[str, str]]:
    """The runs of a block that are not finished, and why, each in a line."""
    runs = [(f"{label}, seed {run.seed}", run) for label, runs in block.cells.items() for run in runs]
    return [(name, _why(run, root, failed)) for name, run in runs if found[run.name] is None]


def _why(run: Run, root: Path, failed: Mapping[str, str]) -> str:
    """Why a run is not finished."""
    if run.name in failed:
        return failed[run.name]
    log = root / "logs" / f"{run.name}.log"
    if log.is_file():
        return f"the last line of its log is: {last_line(log)}"
    if run.start and run.start.state(root) != "finished":
        return f"not begun: its stage 1 is not finished, {_why(run.start, root, failed)}"
    return "not begun"


def _markdown(sections: Sequence[Section]) -> str:
    """Tables for a paper: means over the seeds ± half their range."""
    parts = []
    for section in sections:
        names = ["", "updates", "seeds", *(shape.label for _, shape in section.header)]
        lines = [f"### {section.block.title}", "", _line(names), "|---" * len(names) + "|"]
        lines += [_line([label, updates, seeds, *texts]) for label, updates, _, seeds, texts in section.rows]
        missing = [f"- {name} is not finished: {why}" for name, why in section.missing]
        parts.append("\n".join([*lines, "", *missing, *(f"- {v}" for v in section.verdicts)]))
    return "\n\n".join(parts) + "\n"


def _line(values: Sequence[Any]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(value).replace("|", "\\|") for value in values) + " |"


def _common(matrix: Matrix) -> list[tuple[str, Any]]:
    """Settings that all runs have in common, of those that matter most."""
    values = [run.values() for run in matrix.runs]
    names = ("model", "reward", "eval_reward", "num_eval_samples", "per_device_train_batch_size", "num_inference_steps")
    return [(name, values[0][name]) for name in names if len({str(v[name]) for v in values}) == 1]


def _pictures(block: Block, root: Path) -> list[tuple[str, tuple[str, int, int]]]:
    """The last image grid of every cell's first seed, where that is finished."""
    found = []
    for label, runs in block.cells.items():
        files = sorted((runs[0].folder(root) / "samples").glob("step-*.png"))
        if runs[0].state(root) == "finished" and files:
            found.append((label, embed(files[-1])))
    return found


def draw(block: Block, name: str, results: Results, root: Path) -> Markup:
    """A metric over the updates, a line a cell with its band over the seeds; the same as PNG and SVG in `plots/`."""
    path = root / "plots" / re.sub(r"[^\w.+-]", "-", f"{block.name}-{name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = plot(block, name, results, TEXT)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        page = plot(block, name, results, "#222222")
        page.savefig(f"{path}.png", dpi=150)
        page.savefig(f"{path}.svg", metadata={"Date": None})
    return inline_svg(figure, f"{block.name} {name}")


def plot(block: Block, name: str, results: Results, text: str) -> Figure:
    """The figure, its text in this colour."""
    figure = Figure(figsize=(4.2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for (label, seeds), colour in zip(results.items(), COLOURS * len(results), strict=False):
        curves = [dict(seed.curves.get(name, ())) for seed in seeds if seed is not None]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if not steps:
            continue
        values = np.array([[curve[step] for step in steps] for curve in curves])
        axes.plot(steps, values.mean(0), color=colour, linewidth=1.6, marker=".", label=label)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    starts = {run.start.updates for runs in block.cells.values() for run in runs if run.start}
    for start in starts:
        axes.axvline(start, color=text, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlabel("student updates", color=text, fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(length=0, labelsize=8.5, labelcolor=text)
    axes.grid(axis="y", color=text, alpha=0.18, linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.set_title(metric(name).label, color=text, fontsize=10, loc="left")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=text, fontsize=8.5)
    return figure
