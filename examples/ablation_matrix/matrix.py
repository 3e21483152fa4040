"""Reads the YAML of a matrix, its blocks, cells and claims, and refuses whatever it cannot mean."""

import itertools
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dmdr.errors import ConfigError
from dmdr.settings import registry
from dmdr.settings.parse import read_yaml

from .metrics import measured, short
from .runs import STAGE2, Run, Runs

RUNNER = ("output_dir", "init_student", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "config")
# Settings that are not a cell's, and why.
ELSEWHERE = {
    **dict.fromkeys(RUNNER, "the matrix sets it"),
    "seed": "the matrix sets it (from seeds)",
    "architecture": "only dmdr-train --dry_run reads it",
}


@dataclass(frozen=True)
class Claim:
    """One cell above another in a metric.

    Attributes:
        higher, lower: Labels of two cells of the block.
        metric: As `evaluation.json` calls it, or "reward_gap" (trained minus held-out reward).
        until: Compare the mean of the evaluations up to this update; None for the final ones.
        noise: A difference of means within this says nothing.

    Raises:
        ConfigError: For a value of another type, or a cell above itself.
    """

    higher: str
    lower: str
    metric: str
    until: int | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("higher", "lower", "metric"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be text, not {reprlib.repr(getattr(self, name))}")
        if self.higher == self.lower:
            raise ConfigError(f"'{self.higher}' is compared with itself")
        if self.until is not None and (type(self.until) is not int or self.until < 1):
            raise ConfigError(f"until must be a whole number of at least 1, not {reprlib.repr(self.until)}")
        not_negative(self.noise, "noise")

    def __str__(self) -> str:
        return f"'{self.higher}' above '{self.lower}' in {self.metric}" + f" until {self.until}" * bool(self.until)


@dataclass(frozen=True)
class Block:
    """A figure or a table.

    Attributes:
        cells: The runs of each cell by its label, one per seed.
        curves: Metrics that are drawn over the student updates.
        table: Metrics that are tabulated.
    """

    name: str
    title: str
    text: str
    cells: Mapping[str, Sequence[Run]]
    curves: Sequence[str]
    table: Sequence[str]
    claims: Sequence[Claim]


@dataclass(frozen=True)
class Matrix:
    """All blocks, and each of their runs once; a run comes after the one that it starts from.

    Attributes:
        told: Flags of plugins, by their full names, that some cell sets.
    """

    seeds: Sequence[int]
    blocks: Sequence[Block]
    runs: Sequence[Run]
    told: Set[str]


def load(file: Path, root: Path, *, quick: bool = False, inputs: bool = True) -> Matrix:
    """Read a matrix and check every setting of every cell; an entry with nothing in it is as if it were left out.

    Args:
        file: `settings` of all runs, `seeds`, `blocks`, `noise` by metric, and under `quick` what a quick look has in
            their place.
        root: Where the run folders lie.
        quick: Only the blocks that `quick` names, under its settings and seeds; it is checked in any case.
        inputs: Also look whether models, prompts and the like can be found; a report does not need them.

    Raises:
        ConfigError: For whatever is unknown or cannot be meant, with its place.
    """
    content = mapping(read_yaml(str(file)), "the matrix", ("settings", "seeds", "blocks", "noise", "quick"))
    if not mapping(content.get("blocks"), "blocks"):
        raise ConfigError(f"{file} has no blocks: a mapping of figures and tables")
    instead = mapping(content.get("quick"), "quick", ("settings", "seeds", "blocks"))
    instead = {key: value for key, value in instead.items() if value is not None}
    if not quick:
        whole = built(content, root, inputs)
        for metric in noises(content):
            known(metric, itertools.chain(*(measured(run.settings) for run in whole.runs)), "metric", "noise")
        if not instead:
            return whole
    elif not instead:
        raise ConfigError(f"--quick: {file} has no quick section (seeds, settings, blocks)")
    try:
        part = built(shortened(content, instead), root, inputs and quick)
    except ConfigError as error:
        raise ConfigError(f"quick: {error}") from error
    return part if quick else whole


def shortened(content: Mapping[str, Any], instead: Mapping[str, Any]) -> dict[str, Any]:
    """A matrix as its `quick` has it."""
    names = sequence(instead.get("blocks"), "blocks")
    for name in names:
        known(name, content["blocks"], "block", "blocks")
    blocks = {name: content["blocks"][name] for name in names} or content["blocks"]
    settings = mapping(content.get("settings"), "settings") | mapping(instead.get("settings"), "settings")
    return {**content, **instead, "blocks": blocks, "settings": settings}


def built(content: Mapping[str, Any], root: Path, inputs: bool) -> Matrix:
    """The matrix of this content, but for its `quick`."""
    settings, seeds = mapping(content.get("settings"), "settings"), content.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and 0 <= s < 2**32 for s in seeds):
        raise ConfigError(f"seeds must be a list of whole numbers from 0 to 2**32 - 1, not {reprlib.repr(seeds)}")
    known_settings(settings, "settings")
    runs = Runs(settings, sorted(set(seeds)), root, inputs)
    reader = Reader(settings, noises(content), runs)
    blocks = [reader.block(name, block) for name, block in content["blocks"].items()]
    return Matrix(runs.seeds, blocks, list(runs.made.values()), runs.told)


def noises(content: Mapping[str, Any]) -> dict[str, float]:
    """The noise of metrics, for claims that have none of their own."""
    found = mapping(content.get("noise"), "noise")
    for metric, value in found.items():
        not_negative(value, f"noise: {metric}")
    return found


class Reader:
    """Reads the blocks of a matrix, under its settings, and has their runs made."""

    def __init__(self, settings: Mapping[str, Any], noise: Mapping[str, float], runs: Runs) -> None:
        self.settings, self.noise, self.runs = dict(settings), noise, runs

    def block(self, name: Any, content: Any) -> Block:
        """A block with the runs of its cells."""
        where = f"block {name}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
            raise ConfigError(
                f"{where}: write its name with letters, digits and _ . + - only, in quotes (plots get it)"
            )
        keys = ("title", "text", "settings", "stage1", "start", "grid", "cells", "curves", "table", "claims")
        content = mapping(content, where, keys)
        runs = self._cells(content, where)
        equal(runs, name)
        metrics = {label: measured(run.settings) for label, (run, *_) in runs.items()}
        curves, table = (sequence(content.get(key), f"{where}, {key}") for key in ("curves", "table"))
        for key, names in (("curves", curves), ("table", table)):
            for metric in names:
                known(metric, itertools.chain(*metrics.values()), "metric", f"{where}, {key}")
        place = f"{where}, claims"
        claims = [self._claim(claim, runs, place) for claim in sequence(content.get("claims"), place)]
        title, words = (str(content.get(key) or default).strip() for key, default in (("title", name), ("text", "")))
        return Block(name, title, words, runs, curves, table, claims)

    def _cells(self, content: Mapping[str, Any], where: str) -> dict[str, list[Run]]:
        """The runs of a block's cells, by label."""
        shared, stage1 = (mapping(content.get(key), f"{where}, {key}") for key in ("settings", "stage1"))
        known_settings(stage1, f"{where}, stage1")
        for key in STAGE2:
            if key in stage1:
                raise ConfigError(f"{where}, stage1: '{key}' is a setting of stage 2; remove it")
        runs: dict[str, list[Run]] = {}
        for label, cell in cells(content, where):
            if label in runs:
                raise ConfigError(f"{where}: two cells are called '{label}'")
            place = f"{where}, cell '{label}'"
            own = mapping(cell, place)
            given = self.settings | shared | own
            starts = (given.pop("start", None), content.get("start"), "stage1")
            start = next(start for start in starts if start is not None)
            if start not in ("stage1", "export"):
                raise ConfigError(f"{place}: start must be stage1 (with its fake score) or export, not {start}")
            known_settings(given, place)
            runs[label] = self.runs.of_cell(given, stage1, start == "export", place)
            if lost := [key for key in own if key in stage1 and runs[label][0].stage == "stage 1"]:
                raise ConfigError(f"{place} is a stage 1; set '{lost[0]}' in the block's stage1 instead")
        if not runs:
            raise ConfigError(f"{where} has no cells and no grid")
        return runs

    def _claim(self, content: Any, cells: Mapping[str, Sequence[Run]], where: str) -> Claim:
        """A claim about these cells."""
        content = mapping(content, where, [field.name for field in fields(Claim)])
        content = {key: value for key, value in content.items() if value is not None}
        try:
            claim = Claim(**content)
        except TypeError as error:
            raise ConfigError(f"{where}: a claim needs higher, lower and metric; this one is {content}") from error
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        for label in (claim.higher, claim.lower):
            known(label, cells, "cell", where)
            known(claim.metric, measured(cells[label][0].settings), "metric", f"{where}, cell '{label}'")
        decidable(claim, cells, f"{where}, {claim}")
        return replace(claim, noise=content.get("noise", self.noise.get(claim.metric, 0.0)))


def cells(content: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """The cells of a block by label: those that it names, then the points of its grid."""
    for label, cell in mapping(content.get("cells"), f"{where}, cells").items():
        yield str(label), cell
    where = f"{where}, grid"
    axes = {key: sequence(values, f"{where}: {key}") for key, values in mapping(content.get("grid"), where).items()}
    for key, values in axes.items():
        if not values:
            raise ConfigError(f"{where}: {key} has no values")
    for chosen in itertools.product(*axes.values()) if axes else ():
        point = dict(zip(axes, chosen, strict=True))
        yield ", ".join(f"{key} {short(value)}" for key, value in point.items()), point


def mapping(content: Any, where: str, keys: Iterable[str] | None = None) -> dict[Any, Any]:
    """A mapping, of these keys if they are given; nothing is an empty one.

    Raises:
        ConfigError: It is something else, or has a key that nothing reads.
    """
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping, not {reprlib.repr(content)}")
    for key in content if keys is not None else ():
        known(key, keys or (), "key", where)
    return content


def sequence(content: Any, where: str) -> list[Any]:
    """A list; nothing is an empty one.

    Raises:
        ConfigError: It is something else.
    """
    content = [] if content is None else content
    if not isinstance(content, list):
        raise ConfigError(f"{where} must be a list, not {reprlib.repr(content)}")
    return content


def known(name: Any, names: Iterable[str], what: str, where: str) -> None:
    """Refuse a name that nothing has."""
    names = [str(name) for name in names]
    if name not in names:
        raise ConfigError(f"{where}: unknown {what} '{name}'{registry.suggest(str(name), names)}")


def known_settings(given: Mapping[str, Any], where: str) -> None:
    """Refuse settings that are not a cell's; a run refuses those that it does not know."""
    for key in given:
        if key in ELSEWHERE:
            raise ConfigError(f"{where}: a cell may not set '{key}': {ELSEWHERE[key]}")


def equal(cells: Mapping[str, Sequence[Run]], block: str) -> None:
    """Refuse to compare a cell with itself, or cells of different length or number of samples.

    A stage 1 beside what starts from it is shorter.

    Raises:
        ConfigError: Names two such cells.
    """
    firsts = {f"'{label}'": run for label, (run, *_) in cells.items()}
    starts = {f"the stage 1 of {label}": run.start for label, run in firsts.items() if run.start}
    seen = dict[str, str]()
    for label, run in firsts.items():
        if run.name in seen:
            raise ConfigError(f"block {block}: {seen[run.name]} and {label} are the same run")
        seen[run.name] = label
    shorter = {start.name for start in starts.values()}
    updates, samples = dict[int, str](), dict[int, str]()
    for label, run in (firsts | starts).items():
        samples.setdefault(run.settings.config.num_eval_samples, label)
        if run.name not in shorter:
            updates.setdefault(run.updates, label)
    for what, found in (("updates", updates), ("samples", samples)):
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise ConfigError(f"block {block}: {first} has {one} {what}, but {second} has {other}")


def not_negative(value: Any, what: str) -> None:
    """Refuse what is no finite number of at least 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ConfigError(f"{what} must be a number of at least 0, not {reprlib.repr(value)}")


def decidable(claim: Claim, cells: Mapping[str, Sequence[Run]], where: str) -> None:
    """Refuse a claim about early updates that both cells do not have, or have in common, or at other evaluations.

    Raises:
        ConfigError: Says why, after the place.
    """
    if claim.until is None:
        return
    early = []
    for label in (claim.higher, claim.lower):
        run = cells[label][0]
        first, _ = run.evaluations[0]
        if claim.until < first:
            raise ConfigError(f"{where}: '{label}' is first evaluated after {first} updates; raise until")
        if claim.until > run.updates:
            raise ConfigError(f"{where}: '{label}' has only {run.updates} updates; lower until")
        early.append([evaluation for evaluation in run.evaluations if evaluation[0] <= claim.until])
    if [step for step, _ in early[0]] != [step for step, _ in early[1]]:
        raise ConfigError(
            f"{where}: the two cells are evaluated after different updates: make eval_steps and stages equal"
        )
    if early[0] == early[1]:
        raise ConfigError(f"{where}: up to until both cells are the same run, {early[0][-1][1]}")
