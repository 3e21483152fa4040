"""What trackers get from a run: TensorBoard's and wandb's own files are read back."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmdr import train
from dmdr.errors import TrainingError
from wandb_files import records

pytest.importorskip("wandb")
RUN: dict[str, Any] = {
    "model": "toy",
    "rl": "refl",
    "stage1_steps": 2,
    "stage2_steps": 2,
    "per_device_train_batch_size": 8,
    "fake_updates": 1,
    "logging_steps": 1,
    "sample_steps": 2,
    "sample_images": 2,
    "teacher_steps": 2,
}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


def test_two_trackers_get_the_same(tmp_path: Path) -> None:
    names = {"run_name": "first", "tracker_project_name": "mine"}
    folder = train(**RUN, **names, report_to="tensorboard,wandb", output_dir=str(tmp_path / "run"))
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = records(next(tmp_path.glob("wandb/offline-run-*/run-*.wandb")))
    (run,) = {(each.run.project, each.run.display_name) for each in found if each.HasField("run")}
    assert run == ("mine", "first")
    config = {each.key: json.loads(each.value_json) for record in found for each in record.config.update}
    assert config["dyna_renoise"] == "[4.0, 1.5]" and config["seed"] == 0 and config["model"] == "toy"
    curves: dict[str, dict[int, Any]] = {}
    for record in found:
        for item in record.history.item:
            name = "/".join(item.nested_key)
            curves.setdefault(name, {})[record.history.step.num] = json.loads(item.value_json)
    for name in ("loss/dmd", "reward/toy", "learning_rate/fake_score"):
        expected = {line["step"]: line[name] for line in lines if name in line}
        assert len(expected) >= 2 and curves[name] == expected
        assert {event.step: event.value for event in board.Scalars(name)} == pytest.approx(expected)
    for name, steps in {"samples/student": {0, 2, 4}, "samples/teacher": {0}}.items():
        assert curves[f"{name}/filenames"].keys() == steps == {image.step for image in board.Images(name)}
    (shown,) = curves["samples/student/filenames"][4]
    (stored,) = tmp_path.glob(f"wandb/offline-run-*/files/{shown}")
    with Image.open(stored) as given, Image.open(folder / "samples" / "step-000004.png") as grid:
        assert given.tobytes() == grid.tobytes()


def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    names = {"tracker_project_name": "a/b", "report_to": "wandb"}
    with pytest.raises(TrainingError, match=r"^--report_to wandb: .*a/b.*cannot contain") as error:
        train(**RUN, **names, output_dir=str(tmp_path / "run"))
    assert "\n" not in str(error.value)
