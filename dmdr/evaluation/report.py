"""`report.html` of a run folder: one self-contained page with samples, metrics, curves and settings.

Everything is read from the files of the folder, so that the report of an old, unfinished or interrupted run can be
written as well; whatever is missing is left out or said to be missing.
"""

import importlib.metadata
import json
import math
import platform
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from dmdr.evaluation.names import CURVES, METRICS, TIMES, meanings, metric
from dmdr.images import embed, write_atomically

PACKAGES = ("dmdr", "torch", "diffusers", "transformers", "accelerate", "peft", "trl", "numpy")
SIZE = (4.0, 2.0)  # inches of 72 units
POINTS = 400  # more than the width of a plot can show
TEXT, LINE = "#010101", "#020202"  # stand-ins that become colours of the page, which follow its theme
LATER = "evaluation"  # folder in a run's, of what is measured after it
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Picture:
    """One embedded grid of samples: its title, the step it was made at, its data URI and size in pixels."""

    title: str
    note: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Curve:
    """One plot: a metric's name, its last finite value, a drawing, and how many of its values were not finite."""

    name: str
    last: str
    svg: Markup
    missing: int


@dataclass(frozen=True)
class StageTimes:
    """What the time of a stage went into: parts in words and percent, the greatest first; and how fast it was."""

    stage: int
    parts: list[tuple[str, str]]
    seconds: str
    samples_per_second: str
    peak_memory_gib: str


def write_report(run_folder: Path) -> Path:
    """Build `report.html` from what lies in a run folder, atomically.

    Reads `config.yaml`, `overview.json`, `metrics.jsonl`, `evaluation.json`, `hacking.json`, `samples/teacher.png` and
    `samples/step-*.png`. Each of them may be missing; unreadable lines and images are left out. It links to the pages
    and tables that `dmdr-eval` wrote into `evaluation/`.

    Returns: The path of the report.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise FileNotFoundError(f"no run folder at {run_folder}")
    settings = _text(run_folder / "config.yaml")
    config = _mapping(yaml.safe_load, settings)
    evaluation = _mapping(json.loads, _text(run_folder / "evaluation.json"))
    columns = evaluation.pop("columns", {})
    rows = read_log(run_folder / "metrics.jsonl")
    groups = _curves(rows, _boundary(rows, config.get("stage1_steps")))
    table = _table(columns, evaluation.pop("errors", {}))
    curves = [(METRICS[group].title, groups.pop(group)) for group in CURVES if group in groups]
    logged = [name for row in rows for name in row]
    html = template(TEMPLATES / "report.html.jinja").render(
        folder=run_folder.resolve().name,
        config=config,
        step=rows[-1]["step"] if rows else 0,
        pictures=_pictures(run_folder / "samples", rows),
        columns=list(columns),
        table=table,
        terms=meanings([*(name for name, _, _ in table), *logged]),
        spent=_times(rows),
        overview=_mapping(json.loads, _text(run_folder / "overview.json")),
        notes={name: value for name, value in evaluation.items() if isinstance(value, str | int | float)},
        curves=curves,
        others=[curve for curves in groups.values() for curve in curves],
        staged=len({row["stage"] for row in rows}) > 1,
        settings=settings.strip(),
        hacked=_hacked(run_folder / "hacking.json"),
        later=[
            f"{LATER}/{path.name}" for end in ("html", "md") for path in sorted((run_folder / LATER).glob(f"*.{end}"))
        ],
        command=[shlex.quote(f"{run_folder}{end}") for end in ("/config.yaml", "-again")],
        versions={"Python": platform.python_version()} | _versions(),
    )
    report = run_folder / "report.html"
    write_atomically(report, html.encode(errors="replace"))
    return report


def _hacked(file: Path) -> str:
    """What the guard against hacked rewards found last; "" if nothing."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return str(next((each["text"] for each in reversed(json.loads(file.read_text())) if each["text"]), ""))
    return ""


def template(file: Path) -> jinja2.Template:
    """A page that escapes every value and may include what lies beside it, or the style of all our reports."""
    loader = jinja2.FileSystemLoader([file.parent, TEMPLATES])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(file.name)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(load: Callable[[str], Any], text: str) -> dict[str, Any]:
    """What a file says, or nothing: a report of the rest is worth more than an error at the end of a run."""
    try:
        content = load(text)
    except (ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def read_log(file: Path) -> list[dict[str, Any]]:
    """Logged steps in order. A resumed run logs some steps twice: the later line counts. A torn last line does not."""
    rows = {}
    for line in _text(file).splitlines():
        row = _mapping(json.loads, line)
        if isinstance(row.get("step"), int):
            rows[row["step"]] = {"stage": 1} | row
    return [rows[step] for step in sorted(rows)]


def _boundary(rows: Sequence[Mapping[str, Any]], stage1_steps: Any) -> float | None:
    """The step at which stage 1 ended, None in a run of one stage. The log brackets it, the setting makes it exact."""
    low = max((row["step"] for row in rows if row["stage"] == 1), default=None)
    high = min((row["step"] for row in rows if row["stage"] == 2), default=None)
    if low is None or high is None:
        return None
    return stage1_steps if stage1_steps in range(low, high) else low


def _pictures(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The teacher's grid and the last one of each stage."""
    last: dict[int, tuple[int, Path]] = {}
    for path in folder.glob("step-*.png"):
        if match := re.fullmatch(r"step-(\d+)", path.stem):
            step = int(match[1])
            # A line of the log sums up the steps before it: the first line at or after a grid speaks of its stage.
            line = next((row for row in rows if row["step"] >= step), rows[-1] if rows else {"stage": 0})
            last[line["stage"]] = max(last.get(line["stage"], (step, path)), (step, path))
    found = [("Teacher", "", folder / "teacher.png")]
    for stage, (step, file) in sorted(last.items()):
        found.append((f"Student, stage {stage}" if stage else "Student", f"update {step}", file))
    pictures = []
    for title, note, path in found:
        try:
            pictures.append(Picture(title, note, *embed(path)))
        except OSError:
            continue
    return pictures


def _table(
    columns: Mapping[str, Mapping[str, Any]], errors: Mapping[str, Mapping[str, float]]
) -> list[tuple[str, str, list[str]]]:
    """Rows of the metric table: name, which way is better ("" where unknown), a text for each column."""
    table = []
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        cells = [column.get(name) for column in columns.values()]
        largest = max((abs(cell) for cell in cells if cell is not None and math.isfinite(cell)), default=0)
        # Rewards of neighbouring runs differ late: 0.2811 and 0.2843 are far apart for HPS.
        digits = max(1, (4 if "reward/" in name else 3) - int(math.log10(max(largest, 1))))
        known = metric(name)
        better = known.better if known else ""
        texts = ["\N{EN DASH}" if cell is None else f"{cell:.{digits}f}" for cell in cells]
        for i, column in enumerate(columns):
            if name in errors.get(column, {}):
                texts[i] += f" ± {errors[column][name]:.{digits}f}"
        table.append((name, better, texts))
    return table


def _times(rows: Sequence[Mapping[str, Any]]) -> list[StageTimes]:
    """What the time of each stage went into, as far as its lines say so."""
    found = []
    updates = np.diff([0, *(row["step"] for row in rows)]).tolist()
    names = ("seconds", "samples_per_second", "peak_memory_gib", *(f"time/{name}" for name in TIMES))
    for stage in sorted({row["stage"] for row in rows}):
        told = [
            [count, *(row[name] for name in names)]
            for count, row in zip(updates, rows, strict=True)
            if row["stage"] == stage and all(isinstance(row.get(name), int | float) for name in names)
        ]
        if not told:
            continue
        count, seconds, speed, memory, *shares = np.array(told, dtype=float).T
        steps = count * seconds
        parts = dict(zip(TIMES, shares, strict=True))
        whole = steps / (1 - parts["evaluation"] - parts["other"]).clip(1e-3)  # steps are a part of the time
        percents = {TIMES[name]: 100 * (share * whole).sum() / whole.sum() for name, share in parts.items()}
        largest = sorted(percents.items(), key=lambda item: -item[1])
        found.append(
            StageTimes(
                stage,
                [(words, f"{percent:.0f} %") for words, percent in largest if percent >= 0.5],
                seconds=f"{steps.sum() / count.sum():.3g}",
                samples_per_second=f"{(speed * steps).sum() / steps.sum():.3g}",
                peak_memory_gib=f"{memory.max():.1f}",
            )
        )
    return found


def _versions() -> dict[str, str]:
    """Versions of the installed packages that matter here, without importing them."""
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _curves(rows: Sequence[Mapping[str, Any]], boundary: float | None) -> dict[str, list[Curve]]:
    """A curve for each scalar of the log, by group: what comes before the slash of its name, "" where there is none."""
    groups: dict[str, list[Curve]] = {}
    span = [row["step"] for row in (*rows[:1], *rows[-1:])]
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("step", "stage")):
        logged = [(row["step"], row[name]) for row in rows if isinstance(row.get(name, ""), int | float | None)]
        if logged:
            steps, values = np.array(logged, dtype=float).T  # None becomes NaN
            finite = np.isfinite(values)
            last = f"{values[finite][-1]:.4g}" if finite.any() else "\N{EN DASH}"
            values[~finite] = np.nan
            svg = _plot(name, steps, values, span, boundary) if finite.any() else Markup()
            group = name.partition("/")[0] if "/" in name else ""
            groups.setdefault(group, []).append(Curve(name, last, svg, int((~finite).sum())))
    return groups


def _plot(name: str, steps: np.ndarray, values: np.ndarray, span: Sequence[int], boundary: float | None) -> Markup:
    """Inline SVG in the page's colours, from the first to the last step of the run (`span`); NaN is a gap."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    low, high = np.nanmin(values), np.nanmax(values)
    smooth, log = len(steps) > 60, name.startswith(("loss/", "grad_norm/")) and high > 100 * low > 0
    cut = np.searchsorted(steps, np.inf if boundary is None else boundary, side="right")
    for x, y in ((steps[:cut], values[:cut]), (steps[cut:], values[cut:])):
        marker = "." if len(x) <= 30 else ""
        axes.plot(*_thin(x, y), color=LINE, linewidth=0.7 if smooth else 1.4, alpha=0.5 if smooth else 1, marker=marker)
        if smooth and len(x):
            mean = np.exp(_running_mean(np.log(y))) if log else _running_mean(y)
            axes.plot(*_thin(x, mean), color=LINE, linewidth=1.5)
    if boundary is not None:
        axes.axvline(boundary + 0.5, color=TEXT, linewidth=0.9, linestyle=(0, (4, 3)), gid="stage-boundary")
        above = axes.get_xaxis_transform()
        axes.text(boundary + 0.5, 1.02, "stage 2", color=TEXT, fontsize=8, ha="center", transform=above)
    axes.update_datalim([(step, low) for step in span])
    axes.autoscale_view()
    if log:
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True) if span[0] < span[1] else FixedLocator(span))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(length=0, labelsize=8.5, labelcolor=TEXT)
    axes.grid(axis="y", color=TEXT, alpha=0.18, linewidth=0.6)
    axes.spines[:].set_visible(False)
    return inline_svg(figure, name)


def inline_svg(figure: Figure, name: str) -> Markup:
    """A figure as part of a page: TEXT and LINE become the page's colours, text is text in the page's font.

    Args:
        name: Unlike that of any other figure of the page.
    """
    buffer = StringIO()
    # A salt of its own, so that the ids of two plots in one page never meet; text as text, in the font of the page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :].replace('<g id="', '<g class="').replace("xlink:href", "href")
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    svg = svg.replace(TEXT, "var(--muted)").replace(LINE, "var(--accent)")
    width, height = 72 * figure.get_size_inches()
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true">{svg}')


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the values, of the finite ones; NaN where `values` is."""
    finite, window = np.isfinite(values), 1 + len(values) // 20
    total, count = (np.convolve(part, np.ones(window), "same") for part in (np.where(finite, values, 0.0), finite))
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 * POINTS of a curve: the least and the greatest value of each interval, so that no spike is lost."""
    if len(x) <= 2 * POINTS:
        return x, y
    low, high = np.nan_to_num(y, nan=np.inf), np.nan_to_num(y, nan=-np.inf)
    parts = np.array_split(np.arange(len(x)), POINTS)
    keep = [i for part in parts for i in sorted({part[low[part].argmin()], part[high[part].argmax()]})]
    return x[keep], y[keep]
