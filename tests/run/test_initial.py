"""A student that a run starts from, or that is drawn from, and what it was trained for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import dmdr.run.run
from dmdr.errors import ConfigError
from dmdr.protocols import RoleOptions
from dmdr.run.checkpoint import find_initial
from dmdr.run.export import read_export
from dmdr.run.initial import check_kind, differences
from dmdr.run.run import train
from dmdr.sizes import parse_sizes

SQUARE = parse_sizes("512")

FAST: dict[str, Any] = {
    "model": "toy",
    "rl": "refl",
    "reward": "toy",
    "num_inference_steps": 2,
    "stage1_steps": 1,
    "stage2_steps": 1,
    "fake_updates": 1,
    "per_device_train_batch_size": 8,
    "sample_steps": 0,
    "sample_images": 2,
    "teacher_steps": 2,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a two-step student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        return train(**FAST, output_dir=str(tmp_path_factory.mktemp("first") / "run"))


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def change(export: Path, key: str, value: Any) -> None:
    about = json.loads((export / "sampling.json").read_text())
    (export / "sampling.json").write_text(json.dumps(about | {key: value}))


@pytest.mark.parametrize("start", ["", "checkpoints/step-000002", "student"])
def test_other_steps(finished: Path, start: str) -> None:
    initial = find_initial(str(finished / start))
    assert differences(initial, 2, ()) == differences(initial, 2, SQUARE) == []
    assert differences(initial, 7, SQUARE) == ["was trained for 2 steps, but this run uses 7"]


def test_another_resolution(copy: Path) -> None:
    """By the export, or by the settings of the run that a checkpoint lies in."""
    change(copy / "student", "call", {"height": 512, "width": 512})
    settings = copy / "config.yaml"
    text = settings.read_text().replace("timesteps: null", "timesteps: [999, 500, 250]")
    settings.write_text(f"{text}resolution: 512\n")
    for initial, steps in ((copy / "student", 2), (find_initial(str(copy)), 3)):
        assert differences(initial, steps, SQUARE) == []
        several = parse_sizes("512,640x384")
        assert differences(initial, steps, several) == [
            "was trained at a resolution of 512, but this run uses 512,640x384"
        ]
    about = json.loads((copy / "student" / "sampling.json").read_text())
    change(copy / "student", "options", about["options"] | {"resolution": "640x384,512"})
    assert differences(copy / "student", 2, several) == []  # in another order
    assert len(differences(copy / "student", 2, SQUARE)) == 1


@pytest.mark.parametrize(("held", "wanted"), [("full", "lora"), ("lora", "full"), (None, "full")])
def test_a_checkpoint_with_a_fake_score_of_the_other_kind_is_refused(copy: Path, held: str | None, wanted: str) -> None:
    """An older run does not say it, and had a LoRA. From an export the fake score starts as the teacher."""
    with (copy / "config.yaml").open("a") as file:
        file.write(f"fake_score: {held}\n" if held else "")
    checkpoint = find_initial(str(copy))
    with pytest.raises(ConfigError) as error:
        check_kind(checkpoint, RoleOptions(fake_score=wanted))  # type: ignore[arg-type]
    kinds = {"full": "a full network", "lora": "a LoRA"}
    assert str(error.value) == (
        f"the fake score of --init_student {checkpoint} is {kinds[held or 'lora']}, but this run trains "
        f"{kinds[wanted]}: set --fake_score {held or 'lora'}, or start from the export of that run"
    )
    check_kind(checkpoint, RoleOptions(fake_score=held or "lora"))  # type: ignore[arg-type]
    check_kind(copy / "student", RoleOptions(fake_score=wanted))  # type: ignore[arg-type]
    (copy / "config.yaml").unlink()
    check_kind(checkpoint, RoleOptions(fake_score=wanted))  # type: ignore[arg-type]  # nobody knows


def test_a_run_says_what_differs(
    finished: Path, tmp_path: Path, no_report: None, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"init_student": str(finished / "student"), "num_inference_steps": 1, "eta": 0.0}
    second = {name: value for name, value in FAST.items() if name != "stage1_steps"}
    train(**second | given, output_dir=str(tmp_path / "run"))
    assert f"--init_student {finished / 'student'} was trained for 2 steps, but this run uses 1" in caplog.messages


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("grid", None, "its grid does not fall from 1 or below to 0"),
        ("grid", [1.0, 0.5, 0.5, 0.0], "its grid does not fall from 1 or below to 0"),
        ("grid", [1.0, "0.5", 0.0], "its grid does not fall from 1 or below to 0"),
        ("sample_eta", 2, "its sample_eta is not in [0, 1]"),
        ("options", [], "its options is no table"),
    ],
)
def test_a_damaged_export(copy: Path, key: str, value: Any, said: str) -> None:
    change(copy / "student", key, value)
    with pytest.raises(ConfigError) as error:
        read_export(copy / "student")
    assert str(error.value) == f"{copy / 'student' / 'sampling.json'} is damaged: {said}"


def test_a_fake_score_begins_anew_where_a_checkpoint_has_none(
    tmp_path: Path, no_report: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Of LADD, which compares no scores; the other way round nobody asks for the kind of the one that is there."""
    trained = train(**FAST | {"matching": "ladd", "sample_weight": "none"}, output_dir=str(tmp_path / "ladd"))
    second = {name: value for name, value in FAST.items() if name != "stage1_steps"}
    train(**second, init_student=str(trained), output_dir=str(tmp_path / "dmd"))
    assert any(said.endswith("has no fake score: it starts as the teacher") for said in caplog.messages)
    checkpoint = find_initial(str(trained))
    check_kind(checkpoint, RoleOptions(fake_score="full"))
