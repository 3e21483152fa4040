"""The configuration of a component. It has the defaults of its class; an invalid value is refused by file and name."""

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

from dmdr.backends.loading import Source, read_config
from dmdr.errors import ConfigError


class ComponentConfig(dict[str, Any]):
    """What a component's file says, over the defaults of its class.

    Attributes:
        where: The file, for messages.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def refused(self, name: str, expected: str) -> ConfigError:
        """The error that a value is not what it must be."""
        return ConfigError(f"{self.where}: {name} is {json.dumps(self.get(name), default=str)}; expected {expected}")

    def require(self, name: str, *allowed: Any) -> None:
        """Refuse all values but these.

        Raises:
            ConfigError: If it has another.
        """
        if self.get(name) not in allowed:
            raise self.refused(name, " or ".join(map(json.dumps, allowed)))

    def number(self, name: str, *, positive: bool = False) -> float:
        """A finite number.

        Raises:
            ConfigError: If it is none, or is not above 0 although it must be `positive`.
        """
        if not _is_number(self.get(name), positive):
            raise self.refused(name, "a number above 0" if positive else "a number")
        return float(self[name])

    def whole(self, name: str) -> int:
        """A whole number above 0.

        Raises:
            ConfigError: If it is none.
        """
        if not _is_whole(self.get(name)):
            raise self.refused(name, "a whole number above 0")
        return int(self[name])

    def wholes(self, name: str) -> list[int]:
        """Whole numbers above 0, at least one.

        Raises:
            ConfigError: If it is no list of such.
        """
        values = self.get(name)
        if not isinstance(values, list | tuple) or not values or not all(map(_is_whole, values)):
            raise self.refused(name, "a list of whole numbers above 0")
        return list(values)

    def numbers(self, name: str, count: int, *, positive: bool = False) -> list[float]:
        """So many finite numbers.

        Raises:
            ConfigError: If it is no list of so many, or one is not above 0 although all must be `positive`.
        """
        values = self.get(name)
        if not isinstance(values, list | tuple) or len(values) != count:
            raise self.refused(name, f"a list of {count} numbers")
        if not all(_is_number(value, positive) for value in values):
            raise self.refused(name, "numbers above 0" if positive else "numbers")
        return [float(value) for value in values]


def read_component(cls: Any, source: Source, subfolder: str = "") -> ComponentConfig:
    """The configuration of a component, or of the pipeline itself where no subfolder is named.

    Args:
        cls: Class that it configures, whose defaults hold where the file says nothing.
        source: Where the pipeline's files are.
        subfolder: The component's folder there.

    Raises:
        ConfigError: If it is missing or no JSON.
    """
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    file = f"{source.place(subfolder)}/{cls.config_name}"
    return ComponentConfig({"_class_name": cls.__name__} | defaults | read_config(cls, source, subfolder), file)


def parts_of(index: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Library and class of each component that a pipeline's `model_index.json` names; None where it has none.

    Its other values are the pipeline's own configuration, of which some are lists, too.
    """

    def names(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str | None) for each in value)

    return {name: tuple(value) for name, value in index.items() if names(value)}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any, positive: bool) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (value > 0 or not positive)
