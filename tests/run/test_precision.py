"""Precision of the networks and of the rewards: what is chosen where nothing is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dmdr import train
from dmdr.errors import ConfigError
from dmdr.run.device import chosen_precision

RUN: dict[str, Any] = {
    "model": "toy",
    "rl": "refl",
    "stage1_steps": 1,
    "stage2_steps": 1,
    "fake_updates": 1,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "sample_steps": 0,
    "sample_images": 2,
    "teacher_steps": 2,
}


@pytest.mark.parametrize(
    ("given", "launched", "gpu", "chosen"),
    [
        (None, None, True, "bf16"),
        (None, None, False, "no"),
        (None, "fp16", True, "fp16"),
        (None, "no", True, "no"),
        ("no", "bf16", True, "no"),
        ("bf16", None, False, "bf16"),
    ],
)
def test_the_flag_then_the_launcher_then_the_device(
    given: str | None, launched: str | None, gpu: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert chosen_precision(given, gpu=gpu) == chosen


def test_a_precision_of_the_launcher_that_no_network_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="accelerate launch --mixed_precision fp8: expected no, bf16, fp16"):
        chosen_precision(None, gpu=True)


def test_accelerate_launch_says_the_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> None:
    """By the variable that it sets. The precision is shown, and written to the export."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    folder = train(**RUN, output_dir=str(tmp_path / "run"))
    assert '"precision": "bf16"' in (folder / "overview.json").read_text()
    assert '"mixed_precision": "bf16"' in (folder / "student" / "sampling.json").read_text()


@pytest.mark.parametrize(("flag", "dtype"), [({}, torch.float32), ({"reward_dtype": "bf16"}, torch.bfloat16)])
def test_rewards_have_a_precision_of_their_own(
    flag: dict[str, str], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    from dmdr.backends.toy import Redness

    told = []
    monkeypatch.setattr(Redness, "prepare", lambda self, device, dtype: told.append(dtype))
    train(**RUN, mixed_precision="bf16", **flag, output_dir=str(tmp_path / "run"))
    assert told == [dtype]
