"""Kill short runs at random moments, go on, and compare with the run that nobody disturbed.

    python examples/torture/kill.py                            # 100 runs of the digits
    python examples/torture/kill.py --runs 20 --model toy      # of a model that takes no time

Each run is a process of its own, a fork of one that has imported everything. It is killed with SIGKILL up to three
times, each time a random moment after a random update: in an update, a save, an image grid or an evaluation. Then it
goes on from its newest checkpoint. Prints how many ended with the same student, checkpoints and log to the last bit,
and where the kills fell; exits with 1 if one run did not.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

from runs import SETTINGS, going_on, outcome

import dmdr
import dmdr.run.run

MOST_KILLS = 3
LONGEST = 0.3  # seconds from an update to the kill


def train(folder: Path, model: str) -> None:
    """A run, or its continuation."""
    sys.stdout = sys.stderr = open(folder.with_suffix(".txt"), "a")  # noqa: SIM115
    dmdr.run.run.write_report = lambda folder: (folder / "report.html").write_text("")  # plots take most of the time
    own = {"model": model} | ({"reward": "toy"} if model == "toy" else {})
    dmdr.train(**SETTINGS | own | going_on(folder), output_dir=str(folder))


def begin(folder: Path, model: str) -> BaseProcess:
    """`train` in a process of its own."""
    process = multiprocessing.get_context("forkserver").Process(target=train, args=(folder, model))
    process.start()
    return process


def updates(folder: Path) -> int:
    """As the log has them."""
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def ends_alone(process: BaseProcess, folder: Path, update: int, delay: float) -> bool:
    """Wait for an update and a moment more; whether the run was finished by then."""
    while process.is_alive() and updates(folder) < update:
        time.sleep(0.005)
    process.join(delay)
    return not process.is_alive()


def stands(folder: Path) -> str:
    """How far a run has come."""
    if list((folder / "checkpoints").glob(".*")):
        return "in a save"
    if not (folder / "metrics.jsonl").exists():
        return "before the first update"
    return "between updates" if not (folder / "student").exists() else "after the last update"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--model", default="digits", choices=("digits", "toy"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/torture"))
    args = parser.parse_args()
    chance, whole = random.Random(args.seed), args.output_dir / "whole"
    shutil.rmtree(args.output_dir, ignore_errors=True)
    args.output_dir.mkdir(parents=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:resource_tracker"}  # which counts what kills leave
    multiprocessing.set_forkserver_preload(["dmdr.run.run", "dmdr_digits", "dmdr_sd3", "dmdr_rewards", "dmdr_refl"])
    undisturbed = begin(whole, args.model)
    undisturbed.join()
    if undisturbed.exitcode:
        raise SystemExit(f"the undisturbed run failed: see {whole.with_suffix('.txt')}")
    wanted = outcome(whole)
    moments: Counter[str] = Counter()
    wrong = []
    for run in range(args.runs):
        folder = args.output_dir / f"run-{run}"
        for update in sorted(chance.sample(range(len(wanted["log"]) + 1), MOST_KILLS)):
            process = begin(folder, args.model)
            if ends_alone(process, folder, update, chance.uniform(0, LONGEST)):
                break
            process.kill()
            process.join()
            moments[stands(folder)] += 1
        process = begin(folder, args.model)
        process.join()
        if process.exitcode or outcome(folder) != wanted:
            wrong.append(run)
            said = folder.with_suffix(".txt").read_text()
            print(f"run {run}: exit code {process.exitcode}\n{said[-2000:]}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    killed = ", ".join(f"{count} {moment}" for moment, count in moments.items())
    print(
        f"{args.runs - len(wrong)} of {args.runs} runs of {args.model} ended like a run without kills; kills: {killed}"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
