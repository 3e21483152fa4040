"""Lazy lookup of plugins over entry points. Nothing is imported until it is named."""

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
from dataclasses import dataclass
from typing import Any

from dmdr.errors import ConfigError
from dmdr.functions import as_reward, load_object

PROMISED = {"objectives": ("needs", "__call__"), "rewards": ("differentiable", "prepare", "__call__")}
GROUPS = ("objectives", "rewards", "matchings", "backends", "models")


class PluginError(ConfigError):
    """A plugin that is unknown, broken or unfit; the message says which, from where, and what to do."""


@dataclass(frozen=True)
class Plugin:
    """One registered name.

    Attributes:
        group: One of GROUPS.
        name: What users type.
        target: `module:attribute`.
        distribution, version: The installed package that it comes from.
        extras: Extras of that package that it needs, as its entry point declares them: `"module:Class [extra]"`.
    """

    group: str
    name: str
    target: str
    distribution: str
    version: str
    extras: tuple[str, ...] = ()


def plugins(group: str) -> dict[str, Plugin]:
    """The plugins of a group by name, sorted; imports none of them.

    Raises:
        PluginError: If two distributions offer the same name.
    """
    found: dict[str, Plugin] = {}
    for point in importlib.metadata.entry_points(group=f"dmdr.{group}"):
        dist = point.dist
        origin = (dist.name, dist.version) if dist else ("?", "?")
        try:
            plugin = Plugin(group, point.name, f"{point.module}:{point.attr}", *origin, tuple(point.extras))
        except AttributeError as error:  # what importlib.metadata answers to a value of another form
            raise PluginError(
                f"{group[:-1]} '{point.name}' of {' '.join(origin)} has an entry point that is no "
                f"'module:Class': '{point.value}'"
            ) from error
        clash = found.get(point.name)
        if clash and clash != plugin:
            raise PluginError(
                f"{group[:-1]} '{point.name}' is offered by both {clash.distribution} and {plugin.distribution}; "
                "uninstall one of them"
            )
        found[point.name] = plugin
    return dict(sorted(found.items()))


def suggest(name: str, known: list[str]) -> str:
    """' (did you mean ...?)' or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def find(group: str, name: str) -> Plugin:
    """The plugin of this name.

    Raises:
        PluginError: If there is none; names the known ones.
    """
    known = plugins(group)
    if name not in known:
        hint = " of a file, as in my_file.py:NAME" if name.endswith(".py") else suggest(name, list(known))
        raise PluginError(
            f"unknown {group[:-1]} '{name}'{hint}; known: {', '.join(known) or 'none'} "
            f"(a package adds one under the entry-point group 'dmdr.{group}')"
        )
    return known[name]


def registered(group: str, name: str) -> str | None:
    """The plugin's name that `name` is, or begins with up to the colon of an address; None where there is none."""
    kind = name.partition(":")[0]
    return kind if kind in plugins(group) else None


def load(group: str, name: str) -> Any:
    """Import and return the plugin's class; `file.py:name` and `package.module:name` need no registration.

    A class with a classmethod `at(address) -> type` is registered under what its addresses begin with, up to the colon
    (`http` for http://127.0.0.1:8000, `sit-xl-2` for sit-xl-2:PATH). It is asked for the class of the whole name.

    Raises:
        ConfigError: If it is unknown, cannot be imported, is not what its group promises, or no address of its kind.
    """
    kind, colon, _ = name.partition(":")
    if not colon or kind in plugins(group):
        found = _imported(find(group, kind))
        if inspect.ismethod(getattr(found, "at", None)):
            return found.at(name)
        if not colon:
            return found
    found = load_object(name)
    if group == "rewards" and callable(found) and not inspect.isclass(found):
        return as_reward(found, name)
    return _checked(group, found, f"{group[:-1]} '{name}'")


def _imported(plugin: Plugin) -> Any:
    """The class of a registered plugin."""
    where = f"{plugin.group[:-1]} '{plugin.name}' of {plugin.distribution} {plugin.version} ({plugin.target})"
    module, _, attribute = plugin.target.partition(":")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        wanted = f"{plugin.distribution}[{','.join(plugin.extras)}]" if plugin.extras else error.name
        raise PluginError(f"{where} needs the package '{error.name}': pip install '{wanted}'") from error
    except Exception as error:
        raise PluginError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    return _checked(plugin.group, target, where)


def _checked(group: str, target: Any, where: str) -> Any:
    if not inspect.isclass(target):
        raise PluginError(f"{where} is no class" + (" and no function" if group == "rewards" else ""))
    if group in ("objectives", "rewards", "matchings") and not dataclasses.is_dataclass(target):
        raise PluginError(f"{where} is no dataclass; its fields are its command-line flags")
    missing = [name for name in PROMISED.get(group, ()) if not hasattr(target, name)]
    if missing:
        raise PluginError(f"{where} has no {' and no '.join(missing)}; dmdr.protocols says what it needs")
    return target
