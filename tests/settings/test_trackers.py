"""--report_to: which trackers it names, and what accelerate knows of them."""

from importlib.util import find_spec

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType

from dmdr.errors import ConfigError
from dmdr.settings.parse import parse
from dmdr.settings.trackers import TRACKERS, trackers_of

ABSENT = next((name for name in TRACKERS if find_spec(name) is None), None)


def test_all_that_accelerate_has_are_known() -> None:
    assert {str(name) for name in LoggerType} - {"all"} == TRACKERS.keys()
    for name, tracker in TRACKERS.items():
        assert tracker.images is None or hasattr(LOGGER_TYPE_TO_CLASS[name], "log_images")


def test_several_none_and_all() -> None:
    assert trackers_of("none") == {}
    assert list(trackers_of(" tensorboard,tensorboard")) == ["tensorboard"]
    assert "tensorboard" in trackers_of("all") and ABSENT not in trackers_of("all")


@pytest.mark.parametrize(
    ("report_to", "said"),
    [
        ("tensorboard,wanda", "--report_to: accelerate has no tracker 'wanda'; it has aim, clearml, comet_ml, "),
        ("tensorboard,", "--report_to: accelerate has no tracker ''; it has aim, "),
        ("", "--report_to: accelerate has no tracker ''; it has aim, "),
        ("none,tensorboard", "--report_to none,tensorboard: 'none' stands alone"),
        ("tensorboard,all", "--report_to tensorboard,all: 'all' stands alone"),
        (f"{ABSENT}", f"--report_to: the package of '{ABSENT}' is not installed: pip install {ABSENT}"),
    ],
)
def test_refused_by_name(report_to: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(["--model", "toy", "--report_to", report_to])
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("flag", ["run_name", "tracker_project_name"])
@pytest.mark.parametrize("report_to", ["tensorboard", "none"])
def test_a_name_that_no_tracker_takes(flag: str, report_to: str) -> None:
    with pytest.raises(ConfigError, match=f"^--{flag} is not read by --report_to {report_to}; leave it out$"):
        parse(["--model", "toy", "--report_to", report_to, f"--{flag}", "mine"])
