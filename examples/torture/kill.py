"""Kill short runs at random moments, go on, and compare with the run that nobody disturbed.

    python examples/torture/kill.py                                # 100 runs of the toy
    python examples/torture/kill.py --runs 20 --model digits       # a real pipeline

Each run is killed with SIGKILL up to three times, each time a random moment after a random update: in an update, a
save, an image grid or an evaluation. Then it goes on from its newest checkpoint. Prints how many ended with the same
student, checkpoints and log to the last bit, and where the kills fell; exits with 1 if one run did not.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from runs import command, going_on, outcome

MOST_KILLS = 3
LONGEST = 0.3  # seconds from an update to the kill


def begin(folder: Path, model: str) -> "subprocess.Popen[bytes]":
    """A run, or its continuation."""
    own = {"model": model} | ({"reward": "toy"} if model == "toy" else {})
    words = command(folder, **own, **going_on(folder))
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def updates(folder: Path) -> int:
    """As the log has them."""
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def ends_alone(process: "subprocess.Popen[bytes]", folder: Path, update: int, delay: float) -> bool:
    """Wait for an update and a moment more; whether the run was finished by then."""
    while process.poll() is None and updates(folder) < update:
        time.sleep(0.005)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        return False
    return True


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
    parser.add_argument("--model", default="toy", choices=("toy", "digits"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/torture"))
    args = parser.parse_args()
    chance, whole = random.Random(args.seed), args.output_dir / "whole"
    shutil.rmtree(args.output_dir, ignore_errors=True)
    assert begin(whole, args.model).wait() == 0
    wanted = outcome(whole)
    moments: Counter[str] = Counter()
    wrong = []
    for run in range(args.runs):
        folder = args.output_dir / f"run-{run}"
        for update in sorted(chance.sample(range(len(wanted["log"]) + 1), MOST_KILLS)):
            process = begin(folder, args.model)
            if ends_alone(process, folder, update, chance.uniform(0, LONGEST)):
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            moments[stands(folder)] += 1
        process = begin(folder, args.model)
        _, said = process.communicate()
        if process.returncode or outcome(folder) != wanted:
            wrong.append(run)
            print(f"run {run}: exit code {process.returncode}\n{said.decode()[-2000:]}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    killed = ", ".join(f"{count} {moment}" for moment, count in moments.items())
    print(
        f"{args.runs - len(wrong)} of {args.runs} runs of {args.model} ended like a run without kills; kills: {killed}"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
