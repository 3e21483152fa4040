"""--push_to_hub, against a server of the hub's routes: the upload, its failure and repetition, and what is refused."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

from dmdr import hub as dmdr_hub
from dmdr import train
from dmdr.cli.train import main
from dmdr.errors import ConfigError
from dmdr.settings.parse import parse
from hub_server import Hub, running

RUN: dict[str, Any] = {
    "model": "toy", "rl": "none", "reward": "none", "stage1_steps": 1, "stage2_steps": 0, "fake_updates": 1,
    "per_device_train_batch_size": 4, "sample_images": 1, "teacher_steps": 1, "report_to": "none", "push_to_hub": True,
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch, no_report: None) -> Iterator[Hub]:
    """The server as the hub of this process."""
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(hf_api.api, "endpoint", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    dmdr_hub._silence.cache_clear()
    yield server
    dmdr_hub._silence.cache_clear()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        ({}, {"name": "run", "organization": "me"}),
        (
            {"hub_model_id": "team/fox", "hub_private_repo": True},
            {"name": "fox", "organization": "team", "visibility": "private"},
        ),
    ],
)
def test_the_student_is_uploaded(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], made: dict[str, str]
) -> None:
    caplog.set_level("INFO", "dmdr")
    folder = train(**RUN | settings, output_dir=str(tmp_path / "run"))
    assert hub.made == [made]
    assert hub.files == content(folder / "student") and {"README.md", "student.safetensors"} <= hub.files.keys()
    assert f"uploaded to {hub.address}/{made['organization']}/{made['name']}" in caplog.messages


def test_a_failed_upload_loses_nothing_and_can_be_repeated(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refusing = "/commit/"
    student, settings = tmp_path / "a run" / "student", RUN | {"hub_model_id": "run", "hub_private_repo": True}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["dmdr-train", *flags, "--output_dir", str(student.parent)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert end.value.code == 1 and "done:" not in said.out and not hub.files
    assert re.search(r"run/student is whole, but was not uploaded to me/run: .*403.*; repeat the upload with: ", last)
    assert (student / "sampling.json").is_file() and (student.parent / "checkpoints" / "step-000001").is_dir()
    hub.refusing = "nothing"
    program, *words = shlex.split(last.partition("repeat the upload with: ")[2])
    place, env = Path(sys.executable).with_name(program), os.environ | {"HF_ENDPOINT": hub.address}
    again = subprocess.run([place, *words], capture_output=True, text=True, env=env | {"HF_HUB_OFFLINE": "0"})
    assert again.returncode == 0, again.stderr
    assert hub.files == content(student)
    assert {(each["name"], each["visibility"]) for each in hub.made} == {("run", "private")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hub_model_id": "a/b/c"}, r"--hub_model_id: HFValidationError: Repo id must be in the form"),
        ({"output_dir": "a run"}, r"--hub_model_id: HFValidationError: .*'a run'"),
        ({"offline": True}, r"--push_to_hub: HF_HUB_OFFLINE is set"),
        ({"endpoint": "http://127.0.0.1:9"}, r"--push_to_hub: http://127\.0\.0\.1:9 does not answer: "),
        ({"token": None}, r"--push_to_hub: there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN"),
        ({"role": "read"}, r"--push_to_hub: the token of the hub may only read; log in with one that may write"),
        ({"refusing": "whoami"}, r"--push_to_hub: the hub does not take the token: .*403"),
    ],
)
def test_refused_before_anything_is_loaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = RUN | {"output_dir": "run"}
    for name, value in change.items():
        if name in ("role", "refusing"):
            setattr(hub, name, value)
        elif name == "token":
            monkeypatch.delenv("HF_TOKEN")
            monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        elif name in ("offline", "endpoint"):
            monkeypatch.setattr(constants, {"offline": "HF_HUB_OFFLINE", "endpoint": "ENDPOINT"}[name], value)
        else:
            settings[name] = value
    with pytest.raises(ConfigError, match=f"^{said}") as error:
        train(**settings)
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir()) and not hub.made


def test_a_folder_may_not_ask_for_an_upload(hub: Hub, tmp_path: Path) -> None:
    """It may be a stranger's; the user says that it is not."""
    folder = train(**RUN, output_dir=str(tmp_path / "run"))
    resume = ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    with pytest.raises(ConfigError, match=r"would have your student uploaded to the hub, .*; if you trust this folder"):
        parse(resume)
    assert parse([*resume, "--config", str(folder / "config.yaml")]).config.push_to_hub
