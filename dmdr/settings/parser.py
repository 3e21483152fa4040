"""Command lines: argparse on dataclasses, the flags of plugins among them, and the help."""

import argparse
import dataclasses
import inspect
import re
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import TrlParser

from dmdr.errors import ConfigError, Refusing
from dmdr.settings import kinds
from dmdr.settings.chosen import Chosen
from dmdr.settings.fields import COMMON, TOPICS, Config, check_types
from dmdr.settings.hints import hint


@dataclass(frozen=True)
class Sources:
    """Where values come from, by name; a source overrides those before it.

    Attributes:
        recipe: Of the model.
        file: Of `--config`.
        settings: Of a call from Python.
        arguments: Of the command line.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    file: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Sequence[str] = ()


@dataclass(frozen=True)
class Told:
    """Full names of the settings that somebody gave another value than the default's and the recipe's.

    Attributes:
        typed: As a flag, or from Python.
        in_file: In the file of `--config`, and nowhere else.
    """

    typed: frozenset[str] = frozenset()
    in_file: frozenset[str] = frozenset()


def parse_flags(
    command: type[Any], chosen: Sequence[Chosen], sources: Sources, whole: bool = True, **about: str
) -> tuple[Any, tuple[Chosen, ...], Told]:
    """The values of a command's flags and of those of its plugins."""
    options, short = _plugin_options(command, chosen)
    recipe, file, settings = (
        {short.get(key, key): value for key, value in values.items()}
        for values in (sources.recipe, sources.file, sources.settings)
    )
    parser = Parser(command, options, whole=whole, **about)
    parser.group_by_plugin(chosen)
    known = [f.name for kind in (command, options) for f in dataclasses.fields(kind)] + list(short)
    defaults = parser.defaults()
    parser.set_defaults_with_config(**recipe)
    usual = parser.defaults()
    for key in file | settings:
        if key not in known:
            raise ConfigError(f"unknown setting '{key}'{hint(str(key), known, chosen, command)}")
    parser.set_defaults_with_config(**file | settings)
    config, values, _, unknown = parser.parse_args_into_dataclasses(
        sources.arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flag = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        meant = hint(flag, known, chosen, command) if unknown[0].startswith("-") else ""
        raise ConfigError(f"unknown argument {unknown[0]}{meant}")
    check_types(values)
    config.validate()
    plugins = tuple(
        dataclasses.replace(
            plugin,
            options={f.name: getattr(values, plugin.key(f.name)) for f in plugin.own_flags},
        )
        for plugin in chosen
    )
    found = vars(config) | vars(values)
    unusual = {name for name, value in found.items() if value not in (defaults[name], usual[name])}
    typed = parser.named_in(sources.arguments) | settings.keys()
    return config, plugins, Told(frozenset(unusual & typed), frozenset((unusual & file.keys()) - typed))


def check_own(command: type[Any], sources: Sources, **about: str) -> None:
    """Refuse values that the command's own flags cannot have; all others may be flags of plugins not yet imported."""
    parser = Parser(command, whole=True, **about)
    given = {**sources.file, **sources.settings}
    parser.set_defaults_with_config(**{f.name: given[f.name] for f in dataclasses.fields(command) if f.name in given})
    values, *_ = parser.parse_args_into_dataclasses(
        sources.arguments, return_remaining_strings=True, look_for_args_file=False
    )
    check_types(values)


def _plugin_options(command: type, chosen: Sequence[Chosen]) -> tuple[type, dict[str, str]]:
    """A dataclass of the plugins' fields under their prefixed names, and the short names that are unambiguous.

    Rewards that only measure have no short names, and take none from the others.
    """
    own = {f.name for f in dataclasses.fields(command)} | {"help", "config"}
    flags = [(plugin, f) for plugin in chosen for f in plugin.own_flags]
    full = Counter(plugin.key(f.name) for plugin, f in flags)
    count = Counter(f.name for plugin, f in flags if plugin.group != "eval_rewards")
    fields: list[tuple[str, Any, Any]] = []
    short: dict[str, str] = {}
    read = {plugin.flags: (typing.get_type_hints(plugin.flags), help_of(plugin.flags)) for plugin in chosen}
    for plugin, f in flags:
        hints, help_texts = read[plugin.flags]
        key = plugin.key(f.name)
        if full[key] > 1:
            raise ConfigError(f"two plugins of the run have the same flag --{key}")
        if key in own:
            raise ConfigError(
                f"{plugin.group[:-1]} '{plugin.title}' has a field '{f.name}', but --{key} is a flag of dmdr; rename it"
            )
        metadata: dict[str, Any] = {"help": help_texts.get(f.name, "")}
        if plugin.group != "eval_rewards" and count[f.name] == 1 and f.name not in own | full.keys():
            short[f.name] = key
            metadata["aliases"] = [f"--{f.name}"]
        copy = field(default=f.default, default_factory=f.default_factory, metadata=metadata, kw_only=True)
        fields.append((key, hints[f.name], copy))
    options = dataclasses.make_dataclass("PluginOptions", fields)
    return options, short


def help_of(cls: type) -> dict[str, str]:
    """Field descriptions from the `Attributes:` sections of a class and its bases; a subclass's text wins."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:")
        found |= re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("%", "%%") for name, text in found.items()}


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
        for action in self._actions:
            if action.choices and action.default is None:  # TRL lets numbers be none, and no choices
                action.type = _none_or(action.type)
        if types[0] is Config:
            for action in [action for action in self._actions if action.dest in TOPICS]:
                self._move(action, "common settings" if action.dest in COMMON else TOPICS[action.dest])
                if not (whole or action.dest in COMMON):
                    action.help = argparse.SUPPRESS

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if value is not None:
            super()._check_value(action, value)

    def group_by_plugin(self, chosen: Sequence[Chosen]) -> None:
        """Show the flags of each plugin under its name."""
        titles = {
            plugin.key(f.name): f"{kinds.NOUNS[plugin.group]} {plugin.title}"
            for plugin in chosen
            for f in plugin.own_flags
        }
        for action in self._actions:
            if action.dest in titles:
                self._move(action, titles[action.dest])

    def defaults(self) -> dict[str, Any]:
        """The values of flags that nobody gives, as they are now."""
        return {action.dest: action.default for action in self._actions}

    def named_in(self, arguments: Sequence[str]) -> set[str]:
        """The flags that a command line names."""
        flags = (self._option_string_actions.get(argument.split("=")[0]) for argument in arguments)
        return {action.dest for action in flags if action}

    def _move(self, action: argparse.Action, title: str) -> None:
        for group in self._action_groups:
            if action in group._group_actions:
                group._group_actions.remove(action)
        found = next((group for group in self._action_groups if group.title == title), None)
        (found or self.add_argument_group(title))._group_actions.append(action)


def _none_or(read: Any) -> Callable[[str], Any]:
    """Reads a value that may be none, as a flag says to take a file's value away."""
    return lambda text: None if text.lower() in ("none", "null") else read(text)


def first_look(arguments: Sequence[str], *names: str) -> argparse.Namespace:
    """The few flags that decide which others there are."""
    parser = _FirstLook(add_help=False, allow_abbrev=False, formatter_class=_Help)
    parser.add_argument("--help", "-h", nargs="?", const="common", choices=("common", "all"))
    for name in ("config", *names):
        bare: dict[str, Any] = {"nargs": "?", "const": "true"} if name == "dry_run" else {}
        parser.add_argument(f"--{name}", **bare)
    return parser.parse_known_args(arguments)[0]


class _FirstLook(Refusing, argparse.ArgumentParser):
    """Of the flags that it knows."""


def as_argparse_reads(arguments: Sequence[str]) -> list[str]:
    """`--reward -1*hps` as `--reward=-1*hps`, which it takes for a flag, and `--help=all` as `--help all`."""
    found: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if found and found[-1] in ("--reward", "--eval_reward", "--rl") and re.match(r"-[\d.]", argument):
            found[-1] += f"={argument}"
        elif equals and flag in ("--help", "-h"):
            found += [flag, value]
        else:
            found.append(argument)
    return found
