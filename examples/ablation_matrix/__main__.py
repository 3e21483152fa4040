"""The ablation matrix: every cell of a YAML is an ordinary run; then a report of them all.

    python -m examples.ablation_matrix --jobs 2 --output_dir runs/ablation           # 3 seeds, on 2 cores
    python -m examples.ablation_matrix --jobs 2 --output_dir runs/ablation --quick   # a first look
    python -m examples.ablation_matrix --config my.yaml --dry_run                    # which cells there are

Run it in the root of the repository. Start it again to go on: finished cells are kept, half-finished ones go on from
their last checkpoint. Exits with 1 if a cell failed, 2 for bad input.
"""

import argparse
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dmdr.cli.common import CommandParser, command
from dmdr.errors import ConfigError, TrainingError
from dmdr.images import can_hold_files
from dmdr.settings import registry

from .matrix import Block, Matrix, load
from .runs import Run, last_line

DEFAULT = Path(__file__).with_name("matrix.yaml")
WORKER = (sys.executable, "-m", f"{__package__}.worker")
PATIENCE = 60  # seconds that all processes together get to save their checkpoints


@dataclass(frozen=True)
class Task:
    """A process, after those that it needs.

    Attributes:
        arguments: Of the worker (`worker.py`).
        run: What it trains, if it does.
    """

    name: str
    arguments: Sequence[str]
    needs: Sequence[str] = ()
    run: Run | None = None


def tasks(matrix: Matrix, root: Path) -> list[Task]:
    """What is left to do: what named models have to build first, once, then every run that is not finished."""
    left = [run for run in matrix.runs if run.state(root) != "finished"]
    builds = {name: parts for run in left for name, parts in builds_of(run).items()}
    first = [Task(name, ["build", *parts]) for name, parts in builds.items()]
    return first + [
        Task(run.name, training(run, root), [*builds_of(run), *([run.start.name] if run.start else [])], run)
        for run in left
    ]


def builds_of(run: Run) -> dict[str, tuple[str, ...]]:
    """What a run's named model builds on first use, where it has a name: the arguments by the name of the task."""
    model = run.settings.config.model
    if not registry.registered("models", model):
        return {}
    parts: list[tuple[str, ...]] = [(model, "pipeline")]
    for group in ("rewards", "eval_rewards"):
        for reward in run.settings.of(group):
            if reward.options.get("checkpoint", "") is None:
                parts.append((model, group, reward.name))
    return {re.sub(r"[^\w.+-]", "_", "-".join(("build", *part))): part for part in parts}


def training(run: Run, root: Path) -> list[str]:
    """The arguments with which a run goes on from its last checkpoint, or else begins."""
    folder, settings = run.folder(root), root / "logs" / f"{run.name}.yaml"
    begun = ["--resume_from_checkpoint", "latest"] if run.state(root) == "begun" else []
    return ["train", "--config", str(settings), "--output_dir", str(folder), *begun]


def clear(matrix: Matrix, root: Path) -> None:
    """Write the settings of the runs that are left, and remove what cannot be gone on from."""
    (root / "logs").mkdir(parents=True, exist_ok=True)
    for run in matrix.runs:
        state = run.state(root)
        if state == "new":
            shutil.rmtree(run.folder(root), ignore_errors=True)
        if state != "finished":
            (root / "logs" / f"{run.name}.yaml").write_text(run.settings.as_yaml())


def work(todo: Sequence[Task], jobs: int, logs: Path, lock: IO[str]) -> dict[str, str]:
    """Run the tasks, up to `jobs` at a time; whatever ends this function ends them.

    Returns:
        The tasks that failed, each with the last line of its log.
    """
    waiting, running = list(todo), dict[str, tuple[subprocess.Popen[bytes], float]]()
    open_ends, failed = {task.name for task in todo}, dict[str, str]()

    def told(name: str, took: str) -> None:
        count = len(todo) - len(waiting) - len(running)
        print(f"[{count}/{len(todo)}] {took:>6}  {name}  {failed.get(name, '')}".rstrip(), flush=True)

    try:
        while waiting or running:
            for task in list(waiting):
                if bad := [name for name in task.needs if name in failed]:
                    waiting.remove(task)
                    failed[task.name] = f"not begun: {bad[0]} has failed: {failed[bad[0]]}"
                    told(task.name, "")
                elif len(running) < jobs and not open_ends.intersection(task.needs):
                    waiting.remove(task)
                    if task.run and task.run.changed():
                        failed[task.name] = "not begun: the file of its plugin has changed; start again"
                        told(task.name, "")
                        continue
                    running[task.name] = begin(task, logs, lock), time.monotonic()
            for name, (process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    open_ends.discard(name)
                    if process.returncode:
                        failed[name] = f"exit code {process.returncode}: {last_line(logs / f'{name}.log')}"
                    told(name, f"{time.monotonic() - began:.0f} s")
            time.sleep(0.1)
    except (KeyboardInterrupt, SystemExit):
        print(f"the runs save checkpoints (up to {PATIENCE} s); run the same command again to go on", file=sys.stderr)
        raise
    finally:
        end([process for process, _ in running.values()])
    return failed


def begin(task: Task, logs: Path, lock: IO[str]) -> "subprocess.Popen[bytes]":
    """Start a task in a session of its own: Ctrl-C reaches this process, which ends its tasks in order."""
    with (logs / f"{task.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*WORKER, *task.arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "5"},
            pass_fds=[lock.fileno()],  # so that the folder stays locked until the last of them is gone
            start_new_session=True,
        )


def end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Let go of their standard input, at which they save a checkpoint and end; a second signal does not wait."""
    try:
        for process in processes:
            assert process.stdin
            process.stdin.close()
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def locked(root: Path) -> Iterator[IO[str]]:
    """The folder to ourselves, once processes of a matrix that was killed here have ended.

    Raises:
        ConfigError: Another matrix is at work in it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        for second in range(PATIENCE + 1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if second == PATIENCE:
                    raise ConfigError(f"--output_dir {root}: another matrix uses it now; give another folder") from None
                if second == 0:
                    print(f"waiting up to {PATIENCE} s for another matrix that uses {root}", file=sys.stderr)
                time.sleep(1)
        yield lock


def listing(matrix: Matrix, root: Path) -> str:
    """The cells by block and the first stages that they share, and every run with its state."""
    lines = []
    for block in matrix.blocks:
        lines.append(f"{block.title}:")
        lines += [f"  {label}: {runs[0].updates} updates, {runs[0].name}" for label, runs in block.cells.items()]
        lines += [f"  stage 1 of {'; '.join(labels)}: {start}" for start, labels in starts(block).items()]
    states = [run.state(root) for run in matrix.runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("finished", "begun", "new"))
    return "\n".join([*lines, f"{len(matrix.runs)} runs with seeds {list(matrix.seeds)}: {counts}"])


def starts(block: Block) -> dict[str, list[str]]:
    """The cells that go on from each first stage, of the first seed."""
    found: dict[str, list[str]] = {}
    for label, (run, *_) in block.cells.items():
        if run.start:
            found.setdefault(f"{run.start.updates} updates, {run.start.name}", []).append(label)
    return found


def stop(number: int, frame: Any) -> None:
    """At SIGTERM: leave through every `finally`, as Ctrl-C does."""
    sys.exit(128 + number)


def reporter() -> Callable[[Matrix, Path, Mapping[str, str]], list[str]]:
    """What writes the report, before there are hours of training to report.

    Raises:
        ConfigError: If a package that it needs is not installed.
    """
    try:
        from .report import write_report
    except ModuleNotFoundError as error:
        raise ConfigError(f"the report needs the package '{error.name}': pip install {error.name}") from error
    return write_report


def check_folder(root: Path) -> None:
    """Refuse a folder that nothing could be written to."""
    if not can_hold_files(next(path for path in (root, *root.absolute().parents) if os.path.exists(path))):
        raise ConfigError(f"--output_dir {root} is no folder, or you may not write into it")


def train(matrix: Matrix, root: Path, jobs: int) -> dict[str, str]:
    """Train what is left, and return what has failed."""
    with locked(root) as lock:
        clear(matrix, root)
        return work(tasks(matrix, root), jobs, root / "logs", lock)


def ablate(arguments: list[str]) -> None:
    args, write_report = flags(arguments), reporter()
    root: Path = args.output_dir
    check_folder(root)
    matrix = load(args.config, root, quick=args.quick, inputs=not args.report_only)
    if args.dry_run:
        print(listing(matrix, root))
        return
    if args.report_only and all(run.state(root) == "new" for run in matrix.runs):
        raise ConfigError(f"--report_only: {root} holds no run of this matrix; leave out --report_only to train")
    failed = {} if args.report_only else train(matrix, root, args.jobs)
    print("\n".join(write_report(matrix, root, failed)))
    for name, line in failed.items():
        print(f"FAILED {name}: {line}", file=sys.stderr)
    print(f"done: {root}/report.html")
    if failed:
        raise TrainingError(f"failures: {len(failed)}; run the same command to try them again")


def flags(arguments: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog=f"python -m {__package__}", description=__doc__, formatter_class=layout)
    parser.add_argument("--config", type=Path, default=DEFAULT)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time; each takes one core")
    parser.add_argument("--quick", action="store_true", help="what the YAML has under `quick`")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry_run", action="store_true", help="print the cells and write nothing")
    instead.add_argument("--report_only", action="store_true", help="write the report of what is finished")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {args.jobs}")
    return args


def main() -> int:
    signal.signal(signal.SIGTERM, stop)
    sys.argv[0] = "ablation_matrix"  # as which it speaks
    return command(ablate)


if __name__ == "__main__":
    sys.exit(main())
