"""Runs whose disks, folders, rewards, prompts and servers break."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "torture" / "faults.py"

pytestmark = pytest.mark.verify


def test_each_fault_ends_as_the_guides_say_and_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path / "faults")]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print("\n" + found.stdout)
    assert found.returncode == 0, found.stdout
