"""The kinds of plugins: which flag names one, and whether a class is one."""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dmdr.errors import ConfigError
from dmdr.settings.functions import as_reward

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


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Name the plugin in whatever its code raises when it is looked at, and not called yet."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise PluginError(f"{where} cannot be inspected: {type(error).__name__}: {error}") from error


def checked(group: str, target: Any, where: str, name: str) -> Any:
    """The class of a plugin, if it is what its group promises; of a function, the class of a reward."""
    with refusing(where):
        return _examined(group, target, where, name)


def examine(group: str, target: type) -> None:
    """Refuse a class that no run would take as a plugin of this group.

    Raises:
        PluginError: Says what is wrong with it.
    """
    checked(group, target, f"{group[:-1]} {target.__name__}", target.__name__)


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


def optional_protocols(group: str, target: type) -> list[str]:
    """Names of the optional protocols that a class has."""
    return [p.__name__ for p in _optional(group) if all(hasattr(target, name) for name in _promised(p))]


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
