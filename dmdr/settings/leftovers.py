"""Settings of a file that the run does not use: flags have replaced their part, or an older version wrote them."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dmdr.settings import kinds, registry
from dmdr.settings.chosen import Chosen, flags_of_all, parts_of
from dmdr.settings.fields import TOPICS, Config

logger = logging.getLogger("dmdr")

GONE = {"refl_balance": "fixed"}  # settings of earlier versions, and the value at which they change nothing


def left_out(in_file: Mapping[str, Any], chosen: Sequence[Chosen], moved: bool) -> set[str]:
    """The settings of a file to leave out, each with a warning unless it has its default.

    Args:
        in_file: Settings by name.
        chosen: The run's plugins, its model family among them.
        moved: Flags name another model, or another family, than the file.
    """
    found = set()
    for key, value in in_file.items():
        if str(key) in _known(chosen):
            continue
        if _of_replaced(str(key), in_file, chosen):
            loud = True
        else:
            weights, families = _of_default_weight(str(key), in_file, chosen), _of_families(str(key))
            default = value in [_default(f) for f in (*weights, *families)] or (key, value) in GONE.items()
            loud = bool(weights) or (bool(families) and moved)
            if not (loud or default):
                continue  # refused with the unknown settings
            loud = loud and not default
        found.add(key)
        if loud:
            logger.warning("the setting %s in the file is ignored: the run does not use its plugin or model", key)
    return found


def _known(chosen: Sequence[Chosen]) -> set[str]:
    flags = [(plugin, f.name) for plugin in chosen for f in plugin.own_flags]
    return {name for plugin, flag in flags for name in (flag, plugin.key(flag))} | TOPICS.keys()


def _of_replaced(key: str, in_file: Mapping[str, Any], chosen: Sequence[Chosen]) -> bool:
    """Whether it is a flag, by its full name, of a plugin that the file names and flags have replaced."""
    there = {(plugin.group, plugin.name, plugin.label) for plugin in chosen}
    named = [Chosen(group, term.name, term.label, term.weight, object) for group, term in parts_of(in_file)]
    gone = tuple(plugin.key("") for plugin in named if (plugin.group, plugin.name, plugin.label) not in there)
    own = tuple(plugin.key("") for plugin in chosen if plugin.group != "backends")
    return key.startswith(gone) and not key.startswith(own)


def _of_default_weight(key: str, in_file: Mapping[str, Any], chosen: Sequence[Chosen]) -> list[Any]:
    """The field of this name of the default weight of samples, in a run that has none."""
    if "sample_weight" in in_file or any(plugin.group == "sample_weights" for plugin in chosen):
        return []
    weight = registry.load("sample_weights", Config.sample_weight, "dmdr")
    return [f for f in kinds.flag_fields("sample_weights", weight) if f.name == key]


def _of_families(key: str) -> list[Any]:
    """The fields of this name of all model families."""
    return [f for flags in flags_of_all("backends").values() for f in flags if f.name == key]


def _default(f: Any) -> Any:
    """The default of a dataclass field."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
