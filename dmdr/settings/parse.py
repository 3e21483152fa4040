"""Flags over YAML over the model's recipe over the defaults: the settings of a run, and the plugins that it names."""

import argparse
import dataclasses
import inspect
import logging
import re
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from trl import TrlParser

from dmdr.errors import ConfigError, Refusing
from dmdr.settings import registry
from dmdr.settings.expression import parse_sum
from dmdr.settings.fields import COMMON, TOPICS, Config, Flags, check_types
from dmdr.settings.models import Model

logger = logging.getLogger(__name__)
EPILOG = (
    "--help all lists every setting; --model NAME --help adds those of NAME's family, --rl, --reward and --matching "
    "NAME --help those of NAME. A registered model's recipe replaces these defaults."
)
DESCRIPTION = "Distil a diffusion model to a few steps and align it with a reward, in the same run."
SUMS = {
    "objectives": "rl",
    "rewards": "reward",
    "eval_rewards": "eval_reward",
    "matchings": "matching",
    "sample_weights": "sample_weight",
}
ALONE = {"matchings": "--dmd_weight is its weight", "sample_weights": "weights of samples do not add up"}
F = TypeVar("F", bound=Flags)


@dataclass(frozen=True)
class Chosen:
    """A plugin that the run names: `weight * name`, its class, and the values of its own flags.

    Attributes:
        group: That of the registry, or "eval_rewards": rewards that only measure.
        options: Values by field; of a backend, of its `Options`.
    """

    group: str
    name: str
    weight: float
    cls: type
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def flags(self) -> type:
        """The dataclass whose fields are its flags."""
        flags: type = registry.flags_of(self.group, self.cls)
        return flags

    def key(self, option: str) -> str:
        """The full name of one of its flags; a model family's have no other than their own."""
        if self.group == "backends":
            return option
        key = f"{re.sub(r'[^0-9a-zA-Z]', '_', self.name)}_{option}"
        if self.group == "eval_rewards":
            return f"eval_{key}"
        return f"_{key}" if key[0].isdigit() else key

    def build(self, **defaults: Any) -> Any:
        """The plugin, from its flags; `defaults` fill those left unset (None).

        Raises:
            ConfigError: If it refuses their values (a ValueError).
        """
        unset = {key: value for key, value in defaults.items() if self.options.get(key) is None}
        return self.called(self.cls, self.options | unset)

    def called(self, cls: type, values: Mapping[str, Any]) -> Any:
        """An instance of one of the plugin's classes.

        Raises:
            ConfigError: If it refuses its values (a ValueError).
        """
        try:
            return cls(**values)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{self.group[:-1]} '{self.name}': {error}") from error


@dataclass(frozen=True)
class Settings:
    """A resolved run: the core's settings, the model, and the plugins that it names, its family among them."""

    config: Config
    model: Model
    plugins: tuple[Chosen, ...]

    def of(self, group: str) -> list[Chosen]:
        return [plugin for plugin in self.plugins if plugin.group == group]

    def values(self) -> dict[str, Any]:
        """Every setting by its full name, but for where the run is written to."""
        values = dataclasses.asdict(self.config)
        for name in ("dry_run", "architecture", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"):
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
        flags, core = self.family.flags, dataclasses.asdict(self.config)
        shared = {f.name: core[f.name] for f in dataclasses.fields(flags) if f.init and f.name in core}
        return self.family.called(flags, self.family.options | shared)

    def open_backend(self, folder: str) -> Any:
        """The model family on a pipeline's folder, or hub id; loads no weights.

        Raises:
            ConfigError: If it refuses the folder, or the options for it.
        """
        return self.family.cls(folder, self.family_options())

    def as_yaml(self) -> str:
        """What `--config` reads to repeat the run, wherever it is written to."""
        return yaml.safe_dump(self.values(), sort_keys=False)


def parse(arguments: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Settings:
    """Settings of a run from flags, over those given as a mapping, over `--config`, over the model's recipe.

    A run that is resumed takes its own `config.yaml` where no other is named.

    Args:
        arguments: Command-line flags.
        settings: Settings by name, as Python calls give them.

    Raises:
        ConfigError: For anything unknown, malformed or contradictory.
        SystemExit: After printing `--help`.
    """
    arguments = _joined(arguments)
    names = ("model", *SUMS.values())
    place = ("backend", "revision", "architecture")
    first = _first_look(arguments, *names, *place, "dry_run", "resume_from_checkpoint", "output_dir")
    settings = dict(settings or {})
    resume, output = (settings.get(k) or getattr(first, k) for k in ("resume_from_checkpoint", "output_dir"))
    file = first.config or (resume and _config_of(resume, output))
    given = read_yaml(file) if file else {}
    if file and isinstance(given.get("architecture"), str):  # a recipe's, beside its YAML
        given["architecture"] = str(Path(file).parent / given["architecture"])
    in_file = dict(given)
    given |= settings
    if first.model is None and (bare := first.architecture or given.get("architecture")):
        given.setdefault("model", bare)  # of which there is no recipe; only --dry_run can do with it
    look = {key: _first_given(getattr(first, key), given.get(key)) for key in names}
    about = {"prog": "dmdr-train", "description": DESCRIPTION, "epilog": f"{EPILOG} {installed(*registry.GROUPS)}"}
    where = {key: _first_given(getattr(first, key), given.get(key)) for key in place}
    if first.help and all(value is None for value in (*look.values(), where["backend"])):
        Parser(Config, whole=first.help == "all", **about).print_help()
        raise SystemExit(0)

    default = {f.name: f.default for f in dataclasses.fields(Config)}
    if look["model"] is None:  # of several models of the default's name, nobody has typed a stranger's
        meant = registry.find("models", str(default["model"]), own="dmdr")
        default["model"] = registry.typed_names("models")[meant]
    model = Model.find(str(_first_given(look["model"], default["model"])))
    recipe = {"model": model.typed, **(model.cls.recipe if model.cls else {})}  # type: ignore[attr-defined]
    per_objective = recipe.pop("objectives", {})
    named = {key: str(_first_given(look[key], recipe.get(key), default[key])) for key in SUMS.values()}
    if named["reward"] == "none" and _first_given(first.sample_weight, settings.get("sample_weight")) is None:
        recipe["sample_weight"] = named["sample_weight"] = "none"  # there is nothing to weigh samples by
        given.pop("sample_weight", None)
    untyped = {group: key for group, key in SUMS.items() if look[key] is None}
    own = {group: model.distribution if key in recipe else "dmdr" for group, key in untyped.items()}
    chosen = _load(_parts(named), own)
    for group, why in ALONE.items():
        weights = [plugin.weight for plugin in chosen if plugin.group == group]
        if weights != [1.0] and (weights or group == "matchings"):
            raise ConfigError(
                f"--{SUMS[group]} {named[SUMS[group]]}: write the name of one {registry.NOUNS[group]}; {why}"
            )
    if str(_first_given(first.dry_run, given.get("dry_run"))).lower() not in ("true", "1", "yes", "y", "t"):
        where["architecture"] = None  # only --dry_run reads it
    chosen.append(Chosen("backends", *_family(model, where)))
    for plugin in reversed(chosen):  # of several objectives, the first named has the last word
        if plugin.group == "objectives":
            recipe |= per_objective.get(plugin.name, {})
    asked = {"model": model.typed, "backend": where["backend"]}
    moved = any(key in in_file and str(in_file[key]) != str(value) for key, value in asked.items())
    dropped = {key for key in in_file if key not in settings and _is_stale(key, in_file, chosen, moved)}
    given = {key: value for key, value in given.items() if key not in dropped}
    config, plugins = _parse(Config, chosen, arguments, given, recipe, whole=first.help == "all", **about)
    resolved = Settings(config, model, plugins)
    resolved.family_options()  # refuses values that cannot be meant
    return resolved


def _family(model: Model, where: Mapping[str, Any]) -> tuple[str, float, type]:
    """Name, weight and class of the model family."""
    given = {key: None if value is None else str(value) for key, value in where.items()}
    name, cls = model.family(**given)
    return name, 1.0, cls


def parse_command(
    command: type[F], arguments: Sequence[str], *, prog: str, description: str
) -> tuple[F, tuple[Chosen, ...]]:
    """The flags of a command that only scores, over `--config`, and the rewards that it names.

    Args:
        command: The command's own flags, a dataclass.
        arguments: Command-line flags.
        prog, description: What `--help` says of the command.

    Raises:
        ConfigError: For anything unknown, malformed or missing.
        SystemExit: After printing `--help`.
    """
    arguments = _joined(arguments)
    first = _first_look(arguments, "reward")
    given = read_yaml(first.config) if first.config else {}
    reward = _first_given(first.reward, given.get("reward"))
    chosen = _load(_named("rewards", str(reward)), {}) if reward is not None else []
    epilog = f"--reward NAME --help adds the flags of NAME. {installed('rewards', 'models')}"
    options, rewards = _parse(command, chosen, arguments, given, {}, prog=prog, description=description, epilog=epilog)
    if not rewards:
        raise ConfigError(f"--reward {options.reward} leaves nothing to score with")
    return options, rewards


def _parse(
    command: type[Any],
    chosen: Sequence[Chosen],
    arguments: Sequence[str],
    given: Mapping[str, Any],
    recipe: Mapping[str, Any],
    whole: bool = True,
    **about: str,
) -> tuple[Any, tuple[Chosen, ...]]:
    """The values of a command's flags and of those of its plugins: `arguments` over `given` over `recipe`."""
    options, short = _plugin_options(command, chosen)
    given, recipe = ({short.get(key, key): value for key, value in values.items()} for values in (given, recipe))
    parser = Parser(command, options, whole=whole, **about)
    parser.group_by_plugin(chosen)
    known = [f.name for kind in (command, options) for f in dataclasses.fields(kind)] + list(short)
    parser.set_defaults_with_config(**recipe)
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown setting '{key}'{_hint(str(key), known, chosen)}")
    parser.set_defaults_with_config(**given)
    config, values, _, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flag = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        hint = _hint(flag, known, chosen) if unknown[0].startswith("-") else ""
        raise ConfigError(f"unknown argument {unknown[0]}{hint}")
    check_types(values)
    config.validate()
    plugins = tuple(
        dataclasses.replace(
            plugin,
            options={
                f.name: getattr(values, plugin.key(f.name))
                for f in dataclasses.fields(plugin.flags)
                if f.init and hasattr(values, plugin.key(f.name))
            },
        )
        for plugin in chosen
    )
    return config, plugins


def _hint(flag: str, known: Sequence[str], chosen: Sequence[Chosen]) -> str:
    """The full names of a plugin's flag that has no short one, or else the known flag that is most like it."""
    full = [plugin.key(f.name) for plugin in chosen for f in dataclasses.fields(plugin.flags) if f.name == flag]
    full = [key for key in full if key in known]
    if full:
        return f" (write {' or '.join(f'--{key}' for key in full)})"
    return _owners(flag, chosen) or registry.suggest(flag, list(known))


def _owners(flag: str, chosen: Sequence[Chosen]) -> str:
    """Which other model families, matchings and so on have a flag of this name."""
    names, said = {part.group: part.name for part in chosen}, []
    for group in ("backends", "matchings", "sample_weights"):
        who = [name for name, flags in _flags(group).items() if any(f.name == flag for f in flags)]
        if who:
            cure = ", so leave it out" if group == "backends" else ""
            noun, here = registry.NOUNS[group], names.get(group, "none")
            said.append(f"{noun} with this flag: {', '.join(who)}; this run's is {here}{cure}")
    return f" ({'; '.join(said)})" if said else ""


def _flags(group: str) -> dict[str, list[Any]]:
    """The flags of each plugin of a group that works, as dataclass fields; imports them all."""
    usable = [name for name, plugin in registry.plugins(group).items() if registry.problem(plugin) is None]
    found = {name: registry.flags_of(group, registry.load(group, name)) for name in usable}
    return {name: [f for f in dataclasses.fields(flags) if f.init] for name, flags in found.items()}


# --- Which plugins are named ------------------------------------------------------------------------------------------


def _parts(named: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Group, weight and name of all plugins that settings name."""
    return [part for group, key in SUMS.items() for part in _named(group, str(named.get(key, "none")))]


def _named(group: str, expression: str) -> list[tuple[str, float, str]]:
    if expression == "none":
        return []
    try:
        return [(group, weight, name) for weight, name in parse_sum(expression, what=group[:-1])]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _load(parts: Sequence[tuple[str, float, str]], own: Mapping[str, str]) -> list[Chosen]:
    """The plugins that are named; `own` is the distribution of those that nobody typed, by group."""
    return [
        Chosen(group, name, weight, registry.load(group.removeprefix("eval_"), name, own.get(group)))
        for group, weight, name in parts
    ]


def _is_stale(key: str, in_file: Mapping[str, Any], chosen: Sequence[Chosen], moved: bool) -> bool:
    """Whether a file's setting is to be left out; says so, unless it has its default.

    It is of a plugin that flags have replaced. Or it is of the default weight of samples or of another model family,
    which older versions wrote into every file: where the run has no weights, where flags name another model than the
    file (`moved`), or where it has its default.
    """
    there = {(plugin.group, plugin.name) for plugin in chosen}
    own = [plugin for plugin in chosen if plugin.group != "backends"]
    replaced = [Chosen(group, name, weight, object) for group, weight, name in _parts(in_file)]
    gone = tuple(plugin.key("") for plugin in replaced if (plugin.group, plugin.name) not in there)
    stale = str(key).startswith(gone) and not str(key).startswith(tuple(plugin.key("") for plugin in own))
    fields = [(plugin, f.name) for plugin in chosen for f in dataclasses.fields(plugin.flags) if f.init]
    known = {name for plugin, field in fields for name in (field, plugin.key(field))} | TOPICS.keys()
    others: list[Any] = []  # fields of this name
    if not stale and key not in known:
        weighs = "sample_weight" in in_file or any(plugin.group == "sample_weights" for plugin in chosen)
        weight = [] if weighs else dataclasses.fields(registry.load("sample_weights", Config.sample_weight, "dmdr"))
        others = [f for f in weight if f.init and f.name == key]
        stale = bool(others)
    if not stale and key not in known:
        others = [f for flags in _flags("backends").values() for f in flags if f.name == key]
        stale = moved and bool(others)
    idle = in_file[key] in [_default(f) for f in others]
    if stale and not idle:
        logger.warning("%s is left out: the run does not use what it is a setting of", key)
    return stale or idle


def _default(f: Any) -> Any:
    """The default of a dataclass field."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def installed(*groups: str) -> str:
    """A sentence of the installed names by group; imports no plugin."""
    names = "; ".join(f"{group}: {', '.join(registry.plugins(group))}" for group in groups)
    return f"Installed {names}."


# --- Their flags ------------------------------------------------------------------------------------------------------


def _plugin_options(command: type, chosen: Sequence[Chosen]) -> tuple[type, dict[str, str]]:
    """A dataclass of the plugins' fields under their prefixed names, and the short names that are unambiguous.

    Rewards that only measure have no short names, and take none from the others.
    """
    core = {f.name for f in dataclasses.fields(command)}
    own = core | {"help", "config"}
    flags = [
        (plugin, f)
        for plugin in chosen
        for f in dataclasses.fields(plugin.flags)
        if f.init and not (plugin.group == "backends" and f.name in core)  # which it is given by the core
    ]
    full = Counter(plugin.key(f.name) for plugin, f in flags)
    count = Counter(f.name for plugin, f in flags if plugin.group != "eval_rewards")
    fields: list[tuple[str, Any, Any]] = []
    short: dict[str, str] = {}
    read = {plugin.flags: (typing.get_type_hints(plugin.flags), _help_of(plugin.flags)) for plugin in chosen}
    for plugin, f in flags:
        hints, help_texts = read[plugin.flags]
        key = plugin.key(f.name)
        if full[key] > 1:
            raise ConfigError(f"two of the chosen plugins are too much alike in name: both have a flag --{key}")
        if key in own:
            raise ConfigError(
                f"{plugin.group[:-1]} '{plugin.name}' has a field '{f.name}', and --{key} is a flag of dmdr"
            )
        metadata: dict[str, Any] = {"help": help_texts.get(f.name, "")}
        if plugin.group != "eval_rewards" and count[f.name] == 1 and f.name not in own | full.keys():
            short[f.name] = key
            metadata["aliases"] = [f"--{f.name}"]
        copy = field(default=f.default, default_factory=f.default_factory, metadata=metadata, kw_only=True)
        fields.append((key, hints[f.name], copy))
    options = dataclasses.make_dataclass("PluginOptions", fields)
    return options, short


def _help_of(cls: type) -> dict[str, str]:
    """Field descriptions from the `Attributes:` sections of a class and its bases; a subclass's text wins."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:")
        found |= re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("%", "%%") for name, text in found.items()}


# --- Command lines and files ------------------------------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One line a flag: its name as it is documented (hyphens for _ work, too), and what kind of value it takes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]
        kinds = {"int": "INT", "float": "FLOAT", "string_to_bool": "BOOL"}
        # of a value that may be none, the type is a function with the type's name
        kind = kinds.get(getattr(action.type, "__name__", ""), "TEXT")
        if action.choices:
            kind = "{" + ",".join(map(str, action.choices)) + "}"
        if action.nargs in ("?", 0):
            return ", ".join(names)
        return f"{', '.join(names)} {kind}{' ...' if action.nargs in ('+', '*') else ''}"


class Parser(Refusing, TrlParser):
    """TRL's parser (flags and YAML into dataclasses) whose errors are ours and which guesses no abbreviations.

    Args:
        types: The command's dataclass, and that of its plugins' flags.
        whole: Show every flag in the help, not just the common ones.
    """

    def __init__(self, *types: Any, whole: bool = True, **about: str) -> None:
        about["usage"] = f"{about['prog']} [--config YAML] [--NAME VALUE ...]"
        super().__init__(types, allow_abbrev=False, formatter_class=_Help, **about)
        self.add_argument_group("settings").add_argument(
            "--config", metavar="YAML", help="settings; flags override them"
        )
        self._own = {f.name for f in dataclasses.fields(types[0])}
        if types[0] is Config:
            for action in [action for action in self._actions if action.dest in TOPICS]:
                self._move(action, "common settings" if action.dest in COMMON else TOPICS[action.dest])
                if not (whole or action.dest in COMMON):
                    action.help = argparse.SUPPRESS

    def group_by_plugin(self, chosen: Sequence[Chosen]) -> None:
        """Show the flags of each plugin under its name."""
        titles = {
            plugin.key(f.name): f"{registry.NOUNS[plugin.group]} {plugin.name}"
            for plugin in chosen
            for f in dataclasses.fields(plugin.flags)
        }
        for action in self._actions:
            if action.dest in titles and action.dest not in self._own:
                self._move(action, titles[action.dest])

    def _move(self, action: argparse.Action, title: str) -> None:
        for group in self._action_groups:
            if action in group._group_actions:
                group._group_actions.remove(action)
        found = next((group for group in self._action_groups if group.title == title), None)
        (found or self.add_argument_group(title))._group_actions.append(action)


def _first_look(arguments: Sequence[str], *names: str) -> argparse.Namespace:
    """The few flags that decide which others there are."""
    parser = _FirstLook(add_help=False, allow_abbrev=False, formatter_class=_Help)
    parser.add_argument("--help", "-h", nargs="?", const="common", choices=("common", "all"))
    for name in ("config", *names):
        bare: dict[str, Any] = {"nargs": "?", "const": "true"} if name == "dry_run" else {}
        parser.add_argument(f"--{name}", **bare)
    return parser.parse_known_args(arguments)[0]


class _FirstLook(Refusing, argparse.ArgumentParser):
    """Of the flags that it knows."""


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--reward -1*hps` as `--reward=-1*hps`: argparse takes such a value for a flag."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--reward", "--eval_reward", "--rl") and re.match(r"-[\d.]", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def read_yaml(path: str) -> dict[str, Any]:
    """A mapping of settings.

    Raises:
        ConfigError: If the file is missing or holds no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is no YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {path} must hold a mapping of settings")
    return values


def _config_of(resume: str, output: str | None) -> str | None:
    """The settings of the run that is resumed, where they can be found."""
    folder = Path(resume).resolve().parent.parent if resume != "latest" else Path(output) if output else None
    return str(folder / "config.yaml") if folder and (folder / "config.yaml").is_file() else None
