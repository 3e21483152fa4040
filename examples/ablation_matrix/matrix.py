"""From a YAML of axes to runs: which cells there are, what each is called, and from which stage 1 it starts."""

import hashlib
import itertools
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from metrics import measured, short

from dmdr import registry
from dmdr.assemble import check_needs
from dmdr.checkpoint import checkpoints
from dmdr.errors import ConfigError
from dmdr.settings import Settings, parse, read_yaml
from dmdr.trainer import WeightedObjective

# What a stage 1 does without, so that cells which differ in nothing else share it; it distils with a dmd_weight of 1.
STAGE2 = ("rl", "rl_weight", "dmd_weight", "stage2_steps", "stage2_learning_rate", "stage2_fake_learning_rate")
# What a folder is named after; a digest tells of the rest.
AXES = (
    *("reward", "dmd_weight", "rl_weight", "reward_tilt", "dyna_guidance", "dyna_renoise"),
    *("num_inference_steps", "guidance_scale"),
)
RUNNER = ("seed", "output_dir", "init_student", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "config")


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        name: Of the folder: what it varies, its seed, and a digest of all its settings.
        settings: Resolved; `init_student` is a place in the run folder of `start`.
        start: The stage 1 that it goes on from; None for a run that is its own beginning.
    """

    name: str
    settings: Settings
    start: "Run | None"

    @property
    def seed(self) -> int:
        return self.settings.config.seed

    @property
    def updates(self) -> int:
        """Student updates in all, those of its stage 1 included."""
        config = self.settings.config
        return config.stage2_steps + (self.start.updates if self.start else config.stage1_steps)

    def folder(self, root: Path) -> Path:
        return root / "cells" / self.name

    def values(self) -> dict[str, Any]:
        """What `config.yaml` of the run holds."""
        return values_of(self.settings)

    def state(self, root: Path) -> str:
        """ "finished", "begun" (there is a checkpoint to go on from) or "new"; other settings are another run.

        The page `report.html` is what a run writes last.
        """
        folder, config = self.folder(root), self.settings.config
        if _moved(_read(yaml.safe_load, folder / "config.yaml")) != _moved(self.values()):
            return "new"
        evaluation = _read(json.loads, folder / "evaluation.json")
        complete = evaluation.get("samples") == config.num_eval_samples and self.stage in evaluation["columns"]
        if complete and (folder / "report.html").is_file():
            return "finished"
        return "begun" if checkpoints(folder) else "new"

    def changed(self) -> bool:
        """Whether a plugin's file is no longer what it was when the matrix was read."""
        try:
            return not self.name.endswith(digest(self.settings))
        except OSError:
            return True

    @property
    def stage(self) -> str:
        """The column of `evaluation.json` that counts."""
        return "stage 2" if self.settings.config.stage2_steps else "stage 1"


@dataclass(frozen=True)
class Claim:
    """A direction that the paper reports: one cell above another in a metric.

    Attributes:
        higher, lower: Labels of two cells of the block.
        metric: As `evaluation.json` calls it, or "reward_gap" (trained minus held-out reward).
        until: Compare the mean of the evaluations up to this update; None for the final ones.

    Raises:
        ConfigError: For a value of another type.
    """

    higher: str
    lower: str
    metric: str
    until: int | None = None

    def __post_init__(self) -> None:
        for name in ("higher", "lower", "metric"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be text, not {reprlib.repr(getattr(self, name))}")
        if self.until is not None and (type(self.until) is not int or self.until < 1):
            raise ConfigError(f"until must be a whole number of at least 1, not {reprlib.repr(self.until)}")


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
    """All blocks, and each of their runs once; a run comes after the one that it starts from."""

    seeds: Sequence[int]
    blocks: Sequence[Block]
    runs: Sequence[Run]


def load(file: Path, root: Path, *, quick: bool = False) -> Matrix:
    """Read a matrix and check every setting of every cell; an entry with nothing in it is as if it were left out.

    Args:
        file: `settings` of all runs, `seeds`, `blocks`, and under `quick` what a quick look has in their place.
        root: Where the run folders lie.
        quick: Only the blocks that `quick` names, under its settings and seeds.

    Raises:
        ConfigError: For whatever is unknown or cannot be meant, with its place.
    """
    content = mapping(read_yaml(str(file)), "the matrix", ("settings", "seeds", "blocks", "quick"))
    blocks, seeds = mapping(content.get("blocks"), "blocks"), content.get("seeds")
    settings = mapping(content.get("settings"), "settings")
    if not blocks:
        raise ConfigError(f"{file} has no blocks: a mapping of figures and tables")
    if quick:
        instead = mapping(content.get("quick"), "quick", ("settings", "seeds", "blocks"))
        names = sequence(instead.get("blocks"), "quick: blocks")
        for name in names:
            known(name, blocks, "block", "quick: blocks")
        blocks = {name: blocks[name] for name in names} or blocks
        seeds = seeds if instead.get("seeds") is None else instead["seeds"]
        settings = settings | mapping(instead.get("settings"), "quick: settings")
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise ConfigError(f"seeds must be a list of whole numbers of at least 0, not {reprlib.repr(seeds)}")
    builder = Builder(settings, sorted(set(seeds)), root)
    made = [builder.block(name, block) for name, block in blocks.items()]
    return Matrix(builder.seeds, made, list(builder.runs.values()))


class Builder:
    """Makes the runs of a matrix, each once."""

    def __init__(self, settings: Mapping[str, Any], seeds: Sequence[int], root: Path) -> None:
        self.settings, self.seeds, self.root = dict(settings), seeds, root
        known_settings(settings, "settings")
        self.base = values_of(plain(settings))
        self.runs: dict[str, Run] = {}

    def block(self, name: str, content: Any) -> Block:
        """A block with the runs of its cells."""
        where = f"block {name}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
            raise ConfigError(f"{where}: its plots are named after it: letters, digits and any of _ . + - in quotes")
        keys = ("title", "text", "settings", "stage1", "start", "grid", "cells", "curves", "table", "claims")
        content = mapping(content, where, keys)
        shared, stage1 = (mapping(content.get(key), f"{where}, {key}") for key in ("settings", "stage1"))
        known_settings(stage1, f"{where}, stage1")
        for key in STAGE2:
            if key in stage1:
                raise ConfigError(f"{where}, stage1: '{key}' is a setting of stage 2, which a stage 1 does without")
        runs: dict[str, list[Run]] = {}
        for label, cell in cells(content, where):
            if label in runs:
                raise ConfigError(f"{where}: two cells are called '{label}'")
            place = f"{where}, cell '{label}'"
            given = self.settings | shared | mapping(cell, place)
            starts = (given.pop("start", None), content.get("start"), "stage1")
            start = next(start for start in starts if start is not None)
            if start not in ("stage1", "export"):
                raise ConfigError(f"{place}: start must be stage1 (with its fake score) or export, not {start}")
            known_settings(given, place)
            runs[label] = self.cell(given, stage1, start == "export", place)
            if lost := [key for key in mapping(cell, place) if key in stage1 and not runs[label][0].start]:
                raise ConfigError(f"{place} is a stage 1, and '{lost[0]}' is for the block's stage1 to say")
        if not runs:
            raise ConfigError(f"{where} has no cells and no grid")
        equal(runs, name)
        metrics = {label: measured(run.settings) for label, (run, *_) in runs.items()}
        curves, table = (sequence(content.get(key), f"{where}, {key}") for key in ("curves", "table"))
        for key, names in (("curves", curves), ("table", table)):
            for metric in names:
                known(metric, itertools.chain(*metrics.values()), "metric", f"{where}, {key}")
        place = f"{where}, claims"
        claims = [_claim(claim, metrics, place) for claim in sequence(content.get("claims"), place)]
        title, words = (str(content.get(key) or default).strip() for key, default in (("title", name), ("text", "")))
        return Block(name, title, words, runs, curves, table, claims)

    def cell(self, given: dict[str, Any], stage1: dict[str, Any], export: bool, where: str) -> list[Run]:
        """A cell's run of each seed, from the stage 1 that all cells with the same first settings share."""
        # Without dmd_weight, for one of 0 needs the start that is not known yet.
        alone = resolve({key: value for key, value in given.items() if key != "dmd_weight"}, where)
        settings = resolve(given | {"init_student": "?"} if alone.config.stage2_steps else given, where)
        config = settings.config
        own = {name for p in settings.of("objectives") for option in p.options for name in (option, p.key(option))}
        first = {key: value for key, value in given.items() if key not in STAGE2 and key not in own}
        first = first | stage1 | {"rl": "none", "stage2_steps": 0}
        if config.stage2_steps == 0:
            return [self.run(resolve(first, where), seed) for seed in self.seeds]
        if config.stage1_steps == 0:
            raise ConfigError(f"{where}: stage1_steps is 0, and stage 2 starts from a stage 1")
        begun = resolve(first, f"{where}, its stage 1")
        starts = [self.run(begun, seed) for seed in self.seeds]
        return [self.run(settings, start.seed, start, export) for start in starts]

    def run(self, settings: Settings, seed: int, start: Run | None = None, export: bool = False) -> Run:
        """The run of these settings, made unless it is there."""
        place = start and start.folder(self.root) / ("student" if export else "")
        config = replace(settings.config, seed=seed, init_student=None if place is None else str(place))
        settings = replace(settings, config=config)
        values = values_of(settings)
        axes = [key for key in AXES if values[key] != self.base[key] and (start or key not in STAGE2)]
        words = [f"{key}_{short(values[key])}" for key in axes] + ["from_export"] * export
        words = [f"stage2_{short(config.rl)}" if start else "stage1", *words]
        while len("-".join(words)) > 90 and len(words) > 1:
            words.pop()  # the digest tells of it
        name = "-".join(words)[:90]
        for ugly, plain in {", ": "_", "*": "x", "[": "", "]": ""}.items():
            name = name.replace(ugly, plain)
        name = re.sub(r"[^\w.+-]", "_", name) + f"-seed{seed}-{digest(settings)}"
        return self.runs.setdefault(name, Run(name, settings, start))


def plain(settings: Mapping[str, Any]) -> Settings:
    """What a folder's name is silent about: the matrix's own settings, if they make a run, or else the model's."""
    try:
        return parse(settings=settings)
    except ConfigError:  # of which `resolve` tells if it is wrong in a cell
        return parse(settings={key: value for key, value in settings.items() if key == "model"})


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


def digest(settings: Settings) -> str:
    """Of all settings, wherever the matrix lies, and of the files whose plugins they name, as they are now."""
    found = hashlib.sha256(json.dumps(_moved(values_of(settings)), sort_keys=True).encode())
    for name in (settings.config.backend or "", *(plugin.name for plugin in settings.plugins)):
        file, _, _ = name.rpartition(":")
        if file.endswith(".py"):
            found.update(Path(file).expanduser().read_bytes())
    return found.hexdigest()[:6]


def values_of(settings: Settings) -> dict[str, Any]:
    """Settings as a file holds them, tuples as lists."""
    values: dict[str, Any] = json.loads(json.dumps(settings.values()))
    return values


def resolve(given: Mapping[str, Any], where: str) -> Settings:
    """Settings as a run resolves them, its objectives' needs checked.

    Raises:
        ConfigError: As a run would, after the place.
    """
    try:
        settings = parse(settings=given)
        objectives = tuple(WeightedObjective(p.name, p.weight, p.build()) for p in settings.of("objectives"))
        check_needs(settings.config, objectives, settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if settings.config.num_eval_samples == 0:
        raise ConfigError(f"{where}: num_eval_samples is 0, and there is nothing to compare")
    return settings


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
    """Refuse settings that are the matrix's own to make; a run refuses those that it does not know."""
    for key in given:
        if key in RUNNER:
            raise ConfigError(
                f"{where}: '{key}' is no setting of a cell: the matrix makes it" + " (seeds)" * (key == "seed")
            )


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
            raise ConfigError(f"block {block}: {first} has {one} {what}, {second} {other}")


def _claim(content: Any, metrics: Mapping[str, Iterable[str]], where: str) -> Claim:
    """A claim about cells whose metrics are given by label."""
    content = mapping(content, where, ("higher", "lower", "metric", "until"))
    try:
        claim = Claim(**content)
    except TypeError as error:
        raise ConfigError(f"{where}: a claim has higher, lower and metric; this one is {content}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    for label in (claim.higher, claim.lower):
        known(label, metrics, "cell", where)
        known(claim.metric, metrics[label], "metric", f"{where}, cell '{label}'")
    return claim


def _read(load: Any, file: Path) -> dict[str, Any]:
    """A mapping in a file; nothing where it is missing or torn."""
    try:
        content = load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _moved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that do not depend on where the matrix lies."""
    start = values.get("init_student")
    return dict(values) | {"init_student": start and str(start).replace("\\", "/").rpartition("cells/")[2]}
