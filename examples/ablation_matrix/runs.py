"""What a run of the matrix is: its settings and its name, its state, and the stage 1 that it goes on from."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from dmdr.errors import ConfigError
from dmdr.run.checkpoint import checkpoints
from dmdr.run.job import open_prompts, planned, readers
from dmdr.run.real_images import open_real_images
from dmdr.settings.chosen import Chosen
from dmdr.settings.fields import Config
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.settings.parse import Settings, resolve
from dmdr.settings.trackers import trackers_of
from dmdr.settings.verify import check_columns

from .metrics import short

# What a stage 1 does without, so that cells which differ in nothing else share it; it distils with a dmd_weight of 1.
STAGE2 = (
    *("rl", "rl_weight", "rl_balance", "rl_weight_schedule", "rl_warmup_steps", "dmd_weight"),
    *("stage2_steps", "stage2_learning_rate", "stage2_fake_learning_rate"),
)
# What a folder is named after; a digest tells of the rest.
AXES = (
    *("matching", "reward", "dmd_weight", "rl_weight", "rt_dm_reward_tilt", "dyna_guidance", "dyna_renoise"),
    *("num_inference_steps", "guidance_scale"),
)
# What decides whether the inputs of a run can be found.
INPUTS = (
    *("model", "revision", "backend", "reward", "eval_reward", "prompts", "prompt_column", "dataset_config"),
    *("dataset_train_split", "dataset_streaming", "optim", "report_to"),
    *("real_images", "caption_column", "matching", "rl", "sample_weight"),  # the last three may read real images
)


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

    @property
    def evaluations(self) -> list[tuple[int, str]]:
        """After how many updates in all there is an evaluation, and of which run: of its stage 1 first."""
        before, every = self.start.evaluations if self.start else [], self.settings.config.eval_steps
        begun = self.start.updates if self.start else 0
        steps = range(begun + every, self.updates, every) if every else ()
        return [*before, *((step, self.name) for step in (*steps, self.updates))]

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
        except ConfigError:
            return True

    @property
    def stage(self) -> str:
        """The column of `evaluation.json` that counts."""
        return "stage 2" if self.settings.config.stage2_steps else "stage 1"


class Runs:
    """Makes the runs of a matrix, each once.

    Args:
        settings: The matrix's own, of which the names of folders are silent.
        root: Where the run folders lie.
        inputs: Look whether models, prompts and the like can be found.
    """

    def __init__(self, settings: Mapping[str, Any], seeds: Sequence[int], root: Path, inputs: bool) -> None:
        self.seeds, self.root, self.inputs = seeds, root, inputs
        self.base = values_of(plain(settings))
        self.made: dict[str, Run] = {}
        self.looked_at = set[tuple[str, ...]]()
        self.told = set[str]()  # flags of plugins that some cell sets

    def of_cell(self, given: dict[str, Any], stage1: dict[str, Any], export: bool, where: str) -> list[Run]:
        """A cell's run of each seed, from the stage 1 that all cells with the same first settings share."""
        # Without dmd_weight, for one of 0 needs the start that is not known yet.
        alone = self._resolved({key: value for key, value in given.items() if key != "dmd_weight"}, where)
        settings = self._resolved(given | {"init_student": "?"} if alone.config.stage2_steps else given, where)
        config = settings.config
        self.told |= {
            names[0] for plugin in settings.plugins for names in flags(plugin) if not given.keys().isdisjoint(names)
        }
        own = {name for plugin in settings.of("objectives") for names in flags(plugin) for name in names}
        first = {key: value for key, value in given.items() if key not in STAGE2 and key not in own}
        first = first | stage1 | {"rl": "none", "stage2_steps": 0}
        if config.stage2_steps == 0:
            return [self._run(self._resolved(first, where), seed) for seed in self.seeds]
        if config.stage1_steps == 0:
            if export:
                raise ConfigError(
                    f"{where}: start is export, but stage1_steps is 0, so there is no stage 1 to go on from"
                )
            settings = self._resolved(given, where)  # with its dmd_weight, without a start
            return [self._run(settings, seed) for seed in self.seeds]
        begun = self._resolved(first, f"{where}, its stage 1")
        starts = [self._run(begun, seed) for seed in self.seeds]
        return [self._run(settings, start.seed, start, export) for start in starts]

    def _resolved(self, given: Mapping[str, Any], where: str) -> Settings:
        """Settings as a run resolves them, its inputs and its objectives' needs checked.

        Raises:
            ConfigError: As a run would, after the place.
        """
        try:
            settings = resolve(settings=given)
            inputs = tuple(str(getattr(settings.config, name)) for name in INPUTS)
            plan, _, matching = planned(settings)
            if self.inputs and inputs not in self.looked_at:
                check_inputs(settings, readers(plan, settings.config, matching))
                self.looked_at.add(inputs)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        if settings.config.num_eval_samples == 0:
            raise ConfigError(f"{where}: num_eval_samples is 0, so there is nothing to compare; set it above 0")
        return settings

    def _run(self, settings: Settings, seed: int, start: Run | None = None, export: bool = False) -> Run:
        """The run of these settings, made unless it is there."""
        place = start and start.folder(self.root) / ("student" if export else "")
        config = replace(settings.config, seed=seed, init_student=None if place is None else str(place))
        settings = replace(settings, config=config)
        values = values_of(settings)
        varied = {key for key in AXES if key in values and values[key] != self.base.get(key)}
        axes = [key for key in AXES if key in varied and (config.stage2_steps or key not in STAGE2)]
        words = [f"{key}_{short(values[key])}" for key in axes] + ["from_export"] * export
        words = [f"stage2_{short(config.rl)}" if config.stage2_steps else "stage1", *words]
        while len("-".join(words)) > 90 and len(words) > 1:
            words.pop()  # the digest tells of it
        name = "-".join(words)[:90]
        for ugly, fair in {", ": "_", "*": "x", "[": "", "]": ""}.items():
            name = name.replace(ugly, fair)
        name = re.sub(r"[^\w.+-]", "_", name) + f"-seed{seed}-{digest(settings)}"
        return self.made.setdefault(name, Run(name, settings, start))


def flags(plugin: Chosen) -> list[tuple[str, ...]]:
    """The names of each of a plugin's flags: the full one, and the short one unless that means a setting of dmdr."""
    dmdrs = {field.name for field in fields(Config)}
    return [(plugin.key(option), *({option} - dmdrs)) for option in plugin.options]


def plain(settings: Mapping[str, Any]) -> Settings:
    """What a folder's name is silent about: the matrix's own settings, if they make a run, or else the model's."""
    for given in (settings, {key: value for key, value in settings.items() if key == "model"}):
        try:
            return resolve(settings=given)
        except ConfigError:  # `Runs` names the cell where it is wrong
            continue
    return resolve()


def digest(settings: Settings) -> str:
    """Of all settings, wherever the matrix lies, and of the files whose plugins they name, as they are now.

    Raises:
        ConfigError: If such a file cannot be read.
    """
    found = hashlib.sha256(json.dumps(_moved(values_of(settings)), sort_keys=True).encode())
    for name in (settings.config.backend or "", *(plugin.name for plugin in settings.plugins)):
        file, _, _ = name.rpartition(":")
        if file.endswith(".py"):
            try:
                found.update(Path(file).expanduser().read_bytes())
            except OSError as error:
                raise ConfigError(f"'{name}' cannot be read: {error.strerror}") from error
    return found.hexdigest()[:6]


def values_of(settings: Settings) -> dict[str, Any]:
    """Settings as a file holds them, tuples as lists."""
    values: dict[str, Any] = json.loads(json.dumps(settings.values()))
    return values


def check_inputs(settings: Settings, read_real: Sequence[str]) -> None:
    """Refuse what a run would refuse before it trains, but for what its named model has to build first.

    Args:
        read_real: The parts that read real images, as users name them.

    Raises:
        ConfigError: As a run would.
    """
    config = settings.config
    model = settings.model.cls() if settings.model.cls else None
    scorers = [*settings.of("rewards"), *settings.of("eval_rewards")]
    prompts = open_prompts(config, model, scorers)
    check_columns(scorers, prompts.first(1))
    if model is None:
        open_real_images(config, None, prompts, settings.open_backend(config.model), read_real)
    OPTIMIZERS[config.optim].load()
    trackers_of(config.report_to)


def last_line(log: Path) -> str:
    """The last line of a log that says something; a progress bar writes its over one another."""
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing in its log")


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
