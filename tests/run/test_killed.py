"""Runs that are killed at one of their changes of files: nothing is lost, and they go on to the same bits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "helpers" / "kill_points.py"
FULL = pytest.mark.verify


def killed(*arguments: str) -> dict[str, Any]:
    """What the program prints."""
    command = [sys.executable, str(PROGRAM), *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
    return dict(json.loads(found.stdout))


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=FULL)])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path, every: int) -> None:
    """Saves, prunes, the ends of both stages, image grids, the export and the report are among the changes."""
    found = killed(str(tmp_path), "--every", str(every))
    assert found["changes"] > 90
    assert found["killed"] == len(range(1, found["changes"] + 1, every))
    assert not found["wrong"]


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=FULL)])
def test_a_run_that_is_killed_twice_keeps_the_end_of_its_stage(tmp_path: Path, every: int) -> None:
    found = killed(str(tmp_path), "--resumed", "--every", str(every))
    assert found["killed"] == len(range(1, found["changes"] + 1, every)) > 2
    assert not found["wrong"]
