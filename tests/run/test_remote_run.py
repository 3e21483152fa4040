"""A run whose reward is a server that is killed: it waits, or saves and stops, and loses nothing."""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dmdr import train
from dmdr.cli import common
from dmdr.cli import train as train_command
from dmdr_digits import Digits
from log_lines import untimed

FAST: dict[str, Any] = {
    "model": "digits",
    "rl": "grpo",
    "stage1_steps": 1,
    "stage2_steps": 4,
    "num_inference_steps": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "fake_updates": 1,
    "lora_rank": 4,
    "lora_alpha": 8,
    "fake_lora_rank": 4,
    "fake_lora_alpha": 4,
    "logging_steps": 1,
    "sample_steps": 0,
    "sample_images": 2,
    "teacher_steps": 2,
    "num_eval_samples": 0,
    "report_to": "none",
}
# Kills itself in the middle of a request: the file says in which call from now, 0 is never.
JUDGE = """
import os, signal, sys
from pathlib import Path
from dmdr.remote.server import serve

death = Path(sys.argv[2])

def score(images, prompts, **columns):
    if left := int(death.read_text()):
        death.write_text(str(left - 1))
        if left == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return images[:, 0].mean((1, 2))

serve(score, port=int(sys.argv[1]), name="redness")
"""


class Operator:
    """Starts the judge, and again whenever it was killed."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.death = f"http://127.0.0.1:{self.port}", folder / "death"
        self.attentive, self.killed = True, 0
        self.kill_in(0)
        self.start()

    def kill_in(self, calls: int) -> None:
        self.death.write_text(str(calls))

    def start(self) -> None:
        command = [sys.executable, "-c", JUDGE, str(self.port), str(self.death)]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None and self.server.stdout.readline().split()[-1] == self.url
        threading.Thread(target=self.watch, args=(self.server,), daemon=True).start()

    def watch(self, server: "subprocess.Popen[str]") -> None:
        if server.wait() == -signal.SIGKILL:
            self.killed += 1
            if self.attentive:
                self.start()


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    operator = Operator(tmp_path_factory.mktemp("judge"))
    yield operator
    operator.server.terminate()


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> None:
    monkeypatch.chdir(tmp_path)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log, but for the time that steps took."""
    return [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step-000005" / "student.safetensors")


def test_a_run_outlives_its_server(operator: Operator, digits: Digits, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "dmdr")
    whole = train(**FAST, reward=operator.url, output_dir="whole")
    assert not caplog.records
    operator.kill_in(3)
    killed = train(**FAST, reward=operator.url, output_dir="killed")
    assert operator.killed == 1 and len(caplog.records) == 2  # waits for it, and goes on
    assert lines(killed) == lines(whole)
    assert [line["step"] for line in lines(killed)] == [1, 2, 3, 4, 5]
    assert all(torch.equal(value, student(whole)[name]) for name, value in student(killed).items())


def test_a_run_whose_server_stays_away_saves_and_stops(
    operator: Operator, digits: Digits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operator.kill_in(4)
    operator.attentive = False
    flags = [f"--{name}={value}" for name, value in FAST.items()]
    flags += [f"--reward={operator.url}", "--reward_timeout=1", "--output_dir=run"]
    monkeypatch.setattr(sys, "argv", ["dmdr-train", *flags])
    assert common.command(train_command.run) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"dmdr-train: reward '{operator.url}' failed: ")
    assert last.endswith(f"{operator.url} has not answered for 1 s: Connection refused")
    saved = len(lines(Path("run")))
    assert 1 < saved < 5 and (Path("run") / "checkpoints" / f"step-{saved:06d}").is_dir()
    operator.attentive = True
    operator.start()
    train(resume_from_checkpoint="latest", output_dir="run", reward=operator.url)
    assert [line["step"] for line in lines(Path("run"))] == [1, 2, 3, 4, 5]
    assert student(Path("run"))
