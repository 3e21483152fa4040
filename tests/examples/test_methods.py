"""The digits' table of methods: each row is a run that could start, and a second row takes as long as the first method.

No run is trained here.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dmdr.run.job import planned
from dmdr.settings.parse import parse

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
Runs = dict[str, dict[str, Any]]  # settings by the name of the folder


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DIGITS)
    for name in ("table", "methods"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("methods")


@pytest.fixture
def runs(methods: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """What would have been trained."""
    asked: Runs = {}

    def trained(folder: Path, **settings: Any) -> Path:
        asked[folder.name] = settings
        return folder

    monkeypatch.setattr(methods, "trained", trained)
    return asked


def test_each_row_is_a_run_that_could_start(methods: ModuleType, runs: Runs, tmp_path: Path) -> None:
    for method in methods.METHODS:
        method.run(tmp_path, 0)
    assert len(runs) == len(methods.METHODS)
    for method, settings in zip(methods.METHODS, runs.values(), strict=True):
        plan, _, _ = planned(parse(settings={"model": "digits", "output_dir": str(tmp_path), **settings}))
        trains = [stage for stage in plan.stages if stage.steps]
        assert [stage.steps for stage in trains] == [method.updates], method.name


def test_a_second_row_takes_as_long_as_the_first_method(
    methods: ModuleType, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it would have another length by more than a tenth; all seeds have the lengths of the first one."""
    took = {"dmd": 100.0, "ac_dmd": 200.0, "lcm": 50.0, "gndm": 105.0, "refl": 60.0, "draft": 80.0, "grpo": 64.0}
    chosen = [method for method in methods.METHODS if method.name in took]
    longer: dict[str, int] = {}
    for seed, slower in ((0, 1.0), (1, 3.0)):
        monkeypatch.setattr(methods, "seconds", lambda folder, stage, s=slower: s * took[folder.name.split("-")[1]])
        found = methods.cells(tmp_path, seed, chosen, longer)
        assert [title for title in found if "dmd" in title or "lcm" in title or "draft" in title] == [
            *("dmd, 140 updates", "ac_dmd, 140 updates", "ac_dmd, 70 updates", "lcm, 140 updates", "lcm, 280 updates"),
            *("draft, 60 updates", "draft, 45 updates"),
        ]
        assert not {"gndm, 133 updates", "grpo, 56 updates"} & set(found)
    assert {settings["seed"] for settings in runs.values()} == {0, 1}
