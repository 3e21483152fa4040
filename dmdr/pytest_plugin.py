"""`pytest --dmdr-plugin NAME`: the checks of `dmdr.testing` for a plugin, installed or in a file, a test per check.

    pytest --dmdr-plugin my_objective
    pytest --dmdr-plugin my_file.py:MyReward --dmdr-option checkpoint=weights.safetensors
    pytest --dmdr-plugin MyPipeline --dmdr-model path/to/pipeline --dmdr-prompt "a cat"

Where no paths are given, these checks are all that runs.
pytest loads this file wherever DMDR is installed: everything heavy waits until a plugin is named.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import yaml

from dmdr import registry
from dmdr.errors import ConfigError, TrainingError

CHECKED = ("objectives", "rewards", "backends")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dmdr", "checks of DMDR plugins")
    group.addoption(
        "--dmdr-plugin", action="append", default=[], metavar="NAME", help="plugin to check; may be repeated"
    )
    group.addoption(
        "--dmdr-option", action="append", default=[], metavar="KEY=VALUE", help="value of a field of its, read as YAML"
    )
    group.addoption("--dmdr-model", metavar="FOLDER", help="pipeline folder that a backend is checked on")
    group.addoption(
        "--dmdr-prompt", action="append", default=[], metavar="TEXT", help="prompt that a backend understands"
    )


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave out what lies in the working directory by chance."""
    chosen = config.args_source is pytest.Config.ArgsSource.ARGS
    return True if config.getoption("--dmdr-plugin") and not chosen else None


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in config.getoption("--dmdr-plugin"):
        try:
            for title, check in _checks(name, config):
                node = f"{name}::{title}"
                items.append(PluginCheck.from_parent(session, name=node, nodeid=node, check=check))
        except ConfigError as error:
            raise pytest.UsageError(f"--dmdr-plugin {name}: {error}") from error


class PluginCheck(pytest.Item):
    """One promise of one plugin."""

    def __init__(self, *, check: Callable[[], None], **node: Any) -> None:
        super().__init__(**node)
        self.check = check

    def runtest(self) -> None:
        self.check()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The broken promise alone; whatever else was raised keeps its traceback."""
        if isinstance(excinfo.value, AssertionError | ConfigError | TrainingError) and str(excinfo.value):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, None, str]:
        return self.path, None, self.name


def _checks(name: str, config: pytest.Config) -> Iterator[tuple[str, Callable[[], None]]]:
    """Title and call of each check that a plugin of this name has to pass."""
    options = _options(config)
    for group, cls in _classes(name):
        if group == "objectives":
            yield from _objective_checks(lambda cls=cls: _build(cls, options))  # type: ignore[misc]
        elif group == "rewards":
            yield from _reward_checks(cls, options)
        else:
            yield from _backend_checks(cls, config)


def _classes(name: str) -> list[tuple[str, Any]]:
    """The classes of this name, with their groups.

    Raises:
        ConfigError: If there is none that can be checked.
    """
    found = [(group, registry.load(group, name)) for group in CHECKED if registry.registered(group, name)]
    if found:
        return found
    if ":" not in name:
        known = [known for group in CHECKED for known in registry.plugins(group)]
        raise ConfigError(
            f"no objective, reward or backend of this name is installed{registry.suggest(name, known)}; "
            "dmdr-plugins lists them, and one in a file is given as my_file.py:NAME"
        )
    reasons = []
    for group in CHECKED:
        try:
            return [(group, registry.load(group, name))]
        except registry.PluginError as error:  # what it lacks for this group
            reasons.append(str(error))
    raise ConfigError("; ".join(reasons))


def _options(config: pytest.Config) -> dict[str, Any]:
    given = {}
    for option in config.getoption("--dmdr-option"):
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--dmdr-option {option} is no KEY=VALUE")
        given[key] = yaml.safe_load(value)
    return given


def _build(cls: Any, options: dict[str, Any]) -> Any:
    try:
        return cls(**options)
    except TypeError as error:
        raise ConfigError(f"{error}; give its fields with --dmdr-option KEY=VALUE") from error


def _objective_checks(build: Callable[[], Any]) -> Iterator[tuple[str, Callable[[], None]]]:
    from dmdr.testing import OBJECTIVE_CHECKS

    build()
    for check in OBJECTIVE_CHECKS:
        yield check.__name__, lambda check=check: check(build, None)  # type: ignore[misc]


def _reward_checks(cls: Any, options: dict[str, Any]) -> Iterator[tuple[str, Callable[[], None]]]:
    from dmdr.testing.rewards import REWARD_CHECKS, RewardTrial

    columns: dict[str, Sequence[Any]] = {name: [0, 1, 2, 3] for name in getattr(cls, "columns", ())}
    trial = RewardTrial(_build(cls, options), columns=columns)
    for check in REWARD_CHECKS:
        yield check.__name__, lambda check=check: check(trial)  # type: ignore[misc]


def _backend_checks(cls: Any, config: pytest.Config) -> Iterator[tuple[str, Callable[[], None]]]:
    from dmdr.protocols import BackendOptions
    from dmdr.testing.backends import BACKEND_CHECKS, BackendTrial

    folder = config.getoption("--dmdr-model")
    if folder is None:
        raise ConfigError("a backend is checked on a small pipeline of its class: name its folder with --dmdr-model")
    options = BackendOptions(lora_rank=4, lora_alpha=8, fake_lora_rank=4, fake_lora_alpha=4)
    trial = BackendTrial(cls(folder, options), config.getoption("--dmdr-prompt") or ["a cat", "a dog"])
    for check in BACKEND_CHECKS:
        yield check.__name__, lambda check=check: check(trial)  # type: ignore[misc]
