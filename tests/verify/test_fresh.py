"""The wheel in a fresh environment: `make verify`."""

import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.verify


def test_wheel_has_every_entry_point(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("dmdr-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    bin = tmp_path / "env" / "bin"
    install = [
        bin / "pip",
        "install",
        "--quiet",
        "--constraint",
        ROOT / "constraints.txt",
        f"dmdr[all] @ file://{wheel}",
    ]
    subprocess.run(install, check=True)

    given: dict[str, Any] = {"check": True, "capture_output": True, "text": True}
    listed = subprocess.run([bin / "dmdr-plugins", "check"], **given, cwd=tmp_path).stdout
    here = subprocess.run([Path(sys.executable).parent / "dmdr-plugins", "check"], **given).stdout
    assert listed == here
    assert "objective" in listed
    train = [bin / "dmdr-train", "--model", "toy", "--rl", "refl", "--stage1_steps", "3", "--stage2_steps", "2"]
    subprocess.run([*train, "--output_dir", tmp_path / "run"], check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").is_file()
    sample = [bin / "dmdr-sample", tmp_path / "run", "--prompt", "mode 1", "--output_dir", tmp_path / "images"]
    subprocess.run(sample, check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "images" / "0000.png").is_file()
    assert "broken" not in listed
    subprocess.run([bin / "dmdr-plugins", "new", "mine"], check=True, capture_output=True, cwd=tmp_path)
    subprocess.run([bin / "pip", "install", "--quiet", "./mine[test]"], check=True, cwd=tmp_path)
    subprocess.run([bin / "pytest", "mine", "--dmdr-plugin", "mine"], check=True, capture_output=True, cwd=tmp_path)
