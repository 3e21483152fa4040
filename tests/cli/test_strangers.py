"""Folders and files of strangers: none runs code, and a damaged one is a refusal in one line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import dmdr.run.run
from dmdr.cli import sample, train
from dmdr.errors import ConfigError
from dmdr.run.drawing import open_export
from dmdr.settings.parse import parse

FAST = {
    "model": "toy",
    "stage1_steps": 1,
    "stage2_steps": 0,
    "per_device_train_batch_size": 4,
    "fake_updates": 1,
    "sample_steps": 0,
    "sample_images": 1,
    "teacher_steps": 1,
    "report_to": "none",
}
TRAP = "from pathlib import Path\nPath('sprung').touch()\n\ndef score(images, prompts): return [0.0] * len(images)\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        return dmdr.run.run.train(**FAST, output_dir=str(tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files that leave a trace as soon as they are run."""
    monkeypatch.chdir(tmp_path)
    for name in ("trap.py", "trap_module.py", "ToyPipeline:trap.py", "toy:trap.py"):
        (tmp_path / name).write_text(TRAP)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def refused(room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of a refusal: exit code 2, no code run, no picture drawn."""

    def refused(command: ModuleType, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"dmdr-{command.__name__.rpartition('.')[2]}", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command.main()
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
        assert not (room / "sprung").exists() and not (room / "samples").exists()
        return err.strip()

    return refused


@pytest.fixture
def export(finished: Path, room: Path) -> Path:
    return Path(shutil.copytree(finished / "student", room / "student"))


def change(export: Path, **values: Any) -> None:
    about = json.loads((export / "sampling.json").read_text())
    (export / "sampling.json").write_text(json.dumps(about | values))


# --- Code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trap.py:score", "trap_module:score", "ToyPipeline:trap.py:score", "/etc/x.py:y"])
def test_an_export_names_no_code(refused: Callable[..., str], export: Path, name: str) -> None:
    change(export, backend=name)
    line = refused(sample, "student", "--prompt", "mode 1")
    assert f"student/sampling.json names the model family '{name}'" in line and f"--backend {name}" in line


@pytest.mark.parametrize("name", ["trap.py:score", "trap_module:score", "ToyPipeline:trap.py:score"])
def test_a_pipelines_folder_names_no_code(refused: Callable[..., str], export: Path, room: Path, name: str) -> None:
    (room / "base").mkdir()
    (room / "base" / "model_index.json").write_text(json.dumps({"_class_name": name}))
    change(export, base_model="base")
    assert f"base/model_index.json names the model family '{name}'" in refused(sample, "student", "--prompt", "mode 1")
    assert "and no backend can train it" in refused(train, "--model", "base")


def test_a_models_name_is_no_file(refused: Callable[..., str]) -> None:
    assert "--model toy:trap.py:score is neither" in refused(train, "--model", "toy:trap.py:score")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("reward", "toy+0.5*trap.py:score"),
        ("reward", "trap_module:score"),
        ("reward", "http://203.0.113.1:8000"),  # which would be sent the user's token
        ("eval_reward", "trap.py:score as other"),
        ("rl", "trap.py:score"),
        ("matching", "trap.py:score"),
        ("sample_weight", "trap.py:score"),
        ("backend", "trap.py:score"),
    ],
)
def test_a_run_that_is_resumed_names_no_code(
    refused: Callable[..., str], finished: Path, room: Path, setting: str, value: str
) -> None:
    run = Path(shutil.copytree(finished, room / "run"))
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {setting: value}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    name = value.partition(" as ")[0].rpartition("*")[2]
    for where in (["latest", "--output_dir", "run"], ["run/checkpoints/step-000001"]):
        line = refused(train, "--resume_from_checkpoint", *where)
        assert f"'{name}', which is not installed" in line and "run/config.yaml" in line
    if setting == "reward" and "trap" in value:  # what the user names is the user's
        parse(["--resume_from_checkpoint", "latest", "--output_dir", "run", "--config", "run/config.yaml"])
        assert (room / "sprung").exists()


@pytest.mark.parametrize("setting", ["output_dir", "overwrite_output_dir", "architecture", "dry_run"])
def test_a_run_that_is_resumed_says_nothing_of_other_places(
    refused: Callable[..., str], finished: Path, room: Path, setting: str
) -> None:
    run = Path(shutil.copytree(finished, room / "run"))
    with (run / "config.yaml").open("a") as file:
        file.write(f"{setting}: elsewhere\n")
    line = refused(train, "--resume_from_checkpoint", "latest", "--output_dir", "run")
    assert f"run/config.yaml sets '{setting}'" in line


EXITING = """
import sys
from dataclasses import dataclass
from dmdr.protocols import Needs

calls = []

def score(images, prompts):
    calls.append(1)
    return sys.exit(7) if len(calls) > 1 else [0.5] * len(images)

@dataclass
class Objective:
    needs = Needs()
    def __call__(self, draw, ctx):
        sys.exit(7)

@dataclass
class Late:
    needs = Needs()
    def __call__(self, draw, ctx):
        raise StopIteration
"""


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"reward": "exiting.py:score", "rl": "grpo"}, "reward 'exiting.py:score' failed: SystemExit: 7"),
        ({"reward": "toy", "rl": "exiting.py:Objective"}, "objective 'exiting.py:Objective' failed: SystemExit: 7"),
        ({"reward": "toy", "rl": "exiting.py:Late"}, "objective 'exiting.py:Late' failed: StopIteration"),
    ],
)
def test_what_a_stranger_raises_does_not_end_the_process(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], line: str
) -> None:
    """The run saves what it has, and says whose fault it was."""
    (room / "exiting.py").write_text(EXITING)
    settings = FAST | {"stage2_steps": 1, "num_generations": 2, "output_dir": "run"} | settings
    monkeypatch.setattr(sys, "argv", ["dmdr-train", *(f"--{name}={value}" for name, value in settings.items())])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"dmdr-train: {line}")
    assert (room / "run" / "checkpoints" / "step-000001").is_dir()


# --- Damage ----------------------------------------------------------------------------------------------------------

NUMBER = "is damaged: its grid does not fall from 1 or below to 0"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"grid": "1.0, 0.0"}, NUMBER),
        ({"grid": []}, NUMBER),
        ({"grid": [True, False]}, NUMBER),
        ({"grid": [1.0, float("nan"), 0.0]}, NUMBER),
        ({"grid": [float("inf"), 0.0]}, NUMBER),
        ({"grid": [10**400, 0]}, NUMBER),
        ({"grid": {"1": 0}}, NUMBER),
        ({"options": []}, "is damaged: its options is no table"),
        ({"options": {"shift": "wide"}}, "is damaged: its option shift must be a finite number"),
        ({"options": {"shift": -1}}, "--shift must be above 0"),
        ({"options": {"seed": 2**70}}, "is damaged: its option seed must be a whole number"),
        ({"sample_eta": "1"}, "is damaged: its sample_eta is not in [0, 1]"),
        ({"sample_eta": float("nan")}, "is damaged: its sample_eta"),
        ({"base_model": 3}, "is damaged: its base_model is no text"),
        ({"base_model": None}, "is damaged: its base_model is no text"),
        ({"backend": ["a"]}, "is damaged: its backend is neither a name nor null"),
        ({"backend": "Nobody"}, "unknown backend 'Nobody'"),
        ({"call": [1]}, "is damaged: its call is no table"),
        ({"call": {"height": "tall"}}, "is damaged: its call has a height"),
        ({"mixed_precision": "fp8"}, "is damaged: its mixed_precision is none of"),
        ({"mixed_precision": []}, "is damaged: its mixed_precision is none of"),
    ],
    ids=str,
)
def test_a_damaged_sampling_file(refused: Callable[..., str], export: Path, values: dict[str, Any], said: str) -> None:
    change(export, **values)
    line = refused(sample, "student", "--prompt", "mode 1")
    assert said in line
    assert "sampling.json" in line or "backend" in values


@pytest.mark.parametrize("content", ["[" * 100_000, '{"grid": ' + "1" * 5000 + "}", "null", "3"])
def test_a_sampling_file_that_is_none(refused: Callable[..., str], export: Path, content: str) -> None:
    (export / "sampling.json").write_text(content)
    assert "student/sampling.json is damaged: " in refused(sample, "student", "--prompt", "mode 1")


def test_an_option_that_no_family_has_is_of_another_version(export: Path) -> None:
    change(export, options={"shift": None, "seed": 0, "depth": 3})
    about = sample_about(export)
    assert open_export(export, about).draw([{"prompt": "mode 1"}], 0, export / "drawn")


def sample_about(export: Path) -> dict[str, Any]:
    from dmdr.run.export import read_export

    return read_export(export)


def spoilt(file: Path, how: str) -> None:
    state = load_file(file)
    name = min(state)
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "noise":
        file.write_bytes(bytes(range(256)) * 8)
    elif how == "folder":
        file.unlink()
        file.mkdir()
    else:
        state[name] = {"nan": torch.full_like(state[name], torch.nan), "shape": torch.zeros(3)}[how]
        save_file(state, file)


@pytest.mark.parametrize("how", ["gone", "cut", "empty", "noise", "folder", "nan", "shape"])
def test_a_damaged_student(refused: Callable[..., str], export: Path, how: str) -> None:
    spoilt(export / "student.safetensors", how)
    assert "student/student.safetensors " in refused(sample, "student", "--prompt", "mode 1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seed", str(2**64)), "--seed must be between"),
        (("--num_images", str(10**12)), "--num_images must be between 1 and 100,000"),
    ],
)
def test_numbers_beyond_all_use(
    refused: Callable[..., str], export: Path, arguments: tuple[str, ...], said: str
) -> None:
    assert said in refused(sample, "student", "--prompt", "mode 1", *arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_inference_steps: many\n", None),
        ("sigmas: 3\nresolution: [1]\n", None),
        ("a: 1\na: 2\n", "--init_student: {file}: the key 'a' is there twice, in lines 1 and 2"),
    ],
)
def test_odd_settings_beside_a_first_student(finished: Path, room: Path, text: str, said: str | None) -> None:
    from dmdr.run.initial import differences

    run = Path(shutil.copytree(finished, room / "run"))
    (run / "config.yaml").write_text(text)
    if said is None:
        assert differences(run / "checkpoints" / "step-000001", 4, 8) == []
        return
    with pytest.raises(ConfigError) as error:
        differences(run / "checkpoints" / "step-000001", 4, 8)
    assert str(error.value) == said.format(file=run / "config.yaml")
