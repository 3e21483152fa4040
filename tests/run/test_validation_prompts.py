"""What image grids show: --validation_prompts, from texts and files, resumed and refused; on one process."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dmdr import train
from dmdr.errors import ConfigError
from dmdr.images import text_in

pytestmark = pytest.mark.usefixtures("no_report")
RUN: dict[str, Any] = {
    "model": "toy",
    "rl": "refl",
    "stage1_steps": 2,
    "stage2_steps": 1,
    "per_device_train_batch_size": 8,
    "fake_updates": 1,
    "sample_images": 4,
    "teacher_steps": 2,
    "report_to": "none",
}
TWO = ["mode 3", "mode 1"]
LABELLED = """
def labels(images, prompts, label):
    return [float(number) for number in label]
"""


def shown(folder: Path, name: str = "step-000003.png") -> list[str]:
    """The prompts of an image grid."""
    return [row["prompt"] for row in json.loads(text_in(folder / "samples" / name, "prompts") or "")]


def pixels(folder: Path, name: str = "step-000003.png") -> bytes:
    with Image.open(folder / "samples" / name) as image:
        return image.tobytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmdr.run.run.write_report", lambda folder: None)
        return train(**RUN, validation_prompts=TWO, output_dir=str(tmp_path_factory.mktemp("run") / "run"))


def test_grids_show_them_and_the_training_is_the_same(run: Path, tmp_path: Path) -> None:
    assert shown(run) == shown(run, "teacher.png") == TWO * 2
    other = train(**RUN, output_dir=str(tmp_path / "run"))
    assert shown(other) == [f"mode {i}" for i in range(4)] and pixels(other, "teacher.png") != pixels(
        run, "teacher.png"
    )
    weights = [folder / "student" / "student.safetensors" for folder in (run, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("name", ["grid.txt", "grid.jsonl"])
def test_a_file_names_them(run: Path, tmp_path: Path, name: str) -> None:
    """Here without the column that the reward reads of the run's own prompts; and one image of each at least."""
    lines = TWO if name.endswith("txt") else [json.dumps({"prompt": prompt, "colour": "red"}) for prompt in TWO]
    (tmp_path / name).write_text("\n".join(lines))
    rows = [json.dumps({"prompt": f"mode {i}", "label": i}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "judge.py").write_text(LABELLED)
    own = {"prompts": str(tmp_path / "rows.jsonl"), "rl": "rwr", "reward": f"{tmp_path}/judge.py:labels"}
    settings = RUN | own | {"sample_images": 1, "num_generations": 2}
    folder = train(**settings, validation_prompts=[str(tmp_path / name)], output_dir=str(tmp_path / "run"))
    assert shown(folder) == TWO
    width, height = Image.open(folder / "samples" / "teacher.png").size
    assert width > height  # a prompt a column


def test_a_resumed_run_keeps_them_or_draws_the_teacher_anew(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "grid.txt").write_text("mode 3\nmode 1\n")
    given = {"validation_prompts": [str(tmp_path / "grid.txt")], "output_dir": str(tmp_path / "run")}
    folder = train(**RUN | {"save_steps": 1, "stage2_steps": 0, "rl": "none"}, **given)
    drawn = (folder / "samples" / "teacher.png").stat().st_mtime_ns
    again = {"output_dir": str(folder), "resume_from_checkpoint": "latest", "rl": "refl"}
    train(**again, stage2_steps=1)
    assert shown(folder) == TWO * 2 and (folder / "samples" / "teacher.png").stat().st_mtime_ns == drawn
    (tmp_path / "grid.txt").write_text("mode 2\n")
    train(**again, stage2_steps=2)
    said = f"--resume_from_checkpoint: --validation_prompts {tmp_path}/grid.txt has changed since the run began"
    assert any(message.startswith(said) for message in caplog.messages)
    assert shown(folder, "teacher.png") == shown(folder, "step-000004.png") == ["mode 2"] * 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--validation_prompts must be prompts with text in them, not []"),
        (["a", " "], "--validation_prompts must be prompts with text in them, not ['a', ' ']"),
        ("a", "--validation_prompts must be a list, each item text or null, not 'a'"),
        (["none.txt"], "--validation_prompts: no such file: none.txt"),
        (["a", "none.txt"], "--validation_prompts: give one file alone, or prompts"),
        (["empty.txt"], "--validation_prompts: empty.txt holds no prompt"),
        (["notes.md"], "--validation_prompts: DMDR cannot read notes.md: the name must end with "),
        ([1], "--validation_prompts must be a list, each item text or null, not [1]"),
    ],
)
def test_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "notes.md").write_text("a cat")
    with pytest.raises(ConfigError) as error:
        train(**RUN, validation_prompts=given, output_dir="run")
    assert str(error.value).startswith(said) and not (tmp_path / "run").exists()
