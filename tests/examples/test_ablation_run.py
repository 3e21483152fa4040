"""The whole ablation matrix on the toy: killed, gone on with, and a cell that fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).with_name("ablation_toy.yaml")
WAIT = 300  # seconds, on a machine that does much else


def command(file: Path, root: Path, *flags: str) -> "subprocess.Popen[str]":
    """The command, in a folder where a plugin's file lies; the root of the repository is on the path instead."""
    program = [sys.executable, "-m", "examples.ablation_matrix"]
    call = [*program, "--config", str(file), "--output_dir", str(root / "out"), *flags]
    around = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=around)


def written(root: Path) -> dict[str, int]:
    """When each finished run wrote its report."""
    return {file.parent.name: file.stat().st_mtime_ns for file in (root / "out" / "cells").glob("*/report.html")}


@pytest.mark.verify
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_matrix_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    content = yaml.safe_load(TOY.read_text())
    del content["blocks"]["weights"], content["quick"]
    (tmp_path / "bad.py").write_text("def score(images):\n    raise ValueError('no judge today')\n")
    content["blocks"]["bad"] = {"cells": {"bad": {"reward": "bad.py:score", "rl": "none"}}, "stage1": {"reward": "toy"}}
    file = tmp_path / "matrix.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))

    first = command(file, tmp_path, "--jobs", "1")
    deadline = time.monotonic() + WAIT
    while not written(tmp_path) or len(list((tmp_path / "out" / "cells").iterdir())) < 2:  # stage 1 is done, another on
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    children = psutil.Process(first.pid).children(recursive=True)
    done = written(tmp_path)
    os.kill(first.pid, number)
    first.communicate(timeout=WAIT)
    assert first.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert children
    psutil.wait_procs(children, timeout=WAIT)
    assert not any(child.is_running() for child in children)  # no orphans

    second = command(file, tmp_path, "--jobs", "2")
    output, errors = second.communicate(timeout=WAIT)
    assert second.returncode == 1, errors
    assert {name: when for name, when in written(tmp_path).items() if name in done} == done  # not repeated
    assert not any(f" {name}" in output for name in done)
    assert "no judge today" in next(line for line in errors.splitlines() if line.startswith("FAILED stage2_none"))
    assert len(written(tmp_path)) == 3  # the others went on
    report = (tmp_path / "out" / "report.html").read_text()
    assert "3 of 4 runs" in report
    said = "bad, seed 0 is not finished: exit code 1: "
    line = next(line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if said in line)
    assert "no judge today" in line and "no judge today" in report
    assert errors.splitlines()[-1] == "ablation_matrix: failures: 1; run the same command to try them again"
    assert "one seed: RL only" in output

    third = command(file, tmp_path, "--report_only")
    assert "one seed: RL only" in third.communicate(timeout=WAIT)[0]
    assert third.returncode == 0
    assert "bad, seed 0 is not finished: the last line of its log is: " in (tmp_path / "out" / "table.md").read_text()
