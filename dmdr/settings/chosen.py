"""The plugins that a run names, with the values of their flags."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dmdr.errors import ConfigError
from dmdr.settings import registry
from dmdr.settings.expression import parse_sum

# By group, the setting that names a sum of its plugins.
SUMS = {
    "objectives": "rl",
    "rewards": "reward",
    "eval_rewards": "eval_reward",
    "matchings": "matching",
    "sample_weights": "sample_weight",
}
ALONE = {"matchings": "--dmd_weight is its weight", "sample_weights": "weights of samples do not add up"}


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


def parts_of(named: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Group, weight and name of all plugins that settings name."""
    return [part for group, key in SUMS.items() for part in named_in(group, str(named.get(key, "none")))]


def named_in(group: str, expression: str) -> list[tuple[str, float, str]]:
    if expression == "none":
        return []
    try:
        return [(group, weight, name) for weight, name in parse_sum(expression, what=group[:-1])]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load(parts: Sequence[tuple[str, float, str]], own: Mapping[str, str]) -> list[Chosen]:
    """The plugins that are named; `own` is the distribution of those that nobody typed, by group."""
    return [
        Chosen(group, name, weight, registry.load(group.removeprefix("eval_"), name, own.get(group)))
        for group, weight, name in parts
    ]


def flags_of_all(group: str) -> dict[str, list[Any]]:
    """The flags of each plugin of a group that works, as dataclass fields; imports them all."""
    every = registry.plugins(group)
    usable = [name for name, plugin in every.items() if registry.problem(plugin) is None]
    found = {name: registry.flags_of(group, registry.imported(every[name])) for name in usable}
    return {name: [f for f in dataclasses.fields(flags) if f.init] for name, flags in found.items()}
