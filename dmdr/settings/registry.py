"""Lazy lookup of plugins over entry points. Nothing is imported until it is named."""

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dmdr.errors import ConfigError
from dmdr.settings.functions import as_reward, load_object

GROUPS = {  # group -> the flag that names one of it
    "objectives": "--rl",
    "rewards": "--reward",
    "matchings": "--matching",
    "sample_weights": "--sample_weight",
    "backends": "--backend",
    "models": "--model",
    "benchmarks": "--benchmark",
}
NOUNS = {  # what people call one of a group
    "objectives": "objective",
    "rewards": "reward",
    "eval_rewards": "held-out reward",
    "matchings": "matching",
    "sample_weights": "sample weight",
    "backends": "model family",
    "models": "model",
    "benchmarks": "benchmark",
}
READ_OFF_THE_CLASS = {  # before there is an instance
    "rewards": ("differentiable",),
    "models": ("recipe", "pipeline"),
    "backends": ("Options",),
    "benchmarks": ("images_per_prompt", "layout"),
}


WITH_FLAGS = tuple(group for group in GROUPS if group not in ("models", "benchmarks"))  # what a hint may point to


class PluginError(ConfigError):
    """A plugin that is unknown, broken or unfit; the message says which, from where, and what to do."""


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
    return _checked(group, found, f"{group[:-1]} '{name}'", name)


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


def examine(group: str, target: type) -> None:
    """Refuse a class that no run would take as a plugin of this group.

    Raises:
        PluginError: Says what is wrong with it.
    """
    _checked(group, target, f"{group[:-1]} {target.__name__}", target.__name__)


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
        with _refusing(str(plugin)):
            if not hasattr(target, name):
                raise PluginError(f"{plugin} has no '{name}' in {module}")
            target = getattr(target, name)
    return _checked(plugin.group, target, str(plugin), plugin.name)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Name the plugin in whatever its code raises when it is looked at, and not called yet."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise PluginError(f"{where} cannot be inspected: {type(error).__name__}: {error}") from error


def _checked(group: str, target: Any, where: str, name: str) -> Any:
    """The class of a plugin, if it is what its group promises; of a function, the class of a reward."""
    with _refusing(where):
        return _examined(group, target, where, name)


def _examined(group: str, target: Any, where: str, name: str) -> Any:
    if group == "rewards" and callable(target) and not inspect.isclass(target):
        return as_reward(target, name)
    other = kind(target)
    instead = ""
    if other and other != group:
        instead = f"; it looks like one of the {other.replace('_', ' ')}: name it with {GROUPS[other]}"
    if not inspect.isclass(target):
        raise PluginError(f"{where} is no class" + (" and no function" if group == "rewards" else "") + instead)
    flags = flags_of(group, target)
    if flags is not None:
        if not (inspect.isclass(flags) and dataclasses.is_dataclass(flags)):
            what = "is" if flags is target else "has Options that are"
            raise PluginError(f"{where} {what} no dataclass; make it one: its fields are the command-line flags")
        try:
            hints = typing.get_type_hints(flags)
        except Exception as error:  # whatever evaluating an annotation may raise
            raise PluginError(f"{where} has a field whose type cannot be read: {error}") from error
        for f in dataclasses.fields(flags):
            if f.name in READ_OFF_THE_CLASS.get(group, ()):
                raise PluginError(f"{where} has a field '{f.name}', which cannot be a flag: annotate it as a ClassVar")
            if f.init and not _is_flag(hints[f.name]):
                raise PluginError(
                    f"{where} has a field '{f.name}' of a type that no flag can have: {f.type}; use bool, int, float, "
                    "str, a Literal, or a list of one of these, with or without None (or field(init=False): no flag)"
                )
    protocol = _protocol(group)
    read = READ_OFF_THE_CLASS.get(group, ())
    missing = [name for name in read if getattr(target, name, None) is None]
    missing += [name for name in _promised(protocol) if name not in read and not _has(target, name)]
    problem: str | None
    if missing:
        problem = f"has no {' and no '.join(missing)}{instead}"
    else:
        problem = _no_value(group, target) or misfit(target, protocol)
    for optional in _optional(group):
        problem = problem or misfit(target, optional, only_present=True)
    if problem:
        raise PluginError(f"{where} {problem}; see {protocol.__module__}")
    return target


def kind(target: Any) -> str | None:
    """The group of what somebody has written in a file, or None; of these, a sample weight may have `needs`, too."""
    if inspect.isfunction(target) or hasattr(target, "differentiable"):
        return "rewards"
    if hasattr(target, "fake_loss"):
        return "matchings"
    if hasattr(target, "figures"):
        return "benchmarks"
    if hasattr(target, "student"):
        return "backends"
    call = getattr(target, "__call__", None)  # noqa: B004
    if inspect.isfunction(call) and len(inspect.signature(call).parameters) == 4:  # self, draw, direction, ctx
        return "sample_weights"
    return "objectives" if hasattr(target, "needs") else None


def flags_of(group: str, target: Any) -> Any:
    """The dataclass whose fields are the plugin's flags: itself, or the `Options` of a backend; None of a model."""
    if group == "backends":
        return getattr(target, "Options", None)
    return None if group == "models" else target


def flag_fields(group: str, target: Any) -> list[Any]:
    """The fields of that dataclass that are flags: all but those that it computes itself."""
    return [f for f in dataclasses.fields(flags_of(group, target)) if f.init]


def _has(target: type, name: str) -> bool:
    """Whether its instances have it: a class has a `__call__` of its own, which makes them."""
    return any(name in vars(cls) for cls in target.__mro__) if name == "__call__" else hasattr(target, name)


def _no_value(group: str, target: type) -> str | None:
    """What is wrong with the values that are read off a class; a property of it is none."""
    if group == "rewards":
        columns = getattr(target, "columns", ())
        if not isinstance(columns, tuple | list) or not all(isinstance(name, str) for name in columns):
            return f"has columns {columns!r}, which is no tuple of names: write it as ('caption',)"
        if not isinstance(target.differentiable, bool):  # type: ignore[attr-defined]
            return "must have differentiable = True or False in the class, not only in the instance"
    if group == "benchmarks":
        layouts = typing.get_args(_layouts())
        if target.layout not in layouts:  # type: ignore[attr-defined]
            return f"must have a layout in the class, one of {', '.join(layouts)}, not {target.layout!r}"  # type: ignore[attr-defined]
        count = target.images_per_prompt  # type: ignore[attr-defined]
        if type(count) is not int or count < 1:
            return f"must have images_per_prompt in the class, a whole number of at least 1, not {count!r}"
    if group == "models" and not isinstance(target.recipe, Mapping):  # type: ignore[attr-defined]
        return "must have a recipe, a mapping, in the class, not only in the instance"
    if group == "models" and not isinstance(target.pipeline, str):  # type: ignore[attr-defined]
        return "must have a pipeline, a class name, in the class, not only in the instance"
    return None


def _is_flag(hint: Any) -> bool:
    """Whether a command line and YAML can give such a value."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        return len(kinds) == 1 and _is_flag(kinds[0])
    if origin is list:
        return arguments[0] in (bool, int, float, str)
    return origin is typing.Literal or hint in (bool, int, float, str)


def _protocol(group: str) -> type:
    from dmdr import benchmarks, protocols  # which import torch

    return {
        "objectives": protocols.RewardObjective,
        "rewards": protocols.Reward,
        "matchings": protocols.Matching,
        "sample_weights": protocols.SampleWeight,
        "backends": protocols.Backend,
        "models": protocols.NamedModel,
        "benchmarks": benchmarks.Benchmark,
    }[group]


def _layouts() -> Any:
    from dmdr.benchmarks import Layout  # which imports torch

    return Layout


def _promised(protocol: type) -> dict[str, Any]:
    """Methods and properties of a protocol, by name."""
    return {name: value for name, value in vars(protocol).items() if name == "__call__" or not name.startswith("_")}


def _optional(group: str) -> tuple[type, ...]:
    """Protocols that a plugin of this group may have beside its own."""
    from dmdr import benchmarks, protocols  # which import torch

    return {**protocols.OPTIONAL, "benchmarks": benchmarks.OPTIONAL}.get(group, ())


def optional_protocols(plugin: Plugin) -> list[str]:
    """Names of the optional protocols that a plugin has; imports it."""
    target = imported(plugin)
    return [p.__name__ for p in _optional(plugin.group) if all(hasattr(target, name) for name in _promised(p))]


def _place(protocol: type) -> str:
    return f"{protocol.__module__}.{protocol.__name__}"


def doubts(group: str, target: type) -> list[str]:
    """What looks like a mistake in a class that can be used as a plugin of this group."""
    found, protocol = [], _protocol(group)
    optional = {name: p for p in _optional(group) for name in _promised(p)}
    own = dict.fromkeys(_promised(protocol), protocol)  # which a class may have from its base, as of dmdr.matching.DMD
    written = [
        name for cls in target.__mro__ if cls is not object for name, value in vars(cls).items() if callable(value)
    ]
    for name in dict.fromkeys(written):
        if name.startswith("_") or name in optional | own:
            continue
        for known, cutoff in ((optional, 0.8), (own, 0.85)):  # renoise_ca, of Decoupled DMD, is no renoise
            if close := difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff):
                found.append(f"has a method {name}: do you mean {close[0]} of {_place(known[close[0]])}?")
                break
    for protocol in _optional(group):
        missing = [name for name in _promised(protocol) if not hasattr(target, name)]
        if missing and len(missing) < len(_promised(protocol)):
            found.append(f"is no {_place(protocol)}: it has no {' and no '.join(missing)}")
    return found


def misfit(target: type, protocol: type, *, only_present: bool = False) -> str | None:
    """What keeps a class from being called as a protocol's methods are, or None.

    Args:
        only_present: Of the methods that it has.
    """
    for name, promised in _promised(protocol).items():
        if not inspect.isfunction(promised) or (only_present and not hasattr(target, name)):
            continue  # a property, or what it need not have
        _, *parameters = inspect.signature(promised).parameters.values()
        by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        rest = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        columns = getattr(target, "columns", ()) if rest else ()  # which a reward may ask for by name
        found = _refusal(target, name, by_place, [*by_name, *columns], *rest)
        if found:
            return found
    return None


def _refusal(
    target: type, name: str, by_place: Sequence[str], by_name: Sequence[str], rest: str | None = None
) -> str | None:
    """What keeps a method from being called with these arguments, and any others by name as `rest`; or None."""
    method = getattr(target, name)
    if not callable(method):
        return f"has a {name} that cannot be called"
    signature = inspect.signature(method)
    form = ", ".join([*by_place, *(["*", *by_name] if by_name else []), *([f"**{rest}"] if rest else [])])
    try:
        signature.bind(*([] if inspect.ismethod(method) else [None]), *by_place, **dict.fromkeys(by_name))
    except TypeError as error:
        return f"cannot be called as {name}({form}): {error}"
    if rest and not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return f"cannot be called as {name}({form}): it takes no **{rest}"
    return None
