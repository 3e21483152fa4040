"""Runs whose prompts come from files and datasets of all kinds, in memory and streamed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from pyarrow import csv, parquet
from safetensors.torch import load_file
from torch import Tensor

import dmdr.run.run
from dmdr.backends.toy import PROMPTS
from dmdr.errors import ConfigError
from dmdr.run.run import Trainer, train

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # not 5 seconds whenever a stream of Parquet is closed
FAST: dict[str, Any] = {
    "model": "toy",
    "rl": "refl",
    "reward": "toy",
    "stage1_steps": 5,
    "stage2_steps": 4,
    "per_device_train_batch_size": 8,
    "num_generations": 2,
    "fake_updates": 2,
    "seed": 3,
    "sample_steps": 0,
    "sample_images": 2,
    "teacher_steps": 2,
    "report_to": "none",
}
ROWS = [{"prompt": prompt, "label": i} for i, prompt in enumerate(PROMPTS)]

MODULE = """
def labels(images, prompts, label):
    assert all(prompt == f"mode {number}" for prompt, number in zip(prompts, label))
    return [float(number) for number in label]
"""


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMDR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        patch.setattr("dmdr.prompts.BUFFER", 3)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rows in every form."""
    folder, table = tmp_path_factory.mktemp("sources"), pyarrow.Table.from_pylist(ROWS)
    (folder / "rows.txt").write_text("\n".join(PROMPTS))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    csv.write_csv(table, folder / "rows.csv")
    parquet.write_table(table, folder / "rows.parquet")
    (folder / "files").mkdir()
    parquet.write_table(table, folder / "files" / "train.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    names = ("rows.txt", "rows.jsonl", "rows.csv", "rows.parquet", "files", "saved")
    return {name: str(folder / name) for name in names}


def student(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student" / "student.safetensors")


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(tensor, student(other)[name]) for name, tensor in student(one).items())


def test_the_same_training_from_all_sources(sources: dict[str, str], tmp_path: Path) -> None:
    runs = [train(**FAST, prompts=path, output_dir=str(tmp_path / str(i))) for i, path in enumerate(sources.values())]
    own = train(**FAST, output_dir=str(tmp_path / "own"))
    assert all(same(run, own) for run in runs)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_reach_the_rewards(sources: dict[str, str], tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "judge.py").write_text(MODULE)
    settings = {"rl": "grpo", "reward": f"{tmp_path}/judge.py:labels", "dataset_streaming": streaming}
    for name in ("rows.csv", "rows.parquet"):
        train(**FAST | settings, prompts=sources[name], output_dir=str(tmp_path / name))
    with pytest.raises(ConfigError, match="needs the prompts to have a column 'label'; they have none"):
        train(**FAST | settings, prompts=sources["rows.txt"], output_dir=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# --- Streamed ---------------------------------------------------------------------------------------------------------


def interrupt(patch: pytest.MonkeyPatch, total: int) -> None:
    """Ctrl-C during the `total`-th student update of the run."""
    step = Trainer.train_step

    def stepped(self: Trainer, **how: Any) -> dict[str, float]:
        if self.first_step + self.step + 1 == total:
            signal.raise_signal(signal.SIGINT)
        return step(self, **how)

    patch.setattr(Trainer, "train_step", stepped)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "saved"])
def test_a_streamed_run_goes_on_to_the_same_bits(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """After many epochs of its four prompts, in either stage."""
    settings = FAST | {"prompts": sources[name], "dataset_streaming": True}
    whole = train(**settings, output_dir=str(tmp_path / "whole"))
    run = tmp_path / "run"
    for total in (3, 7):
        with monkeypatch.context() as patch:
            interrupt(patch, total)
            with pytest.raises(KeyboardInterrupt):
                train(**settings, output_dir=str(run), resume_from_checkpoint=None if total == 3 else "latest")
    train(**settings, output_dir=str(run), resume_from_checkpoint="latest")
    assert same(run, whole)


def test_a_stream_that_breaks_off_leaves_a_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": PROMPTS[i % 4]}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "what?", ""]))
    settings = FAST | {"prompts": str(tmp_path / "rows.jsonl"), "dataset_streaming": True}
    with pytest.raises(ConfigError, match=r"rows\.jsonl line 41 is no JSON"):
        train(**settings, output_dir=str(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "step-000004").is_dir()  # 4 updates of 2 batches of 4 prompts


# --- As users start it ------------------------------------------------------------------------------------------------


def started(*command: str, folder: Path, **settings: Any) -> "subprocess.CompletedProcess[str]":
    texts = {name: value[0] if isinstance(value, list) else value for name, value in (FAST | settings).items()}
    flags = [f"--{name}={value}" for name, value in texts.items()]
    return subprocess.run(
        [sys.executable, *command, "-m", "dmdr.cli.train", *flags], capture_output=True, text=True, cwd=folder
    )


def test_two_processes_stream_as_one_and_count_once(sources: dict[str, str], tmp_path: Path) -> None:
    settings = {"prompts": sources["rows.csv"], "dataset_streaming": True, "validation_prompts": ["mode 2"]}
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    two = started(*launch, folder=tmp_path, **settings, per_device_train_batch_size=4, output_dir="two")
    assert two.returncode == 0, two.stderr
    said = f"prompts: streamed from {sources['rows.csv']}"
    assert [line for line in two.stderr.splitlines() if line.startswith("prompts")] == [said]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmdr.prompts.BUFFER", 10_000)
        one = train(**FAST | settings, output_dir=str(tmp_path / "one"))
    for name, tensor in student(one).items():
        torch.testing.assert_close(student(tmp_path / "two")[name], tensor, rtol=0, atol=1e-5)
    teacher = tmp_path / "two" / "samples" / "teacher.png"  # with the prompts that it shows, which both were told
    assert teacher.read_bytes() == (one / "samples" / "teacher.png").read_bytes()


def test_what_was_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, ROWS[0], {"prompt": "", "label": 9}]
    table = pyarrow.Table.from_pylist([row | {"raw": b"x"} for row in rows])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with caplog.at_level("INFO", "dmdr"):
        train(**FAST, prompts=str(tmp_path / "rows.parquet"), output_dir=str(tmp_path / "run"))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("prompts")]
    assert said == ["prompts: 5 (1 duplicate left out, 1 empty prompt kept, column raw left out)"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": "no/such"}, "--prompts: no/such: no such file, and the hub says: Couldn't reach 'no/such'"),
        ({"dataset_streaming": True}, "--dataset_streaming is not read without --prompts; leave it out"),
    ],
)
def test_a_refusal_is_one_line(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    done = started(folder=tmp_path, **settings, output_dir="run")
    assert done.returncode == 2
    beginning, refused = done.stderr.splitlines()
    assert beginning.endswith("; loading torch and the plugins") and said in refused
    assert os.listdir(tmp_path) == []
