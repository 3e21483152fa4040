"""The folder of a run: what is taken over, overwritten, refused or said when a run begins or goes on."""

import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dmdr import train
from dmdr.backends.toy import ToyBackend
from dmdr.errors import ConfigError, TrainingError
from dmdr.run.checkpoint import checkpoints, damage
from dmdr.run.folder import changes, claimed, inputs_of
from dmdr.settings.parse import read_yaml
from dmdr.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")

SETTINGS: dict[str, Any] = {
    "model": "toy", "rl": "refl", "reward": "toy", "stage1_steps": 3, "stage2_steps": 1, "fake_updates": 1,
    "per_device_train_batch_size": 8, "save_steps": 1, "logging_steps": 1, "sample_images": 1, "teacher_steps": 1,
    "report_to": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    prompts = folder.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"mode {i}", "label": i}) + "\n" for i in range(4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmdr.run.run.write_report", lambda folder: None)
        return train(**SETTINGS, prompts=str(prompts), output_dir=str(folder))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Going on ---------------------------------------------------------------------------------------------------------


def test_latest_is_the_newest_whole_checkpoint(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = content(run / "student")
    (run / "checkpoints" / "step-000004" / "training.pt").write_bytes(b"")
    train(output_dir=str(run), resume_from_checkpoint="latest")
    assert any(
        "step-000004/training.pt is damaged" in line and "looks for an earlier" in line for line in caplog.messages
    )
    assert content(run / "student") == before
    assert not any(map(damage, checkpoints(run))) and names(run)[-1] == "step-000004"


def test_without_a_whole_checkpoint_nothing_is_touched(run: Path) -> None:
    for path in checkpoints(run):
        (path / "student.safetensors").write_bytes(b"")
    before = content(run)
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        train(output_dir=str(run), resume_from_checkpoint="latest")
    assert content(run) == before


@pytest.mark.parametrize("manifest", [True, False])
def test_a_damaged_checkpoint_that_is_named_is_refused_before_anything_is_removed(run: Path, manifest: bool) -> None:
    named = run / "checkpoints" / "step-000002"
    torch.save({"moments": {}, "extra": {}}, named / "training.pt")
    if not manifest:
        (named / "manifest.json").unlink()
    before = content(run)
    with pytest.raises(ConfigError, match="step-000002") as error:
        train(resume_from_checkpoint=str(named))
    assert content(run) == before
    assert not manifest or str(error.value).endswith("step-000004, which is complete")


def test_a_damaged_checkpoint_is_no_hindrance_to_another(run: Path) -> None:
    before = content(run / "student")
    (run / "checkpoints" / "step-000003" / "progress.json").write_text("[")
    train(resume_from_checkpoint=str(run / "checkpoints" / "step-000002"))
    assert content(run / "student") == before


def test_what_differs_from_the_run_is_said(run: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = str(run / "checkpoints" / "step-000003")
    train(resume_from_checkpoint=step)
    assert not [line for line in caplog.messages if "--resume_from_checkpoint:" in line]
    train(resume_from_checkpoint=step, seed=7, rl_weight=2.0)
    said = [line for line in caplog.messages if "--resume_from_checkpoint:" in line]
    assert said == [
        "--resume_from_checkpoint: --rl_weight is 2.0 now, and was 0.3",
        "--resume_from_checkpoint: --seed is 7 now, and was 0",
    ]


def test_a_number_may_stand_for_a_text(run: Path) -> None:
    """As in older files, whose resolution is one."""
    file, step = run / "config.yaml", run / "checkpoints" / "step-000003"
    settings = read_yaml(str(file))
    file.write_text(f"{file.read_text()}resolution: 512\n")
    assert changes(step, settings | {"resolution": "512"}) == []
    assert changes(step, settings | {"resolution": "768"}) == ["--resolution is 768 now, and was 512"]


def test_prompts_that_have_changed_are_noticed(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = run.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "mode 1", "label": 1}\n')
    step = str(run / "checkpoints" / "step-000003")
    train(resume_from_checkpoint=step, prompts=str(prompts))
    assert any(re.search("--prompts .* has changed since the run began", line) for line in caplog.messages)


def test_a_folder_is_known_by_names_and_sizes(tmp_path: Path) -> None:
    settings = {"prompts": ["a", "b"], "validation_prompts": None, "real_images": f"{tmp_path}/photos:train"}
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "photos" / "train" / "0.png").write_bytes(b"one")
    first = json.loads(inputs_of(settings))
    assert (first["prompts"], first["validation_prompts"], first["real_images"]["files"]) == (None, None, 1)
    assert json.loads(inputs_of(settings)) == first
    (tmp_path / "photos" / "train" / "0.png").write_bytes(b"another")
    assert json.loads(inputs_of(settings)) != first


def test_another_batch_is_refused(run: Path) -> None:
    before = content(run)
    with pytest.raises(ConfigError, match="an update had 8 images, and would have 4 now"):
        train(output_dir=str(run), resume_from_checkpoint="latest", per_device_train_batch_size=4)
    assert content(run) == before
    train(
        output_dir=str(run),
        resume_from_checkpoint="latest",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )


def test_a_run_does_not_go_on_among_the_checkpoints_of_another(run: Path, finished: Path) -> None:
    with pytest.raises(ConfigError, match="is of another run"):
        train(output_dir=str(run), resume_from_checkpoint=str(finished / "checkpoints" / "step-000003"))
    branch = run.parent / "branch"
    train(output_dir=str(branch), resume_from_checkpoint=str(run / "checkpoints" / "step-000003"))
    assert names(branch) == ["step-000003", "step-000004"] and (branch / "student").is_dir()


def test_what_killed_processes_left_is_removed(run: Path) -> None:
    left = [run / ".config.yaml.123.tmp", run / "samples" / ".step-000001.png.7.tmp"]
    folders = [run / "checkpoints" / ".step-000009.partial", run / ".student.gone"]
    for path in left:
        path.touch()
    for path in folders:
        path.mkdir()
    train(output_dir=str(run), resume_from_checkpoint="latest")
    assert not any(path.exists() for path in [*left, *folders])


def test_a_branch_is_compared_with_the_run_that_it_leaves(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = str(run / "checkpoints" / "step-000003")
    train(output_dir=str(run.parent / "branch"), resume_from_checkpoint=step, seed=9)
    assert "--resume_from_checkpoint: --seed is 9 now, and was 0" in caplog.messages


def test_a_checkpoint_of_a_failed_update_says_that_it_is_not_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing, done = Trainer.direction, []

    def third(self: Trainer, *given: Any) -> Any:
        done.append(1)
        if len(done) == 3:
            raise TrainingError("it went astray")
        return failing(self, *given)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "direction", third)
        with pytest.raises(TrainingError, match="astray"):
            train(**SETTINGS | {"save_steps": 0}, output_dir=str(folder))
    assert names(folder) == ["step-000002"]
    train(output_dir=str(folder), resume_from_checkpoint="latest")
    assert any("was saved during a failed update" in line for line in caplog.messages)


# --- Beginning --------------------------------------------------------------------------------------------------------


def test_a_folder_in_which_a_run_was_killed_at_once_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.tmp").touch()
    assert (
        train(**SETTINGS | {"stage1_steps": 1, "stage2_steps": 0, "rl": "none"}, output_dir=str(tmp_path)) == tmp_path
    )


def test_an_empty_folder_held_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = SETTINGS | {"stage1_steps": 1, "stage2_steps": 0, "rl": "none", "output_dir": str(tmp_path)}
    train(**settings)
    assert not [line for line in caplog.messages if "held a run" in line]


def test_others_files_of_such_names_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / ".mine.partial").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        train(**SETTINGS, output_dir=str(tmp_path))
    assert (tmp_path / ".mine.partial").exists()


def test_a_setting_that_is_too_long_for_a_path_is_none(tmp_path: Path) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "rl"}
    text = {"rl": "srpo", "positive": ["Red"], "negative": ["Green"], "template": "{word} {prompt}" + "!" * 400}
    folder = train(**settings | text, output_dir=str(tmp_path / "run"))
    again = train(**settings | text, output_dir=str(folder), overwrite_output_dir=True)
    assert names(again) == names(folder) != []


@pytest.mark.parametrize("kind", ["prompts", "reward", "init_student"])
def test_overwriting_spares_what_the_settings_name(run: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    (run / "prompts.txt").write_text("mode 0\n")
    (run / "mine.py").write_text("def score(images):\n    return images.mean((1, 2, 3))\n")
    named = {"prompts": "prompts.txt", "reward": "mine.py:score", "init_student": "checkpoints/step-000003"}[kind]
    monkeypatch.chdir(run)
    before = content(run)
    given = {name: value for name, value in SETTINGS.items() if name != "stage1_steps"} | {kind: named}
    with pytest.raises(ConfigError, match=re.escape(f"--overwrite_output_dir would delete {named} (--{kind})")):
        train(**given, output_dir=str(run), overwrite_output_dir=True)
    assert content(run) == before


# --- A disk that takes no more ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "file"), [(60_000, "checkpoints/step-000003 could not be written"), (300, "")])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    size: int,
    file: str,
) -> None:
    """No file can become larger than so many bytes, from the third update on."""
    step, (soft, hard) = Trainer.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self: Trainer, **how: Any) -> dict[str, float]:
        if self.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return step(self, **how)

    monkeypatch.setattr(Trainer, "train_step", filling)
    try:
        with pytest.raises(TrainingError) as error:
            train(**SETTINGS, output_dir=str(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "run" / file) in str(error.value) and "\n" not in str(error.value)
    assert "File too large" in str(error.value)  # which torch does not say by itself
    assert str(error.value) not in caplog.messages
    assert names(tmp_path / "run") == ["step-000001", "step-000002"]
    assert not any(map(damage, checkpoints(tmp_path / "run")))
    monkeypatch.undo()
    train(output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    assert content(tmp_path / "run" / "student") == content(finished / "student")


@pytest.mark.parametrize(("every", "said"), [(1, r"No such file or directory: .*metrics\.jsonl"), (50, "run is gone")])
def test_a_folder_that_is_removed_while_it_is_written_to_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, said: str
) -> None:
    """It is not made anew, without settings and with half of the log."""
    step = Trainer.train_step

    def removing(self: Trainer, **how: Any) -> dict[str, float]:
        if self.step:
            shutil.rmtree(tmp_path / "run")
        return step(self, **how)

    monkeypatch.setattr(Trainer, "train_step", removing)
    with pytest.raises(TrainingError, match=said):
        train(**SETTINGS | {"logging_steps": every}, output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run in it, be it a resume or an overwriting one, is refused before it touches anything."""
    folder, step, refused = tmp_path / "run", Trainer.train_step, []

    def meanwhile(self: Trainer, **how: Any) -> Any:
        for way in ({"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
            if checkpoints(folder):
                with pytest.raises(ConfigError, match="another run uses it now") as error:
                    train(**SETTINGS, output_dir=str(folder), **way)
                refused.append(error)
        return step(self, **how)

    monkeypatch.setattr(Trainer, "train_step", meanwhile)
    train(**SETTINGS, output_dir=str(folder))
    assert len(refused) == 6 and len(checkpoints(folder)) == 4
    with claimed(folder):  # which is free again
        pass


@pytest.mark.parametrize(("way", "said"), [({}, "is not empty"), ({"resume_from_checkpoint": "latest"}, "has added")])
def test_a_folder_that_another_run_used_while_this_one_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, str], said: str
) -> None:
    folder = tmp_path / "other"
    if way:
        shutil.copytree(run, folder)
        for later in checkpoints(folder)[2:]:
            shutil.rmtree(later)

    def prepare(self: Any, *roles: Any, **how: Any) -> None:
        shutil.copytree(run, folder, dirs_exist_ok=True)
        own(self, *roles, **how)

    own = ToyBackend.prepare
    monkeypatch.setattr(ToyBackend, "prepare", prepare)
    with pytest.raises(ConfigError, match=said):
        train(**SETTINGS, output_dir=str(folder), **way)
    assert len(checkpoints(folder)) == 4
