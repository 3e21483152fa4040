"""Lazy lookup of plugins over entry points. Nothing is imported until it is named."""

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dmdr.errors import ConfigError
from dmdr.settings.functions import load_object
from dmdr.settings.kinds import GROUPS, PluginError, checked, refusing


@dataclass(frozen=True)
class Plugin:
    """One registered name.

    Attributes:
        group: One of GROUPS.
        name: What users type, as long as no other distribution offers the same.
        target: `module:attribute`, as the entry point has it.
        distribution, version: The installed package that it comes from.
        extras: Extras of that package that it needs, as its entry point declares them: `"module:Class [extra]"`.
    """

    group: str
    name: str
    target: str
    distribution: str
    version: str
    extras: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """What users can always type, `distribution:name`."""
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        return f"{self.group[:-1]} '{self.name}' of {self.distribution} {self.version} ({self.target})"


def offers(group: str) -> list[Plugin]:
    """Every offer of a group, by name and distribution; imports none, and a broken one is listed like any other."""
    return list(_offers(group, tuple((folder, _changed(folder)) for folder in sys.path)))


def _changed(folder: str) -> float | None:
    """When something was installed there, if it is a folder."""
    try:
        return os.stat(folder or ".").st_mtime
    except OSError:
        return None


@functools.cache
def _offers(group: str, path: tuple[tuple[str, float | None], ...]) -> tuple[Plugin, ...]:
    """The offers on this path, read once: parsing a command line asks for them again and again."""
    found = set()
    for point in importlib.metadata.entry_points(group=f"dmdr.{group}"):
        target, _, extras = point.value.partition("[")
        names = tuple(extra.strip() for extra in extras.rstrip("] ").split(",") if extra.strip())
        # What an interrupted uninstall leaves behind has neither name nor version.
        origin = (point.dist.name or "?", point.dist.version or "?") if point.dist else ("?", "?")
        found.add(Plugin(group, point.name, re.sub(r"\s*:\s*", ":", target.strip()), *origin, names))
    return tuple(sorted(found, key=lambda plugin: (plugin.name, plugin.distribution, plugin.target)))


def typed_names(group: str) -> dict[Plugin, str]:
    """What users type for each offer of a group: its name, or `distribution:name` where several offer that."""
    found = offers(group)
    count = Counter(plugin.name for plugin in found)
    return {plugin: plugin.name if count[plugin.name] == 1 else plugin.full_name for plugin in found}


def plugins(group: str) -> dict[str, Plugin]:
    """The plugins of a group by what users type."""
    return {name: plugin for plugin, name in typed_names(group).items()}


def suggest(name: str, known: list[str]) -> str:
    """' (did you mean ...?)' or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def strays() -> Iterator[tuple[str, str]]:
    """Name and complaint of each entry point in a group that looks like one of ours, and that nothing reads."""
    known = [f"dmdr.{group}" for group in GROUPS]
    points = importlib.metadata.entry_points()
    for group in sorted(group for group in points.groups if group.startswith("dmdr.") and group not in known):
        for point in points.select(group=group):
            who = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
            meant = suggest(group, known) or f"; the groups are {', '.join(known)}"
            yield point.name, f"{who} offers '{point.name}' in the unknown entry-point group '{group}'{meant}"


def find(group: str, name: str, own: str | None = None) -> Plugin:
    """The plugin of this name or full name.

    Args:
        own: The distribution that is meant where several offer the name: of a default or a recipe, which nobody typed.

    Raises:
        PluginError: If there is none, which names the known ones, or several, which says how to choose.
    """
    found = [plugin for plugin in offers(group) if _is_called(plugin, name)]
    if len(found) > 1:
        _refuse_twins(found)
        for plugin in found:
            if plugin.distribution == own:
                return plugin
        raise PluginError(
            f"{group[:-1]} '{name}' is offered by {' and by '.join(f'{p.distribution} {p.version}' for p in found)}; "
            f"write {' or '.join(f'{GROUPS[group]} {plugin.full_name}' for plugin in found)}"
        )
    if not found:
        if name.endswith(".py"):
            raise PluginError(f"{GROUPS[group]} {name}: add the name of the {group[:-1]}, as in my_file.py:NAME")
        known = list(plugins(group))
        hint = suggest(name, known)
        for other in GROUPS:
            if other != group and registered(other, name):
                hint = f" (there is a {other[:-1]} of this name: {GROUPS[other]} {name})"
        said = "".join(f"; {complaint}" for other, complaint in strays() if other == name)
        file = "" if group == "models" else ", or write FILE.py:CLASS"
        raise PluginError(
            f"unknown {group[:-1]} '{name}'{hint}{said}; known: {', '.join(known) or 'none'} "
            f"(a package adds one under the entry-point group 'dmdr.{group}'{file})"
        )
    return found[0]


def _refuse_twins(found: Sequence[Plugin]) -> None:
    """One distribution must not offer one name twice: nothing that a user types could tell the two apart."""
    for name, count in Counter(plugin.full_name for plugin in found).items():
        if count > 1:
            targets = " and as ".join(plugin.target for plugin in found if plugin.full_name == name)
            raise PluginError(f"{found[0].group[:-1]} '{name}' is offered twice by this package, as {targets}")


def _is_called(plugin: Plugin, name: str) -> bool:
    """By its name or by its full name."""
    distribution, _, rest = name.partition(":")
    return plugin.name in (name, rest) and (
        plugin.name == name or _canonical(plugin.distribution) == _canonical(distribution)
    )


def _canonical(distribution: str) -> str:
    """Distributions are the same whatever their capitals and whichever of - _ . they are written with (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def registered(group: str, name: str) -> str | None:
    """The registered name that `name` is, or begins with up to a colon of an address; None where there is none."""
    parts = name.split(":")
    heads = [name, *(":".join(parts[:count]) for count in (2, 1) if count < len(parts))]
    found = offers(group)
    return next((head for head in heads if any(_is_called(plugin, head) for plugin in found)), None)


def is_installed(group: str, name: str) -> bool:
    """Whether this is the name, or the full name, of an offer of the group, and no address of one."""
    return any(_is_called(plugin, name) for plugin in offers(group))


def check_name(group: str, name: str) -> None:
    """Refuse a name that no installed plugin has, unless it could be that of a file or module; imports nothing.

    Raises:
        PluginError: As `find`.
    """
    head = registered(group, name)
    if head or ":" not in name:
        find(group, head or name)


def load(group: str, name: str, own: str | None = None) -> Any:
    """Import and return the plugin's class; `file.py:name` and `package.module:name` need no registration.

    Args:
        own: As in `find`.

    Raises:
        ConfigError: If it is unknown, cannot be imported, is not what its group promises, or no address of its kind.
    """
    found = load_installed(group, name, own)
    if found is not None:
        return found
    distribution = name.partition(":")[0]
    offered = [p.full_name for p in offers(group) if _canonical(p.distribution) == _canonical(distribution)]
    if offered:
        raise PluginError(f"{distribution} has no {group[:-1]} of that name; it has {', '.join(offered)}")
    try:
        found = load_object(name)
    except ConfigError as error:
        rest = name.partition(":")[2]
        meant = suggest(name, [p.full_name for p in offers(group) if p.name == rest])
        raise type(error)(f"{error}{meant}") from error
    return checked(group, found, f"{group[:-1]} '{name}'", name)


def load_installed(group: str, name: str, own: str | None = None) -> Any | None:
    """The class of an installed plugin; None for what could only be a file or a module.

    A class with a classmethod `at(address) -> type` is registered under what its addresses begin with, up to the colon
    (`http` for http://127.0.0.1:8000, `sit-xl-2` for sit-xl-2:PATH). It is asked for the class of the whole name.

    Args:
        own: As in `find`.

    Raises:
        ConfigError: If it is unknown, cannot be imported, is not what its group promises, or no address of its kind.
    """
    head = registered(group, name)
    if not head and ":" in name:
        return None
    plugin = find(group, head or name, own)
    found = imported(plugin)
    if inspect.ismethod(getattr(found, "at", None)):
        return found.at(plugin.name + name[len(head or name) :])
    return found if name == head else None


def problem(plugin: Plugin) -> str | None:
    """What keeps a plugin from being used, or None; imports it."""
    try:
        _refuse_twins([other for other in offers(plugin.group) if other.full_name == plugin.full_name])
        imported(plugin)
    except ConfigError as error:
        return str(error).removeprefix(f"{plugin} ")
    return None


def imported(plugin: Plugin) -> Any:
    """The class of a registered plugin, of all its addresses alike.

    Raises:
        PluginError: If it cannot be imported, or is not what its group promises.
    """
    module, colon, attribute = plugin.target.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise PluginError(f"{plugin} has an entry point that must be 'module:Class', but is not")
    try:
        target: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise PluginError(f"{plugin} has no module '{error.name}': reinstall {plugin.distribution}") from error
        extras = f": pip install '{plugin.distribution}[{','.join(plugin.extras)}]'" if plugin.extras else ""
        raise PluginError(f"{plugin} needs the module '{error.name}', which is not installed{extras}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a stranger's module may do when it is imported
        raise PluginError(f"{plugin} cannot be imported: {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        with refusing(str(plugin)):
            if not hasattr(target, name):
                raise PluginError(f"{plugin} has no '{name}' in {module}")
            target = getattr(target, name)
    return checked(plugin.group, target, str(plugin), plugin.name)
