"""Runs that are killed at one of their changes of files: nothing is lost, and they go on to the same bits."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import sd3

PROGRAM = Path(__file__).parents[1] / "helpers" / "kill_points.py"
FULL = pytest.mark.verify


def killed(*arguments: str) -> dict[str, Any]:
    """What the program prints."""
    command = [sys.executable, str(PROGRAM), *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
    return dict(json.loads(found.stdout))


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=FULL)])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path, every: int) -> None:
    """Saves, prunes, the ends of both stages, image grids, the export and the report are among the changes."""
    found = killed(str(tmp_path), "--every", str(every))
    assert found["changes"] > 90
    assert found["killed"] == len(range(1, found["changes"] + 1, every))
    assert not found["wrong"]


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=FULL)])
def test_a_run_that_is_killed_twice_keeps_the_end_of_its_stage(tmp_path: Path, every: int) -> None:
    found = killed(str(tmp_path), "--resumed", "--every", str(every))
    assert found["killed"] == len(range(1, found["changes"] + 1, every)) > 2
    assert not found["wrong"]


@FULL
@pytest.mark.parametrize(("rank", "every"), [(0, 8), (1, 2)])
def test_a_killed_process_of_two_that_share_a_student_loses_nothing(tmp_path: Path, rank: int, every: int) -> None:
    found = killed(str(tmp_path), "--shared", str(rank), "--every", str(every))
    assert found["killed"] == len(range(1, found["changes"] + 1, every)) > 5
    assert not found["wrong"]


@FULL
def test_runs_that_are_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "torture" / "kill.py"
    command = [sys.executable, str(script), "--runs", "10", "--model", "toy", "--output_dir", str(tmp_path / "torture")]
    found = subprocess.run(command, capture_output=True, text=True)
    print("\n" + found.stdout)
    assert found.returncode == 0, found.stderr


@FULL
@pytest.mark.parametrize("kind", ["LoRA", "full"])
def test_a_dead_process_ends_those_that_share_its_network(tmp_path: Path, kind: str) -> None:
    """Within a minute, in a save, too; torchrun goes on from the last checkpoint to the same bits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("seven\ntwo\nfour\n")
    settings = "--stage1_steps 50 --stage2_steps 0 --per_device_train_batch_size 2 --resolution 16 --fake_updates 1"
    settings += " --save_steps 1 --logging_steps 1 --report_to none --sample_images 2 --teacher_steps 1 --shard all"
    settings += " --full_finetune true --ema_decay 0.9" if kind == "full" else ""
    given = ["--model", str(tmp_path / "sd3"), "--prompts", str(tmp_path / "prompts.txt"), *settings.split()]
    chance, saved = random.Random(0), (tmp_path / "run" / "checkpoints").glob

    def begun(name: str, *more: str) -> "subprocess.Popen[bytes]":
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "dmdr.cli.train"]
        command = [*program, *given, "--output_dir", str(tmp_path / name), *more]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})

    assert begun("whole").wait() == 0
    ended = []
    for _ in range(5):
        before = len(list(saved("step-*")))
        process = begun("run", *(["--resume_from_checkpoint", "latest"] if before else []))
        while len(list(saved("step-*"))) <= before:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
        workers = [child for child in psutil.Process(process.pid).children() if "dmdr.cli.train" in child.cmdline()]
        chance.choice(workers).kill()
        killed = time.monotonic()
        assert process.wait(60) != 0
        ended.append(time.monotonic() - killed)
        assert not any(worker.is_running() for worker in workers)
    print(f"\n{kind}: ended " + ", ".join(f"{seconds:.1f}" for seconds in ended) + " s after a process was killed")
    assert begun("run", "--resume_from_checkpoint", "latest").wait() == 0
    students = [load_file(next((tmp_path / f / "student").rglob("*.safetensors"))) for f in ("whole", "run")]
    assert students[0].keys() == students[1].keys()
    assert all(tensor.equal(students[1][name]) for name, tensor in students[0].items())


FAILING = """
import os

calls = []

def score(images, prompts):
    calls.append(len(images))
    if os.environ["RANK"] == "1" and len(calls) > {answers}:
        raise ValueError("no judge today")
    return images.mean((1, 2, 3))
"""


@FULL
@pytest.mark.parametrize(
    ("where", "answers", "kept"),
    [("--reward", 0, []), ("--eval_reward", 0, []), ("--eval_reward", 1, ["step-000002"])],
)
def test_a_reward_that_fails_in_one_process_ends_all_of_them(
    tmp_path: Path, where: str, answers: int, kept: list[str]
) -> None:
    """An evaluation is made before stage 2, too."""
    (tmp_path / "mine.py").write_text(FAILING.format(answers=answers))
    settings = "--model toy --rl grpo --num_generations 2 --stage1_steps 0 --stage2_steps 4 --logging_steps 1"
    settings += " --per_device_train_batch_size 4 --num_eval_samples 4 --eval_steps 2 --report_to none --ddp_timeout 60"
    other = ["--reward", "toy"] if where == "--eval_reward" else []
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "dmdr.cli.train"]
    command = [*program, *settings.split(), where, "mine.py:score", *other, "--output_dir", "run"]
    started = time.monotonic()
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 1 and time.monotonic() - started < 120
    assert "dmdr-train: reward 'mine.py:score' failed: ValueError: no judge today" in found.stderr
    assert "dmdr-train: a reward failed in another process" in found.stderr
    assert "Connection closed by peer" not in found.stderr
    assert [path.name for path in (tmp_path / "run").glob("checkpoints/*")] == kept
