"""A run that hacks its reward says so, and what to go back to."""

import json
from pathlib import Path
from typing import Any

import pytest

import dmdr.run.run
from dmdr import train
from dmdr.errors import TrainingError
from dmdr.run.folder import never_trained

SMALL: dict[str, Any] = {
    "model": "toy", "per_device_train_batch_size": 32, "sample_steps": 0, "sample_images": 2, "report_to": "none",
    "logging_steps": 10, "num_eval_samples": 64, "teacher_steps": 2,
}  # fmt: skip
ALONE = SMALL | {
    "rl": "refl", "reward": "toy", "dmd_weight": 0.0, "stage2_steps": 30, "eval_steps": 10, "save_steps": 10,
    "stage2_learning_rate": 1e-2, "save_total_limit": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        settings = SMALL | {"rl": "none", "reward": "none", "stage1_steps": 100, "stage2_steps": 0, "fake_updates": 2}
        return train(**settings, learning_rate=3e-3, output_dir=str(tmp_path_factory.mktemp("first") / "run"))


def findings(run: Path) -> list[dict[str, Any]]:
    return [each for each in json.loads((run / "hacking.json").read_text()) if each["text"]]


def test_rl_alone_is_caught_and_goes_on(
    first: Path, tmp_path: Path, no_report: None, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(**ALONE, init_student=str(first), output_dir=str(tmp_path / "run"))
    (said,) = [message for message in caplog.messages if "looks hacked" in message]
    found = findings(run)
    since = found[0]["step"]
    assert found[0]["text"] == said and all(f"since update {since}: " in each["text"] for each in found)
    assert said.startswith(f"the reward looks hacked since update {since}: the trained reward rose by ")
    good = run / "checkpoints" / f"step-{since - 10:06d}" if since > 10 else first
    assert said.endswith(f"; the last student before is {good}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gains = [line["guard/reward_gain"] for line in lines if "guard/reward_gain" in line]
    assert len(gains) == 3 and gains[-1] > 0

    # Resumed from before it began: later findings are forgotten, and the same ones come again.
    (run / "checkpoints" / "step-000020").rename(tmp_path / "later")
    (run / "checkpoints" / "step-000030").rename(tmp_path / "latest")
    train(resume_from_checkpoint="latest", output_dir=str(run))
    assert findings(run) == found


def test_it_may_stop_the_run(first: Path, tmp_path: Path, no_report: None) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"^--on_hacking stop: the reward looks hacked since update"):
        train(**ALONE, on_hacking="stop", init_student=str(first), output_dir=str(run))
    (found,) = findings(run)
    assert (run / "checkpoints" / f"step-{found['step']:06d}").is_dir() and not (run / "student").exists()


def test_without_rl_or_reward_there_is_nothing_to_hack(first: Path, tmp_path: Path, no_report: None) -> None:
    settings = SMALL | {"rl": "none", "reward": "toy", "stage2_steps": 2, "eval_steps": 1, "fake_updates": 1}
    run = train(**settings, init_student=str(first), output_dir=str(tmp_path / "run"))
    assert not (run / "guard.safetensors").exists() and "guard/" not in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_reference_that_cannot_be_read_costs_the_guard_alone(
    first: Path, tmp_path: Path, no_report: None, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    run = train(**ALONE | {"stage2_steps": 10}, init_student=str(first), output_dir=str(tmp_path / "run"))
    more: dict[str, Any] = {"stage2_steps": 12}
    if damage == "cut":
        (run / "guard.safetensors").write_bytes(b"1234")
        (run / "hacking.json").write_text("{")
    else:
        more["num_eval_samples"] = 32
    train(resume_from_checkpoint="latest", output_dir=str(run), **more)
    assert any("hacked rewards are not looked for: " in message for message in caplog.messages)


def test_a_run_that_ended_before_its_first_update_may_be_replaced(first: Path, tmp_path: Path, no_report: None) -> None:
    run = train(**ALONE | {"stage2_steps": 1}, init_student=str(first), output_dir=str(tmp_path / "run"))
    early = tmp_path / "early"
    early.mkdir()
    for name in ("config.yaml", "inputs.json", "overview.json", "guard.safetensors"):
        (run / name).rename(early / name)
    assert never_trained(early)
