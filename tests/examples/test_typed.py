"""DMDR is a typed package: a stranger's code type-checks against it under `mypy --strict`."""

import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
CONFORM = """
from best import Best
from better import Better
from dmdr.benchmarks import Benchmark, BringsRows
from dmdr.protocols import BringsLearners, Matching, Reward, RewardObjective, SampleWeight
from dmdr_template import Brightness, TargetScore
from ink import Ink
from red import Red
from reinforce import Reinforce
from surrogate import Surrogate
from unit import Unit

objectives: list[RewardObjective] = [TargetScore(), Best(), Reinforce(), Surrogate()]
matching: Matching = Unit()
learns: BringsLearners = Surrogate()
weight: SampleWeight = Better()
rewards: list[Reward] = [Brightness(), Ink()]
benchmark: Benchmark = Red()
brings: BringsRows = Red()
"""


def test_a_strangers_package_is_checked_against_our_types(tmp_path: Path) -> None:
    """The plugin template, and the files of the plugins' guide, against an installed DMDR."""
    environment, code = tmp_path / "environment", tmp_path / "code"
    venv.create(environment, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (site / "dmdr").symlink_to(ROOT / "dmdr")  # as a wheel would install it; by MYPYPATH it would not need py.typed
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    code.mkdir()
    (code / "dmdr_template").symlink_to(ROOT / "examples" / "plugin_template" / "dmdr_template")
    (code / "conform.py").write_text(CONFORM)
    for content in re.findall(r"^```python\n(.*?)^```$", (ROOT / "plugins" / "README.md").read_text(), re.M | re.S):
        (code / content.splitlines()[0].removeprefix("# ")).write_text(content)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(tmp_path / "cache")]
    mypy += ["--python-executable", str(environment / "bin" / "python"), "--no-error-summary", "-p", "dmdr_template"]
    done = subprocess.run([*mypy, "-m", "conform"], capture_output=True, text=True, cwd=code)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_the_wheel_says_that_it_is_typed() -> None:
    builder = WheelBuilder(str(ROOT))
    assert "dmdr/py.typed" in {file.distribution_path for file in builder.recurse_included_files()}
