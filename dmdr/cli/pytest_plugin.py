"""`pytest --dmdr-plugin NAME`: the checks of `dmdr.testing` for a plugin, installed or in a file, a test per check.

    pytest --dmdr-plugin my_objective -k micro_batch
    pytest --dmdr-plugin my_file.py:MyReward --dmdr-option checkpoint=weights.safetensors
    pytest --dmdr-plugin refl --dmdr-plugin grpo --dmdr-option refl.steps=last
    pytest --dmdr-plugin MyPipeline --dmdr-model path/to/pipeline --dmdr-prompt "a cat"
    pytest --dmdr-plugin my_benchmark --dmdr-column "prompt=[one cat, two cats, a dog, a cow]"

Where no paths are given, these checks are all that runs.
pytest loads this file wherever DMDR is installed: everything heavy waits until a plugin is named.
"""

import inspect
import traceback
import typing
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import yaml

from dmdr.errors import ConfigError, TrainingError, one_line
from dmdr.settings import kinds, registry
from dmdr.settings.fields import typed
from dmdr.settings.functions import load_object

Check = Callable[[], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dmdr", "checks of DMDR plugins")
    group.addoption(
        "--dmdr-plugin", action="append", default=[], metavar="NAME", help="plugin to check; may be repeated"
    )
    group.addoption(
        "--dmdr-option",
        action="append",
        default=[],
        metavar="[NAME.]KEY=VALUE",
        help="value of a field of this plugin, or of all that have the field; lists as in YAML",
    )
    group.addoption(
        "--dmdr-column",
        action="append",
        default=[],
        metavar="NAME=[A, B, C, D]",
        help="column of the four prompt rows that a reward or a benchmark is checked on; 0 to 3 by default",
    )
    group.addoption(
        "--dmdr-model",
        metavar="FOLDER|NAME",
        help="pipeline folder that a backend is checked on, or named model that a benchmark asks",
    )
    group.addoption(
        "--dmdr-prompt", action="append", default=[], metavar="TEXT", help="prompt that a backend understands"
    )


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave out what lies in the working directory by chance."""
    chosen = config.args_source is pytest.Config.ArgsSource.ARGS
    return True if config.getoption("--dmdr-plugin") and not chosen else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The plugins to check, beside the folders that are collected anyway."""
    report = yield
    if isinstance(collector, pytest.Session) and report.passed:
        report.result = [*(report.result or ()), *_plugins(collector)]
    return report


def _plugins(session: pytest.Session) -> Iterator["PluginChecks"]:
    config = session.config
    found = [(name, *plugin) for name in config.getoption("--dmdr-plugin") for plugin in _classes(name)]
    options = _options(config, [(name, _fields(group, cls)) for name, group, cls in found])
    for (name, group, cls), fields in zip(found, options, strict=True):
        with _refusals(name):
            checks = CHECKS[group](cls, fields, config)
        yield PluginChecks.from_parent(session, name=name, nodeid=name, checks=checks, file=_file(cls))


class PluginChecks(pytest.Collector):
    """The promises of one plugin.

    Attributes:
        checks: Title -> check.
        file: Where the plugin is written.
        tried: Whether a check has run.
        unusable: Whether a check has found that the plugin cannot be run at all.
    """

    def __init__(self, *, checks: Mapping[str, Check], file: str, **node: Any) -> None:
        super().__init__(**node)
        self.checks, self.file = checks, file
        self.tried = self.unusable = False

    def collect(self) -> Iterator["PluginCheck"]:
        for title, check in self.checks.items():
            yield PluginCheck.from_parent(self, name=title, check=check, plugin=self)


class PluginCheck(pytest.Item):
    """One promise of one plugin."""

    def __init__(self, *, check: Check, plugin: PluginChecks, **node: Any) -> None:
        super().__init__(**node)
        self.check, self.plugin = check, plugin

    def runtest(self) -> None:
        from dmdr.testing.common import CannotRun

        if self.plugin.unusable:
            pytest.skip("it cannot be run, see above")
        first, self.plugin.tried = not self.plugin.tried, True
        try:
            self.check()
        except Exception as error:
            promise = isinstance(error, AssertionError) and bool(str(error))
            self.plugin.unusable = isinstance(error, CannotRun) or (first and not promise)
            raise

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """The broken promise alone; of whatever else was raised, the way there from the plugin's own file on."""
        error = excinfo.value
        if isinstance(error, AssertionError | ConfigError | TrainingError) and str(error):
            return str(error)
        frames = traceback.extract_tb(excinfo.tb)
        own = next((index for index, frame in enumerate(frames) if frame.filename == self.plugin.file), -1)
        return "".join([*traceback.format_list(frames[own:]), *traceback.format_exception_only(error)])

    def reportinfo(self) -> tuple[Any, None, str]:
        return (
            self.path,
            None,
            f"{self.name} of {self.plugin.name}",
        )  # no end of the id, in which pytest reads dots as ::


# --- Which plugins, and with which fields ----------------------------------------------------------------------------


def _classes(name: str) -> list[tuple[str, Any]]:
    """The classes of this name, with their groups.

    Raises:
        pytest.UsageError: If there is none that can be checked.
    """
    with _refusals(name):
        found = [(group, registry.load(group, name)) for group in CHECKS if registry.registered(group, name)]
        if found:
            return found
        for group in kinds.GROUPS:
            if registry.registered(group, name):
                raise ConfigError(f"this is one of the {group}, which have no checks")
        if ":" not in name:
            known = [known for group in CHECKS for known in registry.plugins(group)]
            raise ConfigError(
                f"no plugin of this name is installed{registry.suggest(name, known)}; dmdr-plugins lists all; "
                "write a plugin in a file as my_file.py:NAME"
            )
        kind = kinds.kind(load_object(name))
        if kind is None:
            raise ConfigError(
                "it is no plugin: an objective has `needs`, a reward has `differentiable`, a matching has `fake_loss`, "
                "a backend has `student`, a benchmark has `figures`, and a sample weight is called with (draw, "
                "direction, ctx); see dmdr.protocols and dmdr.benchmarks"
            )
        return [(kind, registry.load(kind, name))]


def _fields(group: str, cls: Any) -> dict[str, Any]:
    """Its flags by name, and their types."""
    hints = typing.get_type_hints(kinds.flags_of(group, cls))
    return {field.name: hints[field.name] for field in kinds.flag_fields(group, cls)}


def _file(cls: Any) -> str:
    try:
        return inspect.getsourcefile(cls) or ""
    except TypeError:  # not written in a file
        return ""


def _options(config: pytest.Config, plugins: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What --dmdr-option gives to each of the plugins, which come with their fields and those's types."""
    given: list[dict[str, Any]] = [{} for _ in plugins]
    for key, text in _pairs(config, "--dmdr-option"):
        owner, _, field = key.rpartition(".")
        meant = [index for index, (name, _) in enumerate(plugins) if owner in ("", name)]
        takers = [index for index in meant if field in plugins[index][1]]
        if not takers:
            known = sorted({field for index in meant for field in plugins[index][1]})
            if not meant:
                raise pytest.UsageError(f"--dmdr-option {key}: no --dmdr-plugin is called {owner}")
            raise pytest.UsageError(
                f"--dmdr-option {key}: there is no field '{field}'{registry.suggest(field, known)}; "
                f"{' and '.join(dict.fromkeys(plugins[index][0] for index in meant))} has "
                f"{', '.join(known) or 'none'}"
            )
        for index in takers:
            hint = plugins[index][1][field]
            try:
                given[index][field] = typed(f"--dmdr-option {key}", _read("--dmdr-option", key, text, hint), hint)
            except ConfigError as error:
                raise pytest.UsageError(str(error)) from error
    return given


def _pairs(config: pytest.Config, flag: str) -> Iterator[tuple[str, str]]:
    """Key and value of each use of a flag."""
    for option in config.getoption(flag):
        key, equals, value = option.partition("=")
        if not equals:
            raise pytest.UsageError(f"{flag} {option} is no KEY=VALUE")
        yield key, value


def _read(flag: str, key: str, text: str, hint: Any = None) -> Any:
    """A value of this type: text and numbers as a flag takes them, anything else as YAML."""
    accepted = (hint, *(typing.get_args(hint) if typing.get_origin(hint) is not list else ()))
    if text in accepted or (str in accepted and (text != "null" or type(None) not in accepted)):
        return text
    if float in accepted:
        with suppress(ValueError):  # YAML takes 1e-4 for text
            return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise pytest.UsageError(f"{flag} {key}={text} is no YAML: {' '.join(str(error).split())}") from error


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What is wrong with a plugin of this name, in one line of pytest's."""
    try:
        yield
    except ConfigError as error:
        raise pytest.UsageError(f"--dmdr-plugin {name}: {error}") from error


# --- Its checks, by title --------------------------------------------------------------------------------------------


@contextmanager
def _building(group: str, cls: Any) -> Iterator[None]:
    """What its constructor raises, in one line with the fields that may be set."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever a stranger's constructor may do
        known = ", ".join(_fields(group, cls))
        hint = f"; --dmdr-option KEY=VALUE sets its fields: {known}" if known else ""
        raise ConfigError(f"it cannot be built: {one_line(error)}{hint}") from error


def _built_anew(group: str, checks: str) -> Callable[[Any, dict[str, Any], pytest.Config], dict[str, Check]]:
    """Of plugins that every check builds anew, by the name of the list in `dmdr.testing`."""

    def of(cls: Any, fields: dict[str, Any], config: pytest.Config) -> dict[str, Check]:
        from dmdr import testing

        build = partial(cls, **fields)
        with _building(group, cls):
            build()
        return {check.__name__: partial(check, build) for check in getattr(testing, checks)}

    return of


def _columns(config: pytest.Config) -> dict[str, Sequence[Any]]:
    """What --dmdr-column says of the four prompt rows, by name."""
    columns: dict[str, Sequence[Any]] = {}
    for name, text in _pairs(config, "--dmdr-column"):
        column = _read("--dmdr-column", name, text)
        if not isinstance(column, list) or len(column) != 4:
            raise ConfigError(f"--dmdr-column {name} takes a list of four values, as in '{name}=[a, b, c, d]'")
        columns[name] = column
    return columns


def _reward_checks(cls: Any, fields: dict[str, Any], config: pytest.Config) -> dict[str, Check]:
    from dmdr.testing.rewards import REWARD_CHECKS, RewardTrial

    columns = {name: [0, 1, 2, 3] for name in getattr(cls, "columns", ())} | _columns(config)
    with _building("rewards", cls):
        trial = RewardTrial(cls(**fields), columns=columns)
    return {check.__name__: partial(check, trial) for check in REWARD_CHECKS}


def _backend_checks(cls: Any, fields: dict[str, Any], config: pytest.Config) -> dict[str, Check]:
    from dmdr.protocols import with_options
    from dmdr.testing.backends import BACKEND_CHECKS, BackendTrial

    folder = config.getoption("--dmdr-model")
    if folder is None:
        raise ConfigError("a backend is checked on a small pipeline of its class: name its folder with --dmdr-model")
    small = {"lora_rank": 4, "lora_alpha": 8.0, "fake_lora_rank": 4, "fake_lora_alpha": 4.0}
    with _building("backends", cls):
        backend = cls(folder, with_options(cls.Options, **small | fields))
    trial = BackendTrial(backend, config.getoption("--dmdr-prompt") or ["a cat", "a dog"])
    return {check.__name__: partial(check, trial) for check in BACKEND_CHECKS}


def _benchmark_checks(cls: Any, fields: dict[str, Any], config: pytest.Config) -> dict[str, Check]:
    from dmdr.testing.benchmarks import BENCHMARK_CHECKS, PROMPTS, BenchmarkTrial

    columns, rows = _columns(config), None
    if columns:  # else it may have rows of its own
        columns = {"prompt": PROMPTS} | columns
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    name = config.getoption("--dmdr-model") if hasattr(cls, "ask") else None
    model = registry.load("models", name)() if name else None
    with _building("benchmarks", cls):
        trial = BenchmarkTrial(cls(**fields), rows, model=model)
    return {check.__name__: partial(check, trial) for check in BENCHMARK_CHECKS}


CHECKS = {
    "objectives": _built_anew("objectives", "OBJECTIVE_CHECKS"),
    "rewards": _reward_checks,
    "matchings": _built_anew("matchings", "MATCHING_CHECKS"),
    "sample_weights": _built_anew("sample_weights", "SAMPLE_WEIGHT_CHECKS"),
    "backends": _backend_checks,
    "benchmarks": _benchmark_checks,
}
