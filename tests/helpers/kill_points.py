"""A program that kills toy runs at each of their changes of files, and goes on with them.

    python kill_points.py FOLDER [--every N] [--resumed] [--shared RANK]

Every run is a fork of this process. It is killed before its k-th change (a file opened for writing, renamed or deleted,
a folder made or deleted), for each k, or for every N-th one. The next one goes on with its folder as a user would, and
must end with the undisturbed run's student, checkpoints and log. With --resumed, it is a resumed run that is killed,
one that finds the end of a stage saved already. With --shared, a run is two processes that share a full student of a
small Stable Diffusion 3, and one of them is killed.

Prints one JSON object: how many changes a run makes, how many runs were killed, and what went wrong, by k.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of the threads of the process that it comes from
sys.path.append(str(Path(__file__).parents[2] / "examples" / "torture"))

import torch
from runs import outcome

import dmdr.run.run
import sd3
from dmdr import train
from dmdr.run.checkpoint import checkpoints

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # and "open", for writing
SETTINGS = {
    "model": "toy", "rl": "refl", "reward": "toy", "stage1_steps": 3, "stage2_steps": 2, "fake_updates": 1,
    "per_device_train_batch_size": 8, "num_eval_samples": 8, "save_steps": 1, "save_total_limit": 1,
    "logging_steps": 1, "sample_steps": 2, "sample_images": 2, "teacher_steps": 2, "report_to": "none", "seed": 3,
}  # fmt: skip


def forked(act: Callable[[], Any], kill_at: int = 0, rank: int | None = None) -> tuple[int, int]:
    """Wait status of a child, and its changes; killed before one of them, unless that is 0.

    Args:
        rank: Of the child, if it is one of two that act together; the other ends when it does.
    """
    if rank is None:
        return ended(*child(act, kill_at))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    children = {}
    for each in (0, 1):
        os.environ |= {"RANK": str(each), "LOCAL_RANK": str(each)}
        children[each] = child(act, kill_at if each == rank else 0)
    found = ended(*children[rank])
    if found[0]:
        os.kill(children[1 - rank][0], signal.SIGKILL)
    other, _ = ended(*children[1 - rank])
    return found[0] or other, found[1]


def ended(process: int, told: int) -> tuple[int, int]:
    """What became of a child."""
    _, status = os.waitpid(process, 0)
    with open(told) as changes:
        return status, int(changes.read() or 0)


def child(act: Callable[[], Any], kill_at: int) -> tuple[int, int]:
    """A fork that acts, and where it writes its number of changes."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    errors = os.fdopen(os.dup(2), "w")  # stdout is for the answer
    try:
        changes = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal changes
            if event in CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
                changes += 1
                if changes == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.addaudithook(hook)
        act()
        os.write(write, str(changes).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=errors)
        errors.flush()
        os._exit(1)


def go_on(folder: Path) -> None:
    """As a user would: from the last checkpoint, or else once more."""
    again = {"resume_from_checkpoint": "latest"} if checkpoints(folder) else {"overwrite_output_dir": folder.exists()}
    train(**SETTINGS, output_dir=str(folder), **again)


def share(folder: Path) -> None:
    """Have runs be of a full student that processes share."""
    torch.manual_seed(0)
    sd3.build(folder / "sd3")
    (folder / "prompts.txt").write_text("seven\ntwo\n")
    SETTINGS.update(
        model=str(folder / "sd3"), prompts=str(folder / "prompts.txt"), resolution=16, full_finetune=True, shard="all",
        ema_decay=0.9, per_device_train_batch_size=2, num_eval_samples=2, stage1_steps=2, stage2_steps=1,
        rl="grpo", num_generations=2,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--resumed", action="store_true")
    parser.add_argument("--shared", type=int, choices=(0, 1), metavar="RANK")
    args = parser.parse_args()
    if args.shared is not None:
        share(args.folder)
    torch.set_num_threads(1)
    dmdr.run.run.write_report = lambda folder: (folder / "report.html").write_text("")  # plots take most of the time
    whole, run = args.folder / "whole", args.folder / "run"
    if args.shared is None:
        go_on(whole)  # here, so that the forks find everything imported
    else:  # which a fork of a process with the threads of a group would not
        assert forked(lambda: go_on(whole), rank=args.shared)[0] == 0
    status, changes = forked(lambda: go_on(args.folder / "once"), rank=args.shared)
    assert status == 0
    wanted = outcome(whole)
    if args.resumed:  # as if killed in the evaluation that ends the last stage
        begun = shutil.copytree(whole, args.folder / "begun")
        for path in (begun / "report.html", begun / "evaluation.json"):
            path.unlink()
        shutil.rmtree(begun / "student")
        wanted["evaluation"] = ""
        again = shutil.copytree(begun, args.folder / "again")
        status, changes = forked(lambda: go_on(again), rank=args.shared)
        assert status == 0
    wrong, killed = {}, 0
    for k in range(1, changes + 1, args.every):
        shutil.rmtree(run, ignore_errors=True)
        if args.resumed:
            shutil.copytree(begun, run)
        status, _ = forked(lambda: go_on(run), kill_at=k, rank=args.shared)
        killed += os.WIFSIGNALED(status)
        status, _ = forked(lambda: go_on(run), rank=args.shared)
        found = outcome(run) if status == 0 else {}
        if args.resumed and found:
            found["evaluation"] = ""
        if found != wanted:
            wrong[k] = [name for name in wanted if found.get(name) != wanted[name]]
    print(json.dumps({"changes": changes, "killed": killed, "wrong": wrong}))


if __name__ == "__main__":
    main()
