"""What the runs measured, and what follows from it: numbers in, verdicts out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy import stats

from dmdr.evaluation.report import read_log

from .matrix import Claim
from .metrics import metric
from .runs import Run

LEVEL = 0.05  # how often pure noise may be called a finding in one direction


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        final: Metrics of the student at the end.
        curves: Each metric as (updates, value), from the first evaluation of its stage 1 on.
        seconds: Of its own training steps.
    """

    final: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    seconds: float = 0.0


def read(run: Run, root: Path) -> Result | None:
    """What a run measured; None of one that is not finished."""
    if run.state(root) != "finished":
        return None
    folder = run.folder(root)
    column = json.loads((folder / "evaluation.json").read_text())["columns"][run.stage]
    final = _with_gap({name: value for name, value in column.items() if math.isfinite(value)})
    before = read(run.start, root) if run.start else None
    offset = run.start.updates if run.start else 0
    lines = read_log(folder / "metrics.jsonl")
    points = {}
    for line in lines:
        values = {name if name in final else f"reward/{name}": value for name, value in _evaluated(line).items()}
        if values:
            points[offset + line["step"]] = _with_gap(values)
    points[run.updates] = final
    curves: dict[str, list[tuple[int, float]]] = {
        name: list(before.curves.get(name, ())) if before else [] for name in final
    }
    for step, point in points.items():
        for name, value in point.items():
            if name in curves and value is not None:
                curves[name].append((step, value))
    logged = [line["seconds"] for line in lines if line.get("seconds") is not None]
    seconds = mean(logged) * lines[-1]["step"] if logged else 0.0
    return Result(final, curves, seconds)


def _evaluated(line: Mapping[str, float]) -> dict[str, float]:
    """The evaluation in a line of the log, if there is one."""
    own = {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
    return own | {name: value for name, value in line.items() if name.startswith("eval_reward/")}


def _with_gap(values: Mapping[str, float]) -> dict[str, float]:
    trained, held_out = values.get("reward/total"), values.get("eval_reward/total")
    gap = {} if trained is None or held_out is None else {"reward_gap": trained - held_out}
    return dict(values) | gap


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float]) -> float:
    """Half the range."""
    return (max(values) - min(values)) / 2


def by_chance(margins: Sequence[float]) -> float:
    """p of a one-sided t-test: how often margins that lie around 0 would have a mean as far from it, on the same side.

    Args:
        margins: Two or more.
    """
    error = stats.sem(margins)
    if error == 0:
        return 0.0 if any(margins) else 0.5
    return float(stats.t.sf(abs(mean(margins)) / error, len(margins) - 1))


def shown(name: str, values: Sequence[float]) -> str:
    """Mean and spread of a metric over the seeds."""
    digits = metric(name).digits
    if not values:
        return ""
    return f"{mean(values):.{digits}f}" + (f" ± {spread(values):.{digits}f}" if len(values) > 1 else "")


@dataclass(frozen=True)
class Verdict:
    """Whether a claim was reproduced.

    Attributes:
        status: "reproduced", "not reproduced", "inconclusive", "one seed" or "not measured".
        text: The figures.
    """

    status: str
    text: str

    def __str__(self) -> str:
        return f"{self.status}: {self.text}"


def verdict(claim: Claim, cells: Mapping[str, Sequence[Result | None]]) -> Verdict:
    """Judge a claim by the difference of its two cells, seed by seed.

    It is reproduced, or not, where the mean difference is significant (a one-sided paired t-test over the seeds at
    LEVEL), exceeds the claim's noise, and is not 0 as it is shown. Anything else is inconclusive.

    Args:
        cells: Results by label, one per seed in the same order; None where a run is not finished.
    """
    shape = metric(claim.metric)
    what = f"in {shape.label}" + ("" if claim.until is None else f" over the first {claim.until} updates")
    sides = [[_value(result, claim) for result in cells[label]] for label in (claim.higher, claim.lower)]
    margins = [high - low for high, low in zip(*sides, strict=True) if high is not None and low is not None]
    if not margins:
        finished = any(None not in pair for pair in zip(cells[claim.higher], cells[claim.lower], strict=True))
        why = "their evaluations do not measure it" if finished else "no seed has finished both cells"
        return Verdict("not measured", f"{claim.higher} against {claim.lower} {what}: {why}")
    by, around, count = mean(margins), spread(margins), len(margins)
    seen = round(by, shape.digits)
    stands = "above" if seen > 0 else "below" if seen < 0 else "level with"
    text = f"{claim.higher} {stands} {claim.lower} {what} by {abs(by):.{shape.digits}f}"
    missing = len(sides[0]) - count
    tail = f"; seeds without both results: {missing}" * (missing > 0)
    if count == 1:
        return Verdict("one seed", f"{text}; two or more seeds are needed{tail}")
    agree = sum(margin * by > 0 for margin in margins)
    chance = by_chance(margins)
    p = "p < 0.001" if chance < 0.001 else f"p = {chance:.3f}"
    text += f" ± {around:.{shape.digits}f} in {agree} of {count} seeds ({p})"
    if seen == 0:
        return Verdict("inconclusive", f"{text}; a difference that rounds to 0 shows nothing{tail}")
    if abs(by) <= claim.noise:
        return Verdict("inconclusive", f"{text}; differences up to {claim.noise:g} are noise{tail}")
    if chance > LEVEL:
        return Verdict("inconclusive", f"{text}; the seeds differ too much to tell{tail}")
    return Verdict("reproduced" if by > 0 else "not reproduced", text + tail)


def _value(result: Result | None, claim: Claim) -> float | None:
    if result is None:
        return None
    if claim.until is None:
        return result.final.get(claim.metric)
    early = [value for step, value in result.curves.get(claim.metric, ()) if step <= claim.until]
    return mean(early) if early else None
