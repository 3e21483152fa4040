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
from dmdr.settings.fields import Config, Flags, check_types

logger = logging.getLogger(__name__)
DESCRIPTION = "Distil a diffusion model to a few steps and align it with a reward, in the same run."
SUMS = {"objectives": "rl", "rewards": "reward", "eval_rewards": "eval_reward", "matchings": "matching"}
F = TypeVar("F", bound=Flags)


@dataclass(frozen=True)
class Chosen:
    """A plugin that the run names: `weight * name`, its class, and the values of its own flags.

    Attributes:
        group: That of the registry, or "eval_rewards": rewards that only measure.
    """

    group: str
    name: str
    weight: float
    cls: type
    options: dict[str, Any] = field(default_factory=dict)

    def key(self, option: str) -> str:
        """The full name of one of its flags."""
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
        try:
            return self.cls(**(self.options | unset))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{self.group[:-1]} '{self.name}': {error}") from error


@dataclass(frozen=True)
class Settings:
    """A resolved run: the core's settings and the plugins that it names."""

    config: Config
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
    names = ("model", "rl", "reward", "eval_reward", "matching")
    first = _first_look(arguments, *names, "architecture", "resume_from_checkpoint", "output_dir")
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
    hints = "A registered model's recipe replaces these defaults. --rl NAME --help adds the flags of NAME."
    about = {"prog": "dmdr-train", "description": DESCRIPTION, "epilog": f"{hints} {installed(*registry.GROUPS)}"}
    if first.help and all(value is None for value in look.values()):
        Parser(Config, **about).parse_args(["--help"])

    default = {f.name: f.default for f in dataclasses.fields(Config)}
    if look["model"] is None:  # of several models of the default's name, nobody has typed a stranger's
        meant = registry.find("models", str(default["model"]), own="dmdr")
        default["model"] = registry.typed_names("models")[meant]
    recipe = {"model": default["model"], **model_recipe(str(_first_given(look["model"], default["model"])))}
    per_objective = recipe.pop("objectives", {})
    named = {key: str(_first_given(look[key], recipe.get(key), default[key])) for key in names}
    model = registry.registered("models", named["model"])
    home = registry.find("models", model).distribution if model else ""
    untyped = {group: key for group, key in SUMS.items() if look[key] is None}
    chosen = _load(_parts(named), {group: home if key in recipe else "dmdr" for group, key in untyped.items()})
    if [plugin.weight for plugin in chosen if plugin.group == "matchings"] != [1.0]:
        raise ConfigError(f"--matching {named['matching']}: write the name of one matching; --dmd_weight is its weight")
    for plugin in reversed(chosen):  # of several objectives, the first named has the last word
        if plugin.group == "objectives":
            recipe |= per_objective.get(plugin.name, {})
    there = {(plugin.group, plugin.name) for plugin in chosen}
    replaced = [Chosen(group, name, weight, object) for group, weight, name in _parts(in_file)]
    stale = tuple(plugin.key("") for plugin in replaced if (plugin.group, plugin.name) not in there)
    given = {key: value for key, value in given.items() if not _is_stale(key, stale, chosen)}
    return Settings(*_parse(Config, chosen, arguments, given, recipe, **about))


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
    **about: str,
) -> tuple[Any, tuple[Chosen, ...]]:
    """The values of a command's flags and of those of its plugins: `arguments` over `given` over `recipe`."""
    options, short = _plugin_options(command, chosen)
    given = {short.get(key, key): value for key, value in given.items()}
    parser = Parser(command, options, **about)
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
            options={f.name: getattr(values, plugin.key(f.name)) for f in dataclasses.fields(plugin.cls) if f.init},
        )
        for plugin in chosen
    )
    return config, plugins


def _hint(flag: str, known: Sequence[str], chosen: Sequence[Chosen]) -> str:
    """The full names of a plugin's flag that has no short one, or else the known flag that is most like it."""
    full = [plugin.key(f.name) for plugin in chosen for f in dataclasses.fields(plugin.cls) if f.name == flag]
    return f" (write {' or '.join(f'--{key}' for key in full)})" if full else registry.suggest(flag, list(known))


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


def _is_stale(key: str, prefixes: tuple[str, ...], chosen: Sequence[Chosen]) -> bool:
    """Whether a file's setting is of a plugin that flags have replaced, and of none that is chosen; says so."""
    own = tuple(plugin.key("") for plugin in chosen)
    stale = str(key).startswith(prefixes) and not str(key).startswith(own)
    if stale:
        logger.warning("%s is left out: the run does not use what it is a setting of", key)
    return stale


def model_recipe(name: str) -> Mapping[str, Any]:
    """The recipe of a registered model; empty for folders and hub ids."""
    return registry.load("models", name).recipe if registry.registered("models", name) else {}


def installed(*groups: str) -> str:
    """A sentence of the installed names by group; imports no plugin."""
    names = "; ".join(f"{group}: {', '.join(registry.plugins(group))}" for group in groups)
    return f"Installed {names}."


# --- Their flags ------------------------------------------------------------------------------------------------------


def _plugin_options(command: type, chosen: Sequence[Chosen]) -> tuple[type, dict[str, str]]:
    """A dataclass of the plugins' fields under their prefixed names, and the short names that are unambiguous.

    Rewards that only measure have no short names, and take none from the others.
    """
    own = {f.name for f in dataclasses.fields(command)} | {"help", "config"}
    flags = [(plugin, f.name) for plugin in chosen for f in dataclasses.fields(plugin.cls) if f.init]
    full = Counter(plugin.key(name) for plugin, name in flags)
    count = Counter(name for plugin, name in flags if plugin.group != "eval_rewards")
    fields: list[tuple[str, Any, Any]] = []
    short: dict[str, str] = {}
    for plugin in chosen:
        hints, help_texts = typing.get_type_hints(plugin.cls), _help_of(plugin.cls)
        for f in dataclasses.fields(plugin.cls):
            if not f.init:
                continue
            key = plugin.key(f.name)
            if full[key] > 1:
                raise ConfigError(f"two of the chosen plugins are too much alike in name: both have a flag --{key}")
            if key in own:
                raise ConfigError(
                    f"{plugin.group[:-1]} '{plugin.name}' has a field '{f.name}', and --{key} is a flag of dmdr"
                )
            metadata = {"help": help_texts.get(f.name, "")}
            if plugin.group != "eval_rewards" and count[f.name] == 1 and f.name not in own | full.keys():
                short[f.name] = key
                metadata["aliases"] = [f"--{f.name}"]  # type: ignore[assignment]
            copy = field(default=f.default, default_factory=f.default_factory, metadata=metadata, kw_only=True)
            fields.append((key, hints[f.name], copy))
    options = dataclasses.make_dataclass("PluginOptions", fields)
    options._argument_group_name = "flags of the chosen plugins"  # type: ignore[attr-defined]
    return options, short


def _help_of(cls: type) -> dict[str, str]:
    """Field descriptions from the `Attributes:` sections of a class and its bases; a subclass's text wins."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:")
        found |= re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("%", "%%") for name, text in found.items()}


# --- Command lines and files ------------------------------------------------------------------------------------------


class Parser(Refusing, TrlParser):
    """TRL's parser (flags and YAML into dataclasses) whose errors are ours and which guesses no abbreviations."""

    def __init__(self, *types: Any, prog: str, description: str, epilog: str) -> None:
        super().__init__(types, prog=prog, description=description, epilog=epilog, allow_abbrev=False)
        self.add_argument_group("settings").add_argument(
            "--config", metavar="YAML", help="settings; flags override them"
        )


def _first_look(arguments: Sequence[str], *names: str) -> argparse.Namespace:
    """The few flags that decide which others there are."""
    parser = _FirstLook(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    for name in ("config", *names):
        parser.add_argument(f"--{name}")
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
