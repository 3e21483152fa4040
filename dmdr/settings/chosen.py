"""The plugins that a run names, with the values of their flags."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dmdr.errors import ConfigError
from dmdr.settings import kinds, registry
from dmdr.settings.expression import Term, parse_sum
from dmdr.settings.fields import TOPICS

# By group, the setting that names a sum of its plugins.
SUMS = {
    "objectives": "rl",
    "rewards": "reward",
    "eval_rewards": "eval_reward",
    "matchings": "matching",
    "sample_weights": "sample_weight",
    "benchmarks": "eval_benchmark",
}
SHARED = ("reference_images",)  # the fields of a benchmark that a setting of the command fills in
ALONE = {  # and why there is no sum of them
    "matchings": "--dmd_weight is its weight",
    "sample_weights": "sample weights cannot be added",
    "benchmarks": "an evaluation has one",
}


@dataclass(frozen=True)
class Chosen:
    """A plugin that the run names: `weight * name as label`, its class, and the values of its own flags.

    Attributes:
        group: That of the registry, or "eval_rewards": rewards that only measure.
        label: What it is called in flags and in the log; its name, unless the user says another.
        options: Values by field; of a backend, of its `Options`.
    """

    group: str
    name: str
    label: str
    weight: float
    cls: type
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def flags(self) -> type:
        """The dataclass whose fields are its flags."""
        flags: type = kinds.flags_of(self.group, self.cls)
        return flags

    @property
    def own_flags(self) -> list[Any]:
        """The fields that are flags of its own; a family or benchmark may have others, which the core's fill in."""
        core = TOPICS if self.group == "backends" else SHARED if self.group == "benchmarks" else ()
        return [f for f in kinds.flag_fields(self.group, self.cls) if f.name not in core]

    def values(self, settings: Any) -> dict[str, Any]:
        """Of all its fields: those of its own flags, and the settings of a command that have the others' names."""
        own = {f.name for f in self.own_flags}
        shared = [f.name for f in kinds.flag_fields(self.group, self.cls) if f.name not in own]
        return self.options | {name: getattr(settings, name) for name in shared if hasattr(settings, name)}

    def key(self, option: str) -> str:
        """The full name of one of its flags; a model family's have no other than their own."""
        if self.group == "backends":
            return option
        key = f"{re.sub(r'[^0-9a-zA-Z]', '_', self.label)}_{option}"
        if self.group == "eval_rewards":
            return f"eval_{key}"
        return f"_{key}" if key[0].isdigit() else key

    @property
    def title(self) -> str:
        """As the user named it, for messages."""
        return self.name if self.label == self.name else f"{self.name} as {self.label}"

    def relabelled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of its flags that go by its name, by its label: a recipe knows none."""
        plain = replace(self, label=self.name)
        keys = {self.key(f.name): plain.key(f.name) for f in self.own_flags} if plain != self else {}
        return {key: values[known] for key, known in keys.items() if known in values}

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
            raise ConfigError(f"{self.group[:-1]} '{self.title}': {error}") from error


def parts_of(named: Mapping[str, Any]) -> list[tuple[str, Term]]:
    """All plugins that settings name, each after its group."""
    return [part for group, key in SUMS.items() for part in named_in(group, str(named.get(key, "none")))]


def named_in(group: str, expression: str) -> list[tuple[str, Term]]:
    if expression == "none":
        return []
    try:
        return [(group, term) for term in parse_sum(expression, what=group[:-1])]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load(parts: Sequence[tuple[str, Term]], own: Mapping[str, str]) -> list[Chosen]:
    """The plugins that are named; `own` is the distribution of those that nobody typed, by group."""
    return [
        Chosen(
            group,
            term.name,
            term.label,
            term.weight,
            registry.load(group.removeprefix("eval_"), term.name, own.get(group)),
        )
        for group, term in parts
    ]


def active_weight(chosen: Iterable[Chosen]) -> tuple[str, Any] | None:
    """Label and instance of the weight of samples; None if there is none, or all that it would give are 1."""
    built = ((plugin.label, plugin.build()) for plugin in chosen if plugin.group == "sample_weights")
    return next(((label, weight) for label, weight in built if not getattr(weight, "idle", False)), None)


def declares(part: Any, name: str) -> bool:
    """Whether a matching, an objective or a sample weight has a need of this name (`protocols.Needs`)."""
    return bool(getattr(getattr(part, "needs", None), name, False))


def compares_scores(matching: Any) -> bool:
    """Whether a matching, or its class, does, so that its run has a fake score (`protocols.Matching`)."""
    return bool(getattr(matching, "compares_scores", True))


def flags_of_all(group: str) -> dict[str, list[Any]]:
    """The flags of each plugin of a group that works, as dataclass fields; imports them all."""
    every = registry.plugins(group)
    usable = [name for name, plugin in every.items() if registry.problem(plugin) is None]
    return {name: kinds.flag_fields(group, registry.imported(every[name])) for name in usable}
