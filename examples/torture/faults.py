"""Break things around short runs of the toy, and see that they end as the guides say and lose nothing.

    python examples/torture/faults.py                      # every fault, about half an hour
    python examples/torture/faults.py --only "disk|NaN"    # those whose names have this pattern

Runs start as users start them. Then a disk is full, a reward hangs, a server dies, and so on. Each run must end in time
with its documented exit code and one line that says why, or go on, and its checkpoints must be whole. Once the cause is
gone, it is resumed, and must end with the weights and the log of a run that nobody disturbed, to the last bit. Prints a
line for each fault, and exits with 1 if one is wrong. Only root can mount small disks.
"""

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from room import LOCAL, Process, Room
from runs import log_of
from servers import Liar, serving

from dmdr.run.checkpoint import checkpoints, number_of

UPDATE_6 = "command 9 9"  # the ninth time that a run decodes: before it are five updates and three image grids


class Skipped(Exception):
    """Why a fault cannot be made here."""


# --- Disks and folders ------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], object]]:
    """A disk in the place of a folder; yields what changes its options."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        raise Skipped("no small disk can be mounted here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def full_disk(room: Room, kib: int, **settings: Any) -> None:
    with small_disk(room.folder, f"{kib}k") as remount:
        room.train(1, "^dmdr-train: .*No space left on device", **settings)
        remount("size=64m")
        room.end_as_undisturbed()


def large_file(room: Room, size: int) -> None:
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    room.train(1, "^dmdr-train: .*File too large", before=limit)
    room.end_as_undisturbed()


def read_only_disk(room: Room) -> None:
    with small_disk(room.folder, "64m") as remount:
        room.train(1, "^dmdr-train: Read-only", fault=UPDATE_6, words=f"mount -o remount,ro '{room.folder}'")
        remount("rw")
        room.end_as_undisturbed()


def locked_folder(room: Room, name: str) -> None:
    """Nothing can be made in it. Root is not bound by permissions."""
    lock, unlock = ("chattr +i", "chattr -i") if os.geteuid() == 0 else ("chmod a-w", "chmod u+w")
    folder = f"'{room.folder / name}'"
    room.folder.mkdir()
    if subprocess.run(f"{lock} '{room.folder}' && {unlock} '{room.folder}'", shell=True).returncode:
        raise Skipped("no folder can be locked here")
    try:
        room.train(1, "^dmdr-train: .*(not permitted|denied)", fault=UPDATE_6, words=f"{lock} {folder}")
    finally:
        subprocess.run(f"{unlock} {folder}", shell=True, check=True)
    room.end_as_undisturbed()


def removed_folder(room: Room, says: str, **settings: Any) -> None:
    room.train(1, f"^dmdr-train: .*{says}", fault=UPDATE_6, words=f"rm -r '{room.folder}'", **settings)
    room.expect(not room.folder.exists(), "it makes the folder again")
    room.end_as_undisturbed()


# --- Numbers that are none --------------------------------------------------------------------------------------------


def once(room: Room, fault: str, says: str, **how: Any) -> None:
    """In a single update, which the log notes; the run goes on."""
    room.train(0, says, fault=fault, **how)
    log = log_of(room.folder)
    noted = [line for line in log if line.get("bad_steps") or line["unscored/judge"]]
    room.expect(len(log) == 20 and len(noted) == 1, f"{len(noted)} of {len(log)} log lines note it")


def for_ever(room: Room, fault: str, says: str, **settings: Any) -> None:
    """The run ends, and has still a checkpoint from before the fault to go on with."""
    room.train(1, f"^dmdr-train: .*{says}", fault=f"{fault} 1000000", **settings)
    good = [line["step"] for line in log_of(room.folder) if not (line.get("bad_steps") or line["unscored/judge"])]
    kept = [path for path in checkpoints(room.folder) if number_of(path) <= good[-1]]
    room.expect(bool(kept), "there is no checkpoint from before the fault")
    room.end_as_undisturbed(resume_from_checkpoint=kept[-1] if kept else "latest")


# --- Rewards and prompts ----------------------------------------------------------------------------------------------


def failing(room: Room, fault: str, says: str, lacking: int = 0) -> None:
    room.train(1, f"^dmdr-train: reward 'judge' failed: {says}", fault=fault)
    room.end_as_undisturbed(lacking)


def hanging(room: Room) -> None:
    """The first signal waits for the end of the update, the second for nothing."""

    def stop(process: Process) -> None:
        assert process.stdout is not None and process.stdout.readline() == "hanging\n"
        process.terminate()
        time.sleep(2)
        room.expect(process.poll() is None, "the first signal ends it in the middle of an update")
        process.terminate()

    room.train(-signal.SIGTERM, fault="hang 8 8", meanwhile=stop)
    room.end_as_undisturbed()


def other_prompts(room: Room, change: str, code: int, says: str) -> None:
    """Their file changes while a run reads from it. A signal stops the run, and resumed it notices the change."""
    whole, words = room.prompts.read_text(), f"cd '{room.prompts.parent}'; {change}; kill $PPID"
    room.train(143, "^stopped at step 6", fault=UPDATE_6, words=words)
    kept = Path(shutil.copytree(room.folder, room.folder.with_name("kept")))
    room.go_on(code, says)
    shutil.rmtree(room.folder)
    kept.rename(room.folder)
    room.prompts.write_text(whole)
    room.end_as_undisturbed()


def stream_that_ends(room: Room) -> None:
    room.parts = LOCAL | {"dataset_streaming": "true"}
    whole = room.prompts.read_text()
    room.train(2, "^dmdr-train: .*holds no prompt", fault=UPDATE_6, words=f": > '{room.prompts}'")
    room.prompts.write_text(whole)
    room.end_as_undisturbed()


# --- Reward servers ---------------------------------------------------------------------------------------------------


def remote(url: str, reward_timeout: int = 4) -> dict[str, Any]:
    own = {"reward": f"{url} as judge", "request_timeout": 2, "reward_timeout": reward_timeout}
    return LOCAL | {"rl": "grpo", "num_generations": 4} | own


def dying_server(room: Room, returns: bool) -> None:
    with ExitStack() as servers:
        server, url = servers.enter_context(serving())

        def restart(run: Process | None = None) -> None:
            server.wait()
            servers.enter_context(serving(int(url.rpartition(":")[2])))

        room.parts = remote(url, 120 if returns else 4)
        kill = f"kill -9 {server.pid}"
        if returns:
            room.train(0, "answers again", fault=UPDATE_6, words=kill, meanwhile=restart)
        else:
            room.train(1, "^dmdr-train: .*not answered for 4 s: Connection refused", fault=UPDATE_6, words=kill)
            restart()
        room.end_as_undisturbed()


def lying_server(room: Room, answer: str, says: str) -> None:
    with Liar(answer) as liar:
        room.parts = remote(liar.url)
        room.train(1, f"^dmdr-train: .*{says}")
        liar.honest = True
        room.end_as_undisturbed()
        liar.shutdown()


# --- All of them ------------------------------------------------------------------------------------------------------

STUDENT = "the student was not updated: its gradient is not finite"
FAKE = "the fake_score was not updated: .*loss/fake is not finite"
UNSCORED, NEVER = "'judge' left {} images of step", "'judge' has scored none of 8 images"
TIMEOUT, NO_SCORES = "not answered for 4 s: {}", "the answer does not hold 8 scores"
FEW: dict[str, Any] = {"max_bad_steps": 3}
IN_SECOND: dict[str, Any] = {
    "launcher": ("-m", "torch.distributed.run", "--nproc_per_node", "2"), "environment": {"FAULT_RANK": "1"},
}  # fmt: skip
FAULTS: dict[str, Callable[[Room], None]] = {
    **{f"disk of {kib} KiB": partial(full_disk, kib=kib) for kib in (8, 40, 100, 500, 580, 700)},
    "disk of 100 KiB, TensorBoard": partial(full_disk, kib=100, report_to="tensorboard"),
    "no file above 30 KB": partial(large_file, size=30_000),
    "no file above 90 KB": partial(large_file, size=90_000),
    "disk becomes read-only": read_only_disk,
    "run folder is locked": partial(locked_folder, name=""),
    "checkpoints folder is locked": partial(locked_folder, name="checkpoints"),
    "samples folder is locked": partial(locked_folder, name="samples"),
    "run folder is removed": partial(removed_folder, says="No such file.*metrics.jsonl"),
    "run folder is removed, rare log": partial(removed_folder, says="is gone", logging_steps=10),
    "score NaN once": partial(once, fault="score 7 7", says=UNSCORED.format(8)),
    "score NaN once, stage 2": partial(once, fault="score 14 14", says=UNSCORED.format(8)),
    "reward's gradient NaN once": partial(once, fault="gradient 2 2", says=STUDENT),
    "decoder NaN once": partial(once, fault="decoder 5 5", says=UNSCORED.format(8)),
    "fake score's loss NaN once": partial(once, fault="fake 7 7", says=FAKE),
    "student's gradient NaN once": partial(once, fault="student 7 7", says=STUDENT),
    "score NaN for ever": partial(for_ever, fault="score 5", says=NEVER),
    "reward's gradient NaN for ever": partial(for_ever, fault="gradient 2", says=STUDENT, **FEW),
    "decoder NaN for ever": partial(for_ever, fault="decoder 7", says=NEVER),
    "fake score's loss NaN for ever": partial(for_ever, fault="fake 5", says=FAKE, **FEW),
    "student's gradient NaN for ever": partial(for_ever, fault="student 5", says=STUDENT, **FEW),
    "score NaN in one of two": partial(once, fault="score 7 7", says=UNSCORED.format(8), **IN_SECOND),
    "its gradient NaN in one of two": partial(once, fault="gradient 2 2", says=f"{STUDENT} .process 1", **IN_SECOND),
    "reward raises": partial(failing, fault="raise 8 8", says="OSError: no judge today"),
    "reward raises for the log": partial(failing, fault="raise 15 15", says="OSError", lacking=13),
    "reward exits": partial(failing, fault="exit 8 8", says="SystemExit: 0"),
    "reward hangs": hanging,
    "prompts truncated": partial(other_prompts, change="printf mode > prompts.txt", code=0, says="has changed since"),
    "prompts emptied": partial(other_prompts, change=": > prompts.txt", code=2, says="^dmdr-train: .*no prompt"),
    "prompts removed": partial(other_prompts, change="rm prompts.txt", code=2, says="^dmdr-train: .*no such file"),
    "streamed prompts emptied": stream_that_ends,
    "server dies": partial(dying_server, returns=False),
    "server dies and comes back": partial(dying_server, returns=True),
    "server answers no JSON": partial(lying_server, answer="no JSON", says=NO_SCORES),
    "server answers too few scores": partial(lying_server, answer="too few scores", says=NO_SCORES),
    "server answers by half": partial(lying_server, answer="half an answer", says=TIMEOUT.format("IncompleteRead")),
    "server does not answer": partial(lying_server, answer="no answer", says=TIMEOUT.format("no answer in time")),
    "server answers byte by byte": partial(lying_server, answer="single bytes", says=TIMEOUT.format("no answer")),
    "server answers without an end": partial(lying_server, answer="no end", says="answers with more than"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pattern of the names of faults")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/faults"))
    args = parser.parse_args()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    wrong = 0
    for name in filter(re.compile(args.only).search, FAULTS):
        room = Room(args.output_dir.absolute(), name)
        try:
            FAULTS[name](room)
        except Skipped as reason:
            print(f"{name:34} skipped: {reason}", flush=True)
            continue
        wrong += bool(room.wrong)
        verdict = f"WRONG ({'; '.join(room.wrong)})" if room.wrong else "ok"
        print(f"{name:34} {', '.join(room.ends):28} {verdict} {room.said}", flush=True)
        if not room.wrong:
            shutil.rmtree(room.folder.parent)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
