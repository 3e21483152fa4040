"""The settings of a run: flags override YAML, YAML the model's recipe, the recipe the defaults."""

import dataclasses
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dmdr.errors import ConfigError
from dmdr.settings import kinds, registry
from dmdr.settings.chosen import ALONE, SUMS, Chosen, load, named_in, parts_of
from dmdr.settings.fields import Config, Flags, typed
from dmdr.settings.leftovers import left_out
from dmdr.settings.models import Model, check_place
from dmdr.settings.parser import Parser, Sources, Told, as_argparse_reads, check_own, first_look, parse_flags
from dmdr.settings.trust import PLACES, check_config
from dmdr.settings.unread import check_read

EPILOG = (
    "--help all lists every setting; --model NAME --help adds those of NAME's family, --rl, --reward and --matching "
    "NAME --help those of NAME. A registered model's recipe replaces these defaults."
)
DESCRIPTION = (
    "Distil a diffusion model to a few steps and align it with a reward, in the same run. dmdr-train init writes a "
    "file of settings to begin with."
)

# The settings that decide which others there are.
ASKED = ("model", *SUMS.values(), "reference_images", "backend", "revision", "architecture", "dry_run")
FOLDERS = ("resume_from_checkpoint", "output_dir")  # where the file may be that holds them

F = TypeVar("F", bound=Flags)

logger = logging.getLogger("dmdr")


@dataclass(frozen=True)
class Settings:
    """A resolved run: the core's settings, the model, and the plugins that it names, its family among them.

    Attributes:
        told: Which settings somebody has chosen.
    """

    config: Config
    model: Model
    plugins: tuple[Chosen, ...]
    told: Told = field(default=Told(), compare=False, repr=False)

    def of(self, group: str) -> list[Chosen]:
        return [plugin for plugin in self.plugins if plugin.group == group]

    def values(self) -> dict[str, Any]:
        """Every setting by its full name, but for where the run is written to."""
        values = dataclasses.asdict(self.config)
        for name in PLACES:
            del values[name]
        for plugin in self.plugins:
            values |= {plugin.key(name): value for name, value in plugin.options.items()}
        return values

    @property
    def family(self) -> Chosen:
        """The model family that trains."""
        (family,) = self.of("backends")
        return family

    def family_options(self) -> Any:
        """The family's `Options`: its own flags, and the settings of the core that it asks for.

        Raises:
            ConfigError: If it refuses their values.
        """
        return self.family.called(self.family.flags, self.family.values(self.config))

    def open_backend(self, folder: str, options: Any = None) -> Any:
        """The model family on a pipeline's folder, or hub id; loads no weights.

        Args:
            options: In place of those of the settings.

        Raises:
            ConfigError: If it refuses the folder, or the options for it.
        """
        return self.family.cls(folder, options or self.family_options())

    def as_yaml(self) -> str:
        """What `--config` reads to repeat the run, wherever it is written to."""
        return yaml.safe_dump(self.values(), sort_keys=False)


def parse(
    arguments: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    beginning: Callable[[str], None] | None = None,
) -> Settings:
    """Settings of a run from flags, over those given as a mapping, over `--config`, over the model's recipe.

    A run that is resumed takes its own `config.yaml` where no other is named.

    Args:
        arguments: Command-line flags.
        settings: Settings by name, as Python calls give them.
        beginning: Called with what is to be run, in a few words, before plugins are imported, which takes seconds; not
            for a dry run.

    Raises:
        ConfigError: For anything unknown, malformed, contradictory or without effect.
        SystemExit: After printing `--help`.
    """
    found = resolve(arguments, settings, beginning)
    check_read(found.config, found.plugins, found.told)
    for plugin in found.plugins:
        for doubt in kinds.doubts(plugin.group.removeprefix("eval_"), plugin.cls):
            logger.warning("%s '%s' %s", kinds.NOUNS[plugin.group], plugin.title, doubt)
    return found


def resolve(
    arguments: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    beginning: Callable[[str], None] | None = None,
) -> Settings:
    """As `parse`, but settings may be without effect: of those that several runs share.

    Raises:
        ConfigError: For anything unknown, malformed or contradictory.
        SystemExit: After printing `--help`.
    """
    arguments, settings = as_argparse_reads(arguments), _names(settings or {})
    first = first_look(arguments, *ASKED, *FOLDERS)
    in_file = _in_file(first, settings)
    recipe = {"architecture": in_file.pop("architecture")} if "architecture" in in_file else {}  # which it lies beside
    asked = {key: _first_given(getattr(first, key), settings.get(key), in_file.get(key)) for key in ASKED}
    about = {
        "prog": "dmdr-train",
        "description": DESCRIPTION,
        "epilog": f"{EPILOG} {installed(*kinds.GROUPS)}",
    }
    if first.help and all(asked[key] is None for key in ("model", "backend", *SUMS.values())):
        Parser(Config, whole=first.help == "all", **about).print_help()
        raise SystemExit(0)

    bare = _first_given(asked["architecture"], recipe.get("architecture"))  # what --dry_run can do with for a model
    if not first.help:
        check_own(Config, Sources(file=in_file, settings=settings, arguments=arguments), **about)
        _check_names(asked, bare)
        if beginning and not _is_dry(asked):
            beginning(_in_short({**asked, "model": _first_given(asked["model"], bare, Config.model)}))
    # Models and plugins are imported from here on, and torch with them.
    model = _find_model(_first_given(asked["model"], bare))
    recipe |= {"model": model.typed, **(model.cls.recipe if model.cls else {})}  # type: ignore[attr-defined]
    if asked["reference_images"] is not None:  # distances to images, by DINOv2 alone
        recipe = {"eval_benchmark": "distribution", "distribution_networks": "dino"} | recipe
    sums = {key: str(_first_given(asked[key], recipe.get(key), getattr(Config, key))) for key in SUMS.values()}
    typed_weight = _first_given(first.sample_weight, settings.get("sample_weight"))
    unweighted = sums["reward"] == "none" and typed_weight is None and sums["sample_weight"] == Config.sample_weight
    if unweighted:  # there is nothing to weigh samples by
        recipe["sample_weight"] = sums["sample_weight"] = "none"
    untyped = {group: key for group, key in SUMS.items() if asked[key] is None}
    chosen = _choose(sums, {group: model.distribution if key in recipe else "dmdr" for group, key in untyped.items()})
    chosen.append(_family(model, asked, bare))
    here = {"model": model.typed, "backend": asked["backend"]}
    moved = any(key in in_file and str(in_file[key]) != str(value) for key, value in here.items())
    dropped = left_out(in_file, chosen, moved) | ({"sample_weight"} if unweighted else set())
    file = {key: value for key, value in in_file.items() if key not in dropped}
    sources = Sources(_fitted(recipe, chosen), file, settings, arguments)
    config, plugins, told = parse_flags(Config, chosen, sources, whole=first.help == "all", **about)
    resolved = Settings(config, model, plugins, told)
    resolved.family_options()  # refuses invalid values
    return resolved


def _in_file(first: Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `--config`, or else of the run that is resumed; paths of a recipe lie beside it.

    Raises:
        ConfigError: If the folder of that run says what only the user may.
    """
    given = {key: _first_given(getattr(first, key), settings.get(key)) for key in (*ASKED, *FOLDERS)}
    resume, output = (given[key] for key in FOLDERS)
    file = first.config or (resume and _config_of(resume, output))
    if not file:
        return {}
    values = _names(read_yaml(file, "--config" if first.config else "--resume_from_checkpoint"))
    if not first.config:
        check_config(file, values, {key: value for key, value in values.items() if given.get(key) is None})
    if isinstance(values.get("architecture"), str):
        values["architecture"] = str(Path(file).parent / values["architecture"])
    return values


def _names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, of which those that are names of parts and places are text: they are looked at before all others."""
    text = {f.name: f.type for f in dataclasses.fields(Config) if f.name in (*ASKED, *FOLDERS) and f.type is not bool}
    given = {key: values[key] for key in text.keys() & values.keys() if values[key] is not None}
    return {**values, **{key: typed(f"--{key}", value, text[key]) for key, value in given.items()}}


def _check_names(asked: Mapping[str, Any], architecture: Any) -> None:
    """Refuse names that nobody has, as `_choose` and `_family` would, but before anything is imported.

    Raises:
        ConfigError: Names the known ones.
    """
    for group, term in parts_of({key: asked[key] for key in SUMS.values() if asked[key] is not None}):
        registry.check_name(group.removeprefix("eval_"), term.name)
    if asked["backend"]:
        registry.check_name("backends", asked["backend"])
    model = asked["model"]
    if model and not architecture and not registry.registered("models", model):
        check_place(model)


def _in_short(asked: Mapping[str, Any]) -> str:
    """What somebody asks for; the model's recipe, which decides the rest, has not been read."""
    return ", ".join(f"{key} {asked[key]}" for key in ("model", *SUMS.values()) if asked[key] is not None)


def _find_model(name: Any) -> Model:
    """The model of this name, folder or id, or else the default one."""
    if name is None:  # of several models of the default's name, nobody has typed a stranger's
        name = registry.typed_names("models")[registry.find("models", Config.model, own="dmdr")]
    return Model.find(str(name))


def _choose(sums: Mapping[str, str], own: Mapping[str, str]) -> list[Chosen]:
    """The plugins that sums name by setting; `own` is the distribution of those that nobody typed, by group."""
    chosen = load(parts_of(sums), own)
    for group, why in ALONE.items():
        weights = [plugin.weight for plugin in chosen if plugin.group == group]
        if weights != [1.0] and (weights or group == "matchings"):
            raise ConfigError(f"--{SUMS[group]} {sums[SUMS[group]]}: write the name of one {kinds.NOUNS[group]}; {why}")
    return chosen


def _family(model: Model, asked: Mapping[str, Any], architecture: Any) -> Chosen:
    """The model family that trains; only --dry_run reads the architecture."""
    place = (asked["backend"], asked["revision"], architecture if _is_dry(asked) else None)
    name, cls = model.family(*(None if value is None else str(value) for value in place))
    return Chosen("backends", name, name, 1.0, cls)


def _is_dry(asked: Mapping[str, Any]) -> bool:
    said = asked["dry_run"]
    return said.lower() in ("true", "1", "yes", "y", "t") if isinstance(said, str) else said is True


def _fitted(recipe: Mapping[str, Any], chosen: Sequence[Chosen]) -> dict[str, Any]:
    """A model's recipe for these plugins: with what it says of their objectives, under the flags that they have."""
    found = dict(recipe)
    per_objective = found.pop("objectives", {})
    for plugin in reversed(chosen):  # of several objectives, the first named has the last word
        if plugin.group == "objectives":
            found |= per_objective.get(plugin.name, {})
    for plugin in chosen:
        found |= plugin.relabelled(found)
    return found


def parse_command(
    command: type[F], arguments: Sequence[str], *, prog: str, description: str
) -> tuple[F, tuple[Chosen, ...]]:
    """The flags of a command that only scores, over `--config`, and the rewards and the benchmark that it names.

    Args:
        command: The command's own flags, a dataclass.
        arguments: Command-line flags.
        prog, description: What `--help` says of the command.

    Raises:
        ConfigError: For anything unknown, malformed or missing.
        SystemExit: After printing `--help`.
    """
    arguments = as_argparse_reads(arguments)
    first = first_look(arguments, "reward", "benchmark")
    file = read_yaml(first.config) if first.config else {}
    reward, benchmark = (
        _first_given(getattr(first, key), file.get(key), getattr(command, key, None)) for key in ("reward", "benchmark")
    )
    chosen: list[Chosen] = []
    usual = None
    if benchmark == "none":
        benchmark = None if reward is None else command.of_rewards  # type: ignore[attr-defined]
    if first.help and first.benchmark is None:
        benchmark = None  # nobody asks for its flags, and importing it takes seconds
    if benchmark is not None:
        name = str(benchmark)
        chosen = [Chosen("benchmarks", name, name, 1.0, registry.load("benchmarks", name))]
        usual = getattr(chosen[0].cls, "reward", None)
        if usual is None and reward is not None:
            raise ConfigError(f"--reward: benchmark '{name}' does not score by rewards; leave it out")
        reward = _first_given(reward, usual)
    rewards = load(named_in("rewards", str(reward)), {}) if reward is not None else []
    measures = hasattr(command, "benchmark")
    names = "--benchmark NAME or --reward NAME" if measures else "--reward NAME"
    groups = ("benchmarks", "rewards", "models") if measures else ("rewards", "models")
    epilog = f"{names} --help adds the flags of NAME. {installed(*groups)}"
    sources = Sources(file=file, arguments=arguments)
    options, plugins, _ = parse_flags(
        command, [*chosen, *rewards], sources, prog=prog, description=description, epilog=epilog
    )
    if reward is not None and not rewards and (benchmark is None or usual != "none"):
        raise ConfigError(f"--reward {reward} names no reward")
    return options, plugins


def installed(*groups: str) -> str:
    """A sentence of the installed names by group; imports no plugin."""
    names = "; ".join(f"{group}: {', '.join(registry.plugins(group))}" for group in groups)
    return f"Installed {names}."


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


class _Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML keeps the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"the key '{key.value}' is there twice, in lines {lines[name]} and {line}")
            lines[name] = line
        return node


def read_yaml(path: str, flag: str = "--config") -> dict[str, Any]:
    """A mapping of settings.

    Args:
        path: The file.
        flag: What led to it, for messages.

    Raises:
        ConfigError: If the file is missing, holds no mapping, or has a key twice.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Strict)
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{flag}: {path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{flag}: {path} is no YAML of settings: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter of bytes that are no text, and of impossible dates
        raise ConfigError(f"{flag}: {path} is no YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{flag}: {path} must hold a mapping of settings")
    return values


def _config_of(resume: str, output: str | None) -> str | None:
    """The settings of the run that is resumed, where they can be found."""
    folder = Path(resume).resolve().parent.parent if resume != "latest" else Path(output) if output else None
    return str(folder / "config.yaml") if folder and (folder / "config.yaml").is_file() else None
