"""The digits' table of methods: every way to distil, and every way to follow a reward, from the same start.

    python examples/digits/methods.py              # seeds 0-2; hours on two cores, after table.py
    python examples/digits/methods.py --seeds 0 --only gndm dmd2

Each method has two rows. In the first it makes as many updates as the others. In the second it takes about as long as
DMD, or as ReFL beside DMD: by the seconds of its own first row and of theirs, in the first seed, so run nothing beside
it. The second is left out where the two differ by less than a tenth.

Every cell is an ordinary run folder under --output_dir, which it shares with table.py; finished ones are not repeated.
"""

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from table import METRICS, Cells, logged, markdown, measured, seconds, trained

START = "stage1"  # of the names of run folders
DISTILLED: Mapping[str, dict[str, Any]] = {  # by name; all but the last as stage 1
    "dmd": {},
    "dmd, eta 0": {"eta": 0.0},
    "dmd, full fake score": {"fake_score": "full"},
    "dmd, no reward": {"sample_weight": "none"},
    "dmd, gdmd": {"sample_weight": "gdmd"},
    "ac_dmd": {"matching": "ac_dmd"},
    "tdm, eta 0": {"matching": "tdm", "eta": 0.0},
    "gndm": {"matching": "gndm", "num_generations": 4},
    "dmd2": {"matching": "dmd2"},
    "ladd": {"matching": "ladd"},
    "lcm": {"rl": "lcm", "dmd_weight": 0.0, "rl_weight": 1.0, "stage2_learning_rate": 1.2e-3},
}
ALIGNED: Mapping[str, dict[str, Any]] = {  # by name; each joins DMD, from one stage 1
    "refl": {"rl": "refl"},
    "refl, KL": {"rl": "refl", "kl_beta": 0.1},
    "draft": {"rl": "draft"},
    "grpo": {"rl": "grpo"},
    "dpo": {"rl": "dpo"},
    "dpo, each transition": {"rl": "dpo", "each_transition": True},
    "srpo": {"rl": "srpo"},
    "nft": {"rl": "nft"},
    "rwr": {"rl": "rwr"},
    "ca_advantage": {"rl": "ca_advantage"},
    "tdm_r1": {"rl": "tdm_r1"},
}
COLUMNS = METRICS | {"seconds": "seconds", "memory": "GiB"}


@dataclass(frozen=True)
class Method:
    """A row, or two.

    Attributes:
        name: Of the table.
        updates: Of the first row, as of the recipe.
        own: What it sets beside the recipe.
        start: Name of the folder of the stage 1 that it goes on from, without the seed; none if it is its own.
    """

    name: str
    updates: int
    own: Mapping[str, Any]
    start: str = ""

    @property
    def stage(self) -> int:
        """That it trains in."""
        return 2 if "rl" in self.own else 1

    def run(self, root: Path, seed: int, updates: int | None = None, **settings: Any) -> Path:
        """The folder of its run of so many updates, trained unless it is there."""
        start: dict[str, Any] = {"stage1_steps": 0} if self.stage == 2 else {"stage2_steps": 0}
        if self.start:
            start = {"init_student": str(root / f"{self.start}-seed{seed}")}
        updates = updates or self.updates
        name = self.name.replace(", ", "-").replace(" ", "_")
        folder = root / f"{'aligned' if self.start else 'distilled'}-{name}-{updates}-seed{seed}"
        settings = {"teacher_steps": 4, **self.own, **start, f"stage{self.stage}_steps": updates, **settings}
        return trained(folder, seed=seed, **settings)

    def memory(self, root: Path, seed: int) -> float:
        """What a process has at most in five updates, GiB; an evaluation would take more than they do."""
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            folder = process.submit(self.run, root, seed, 5, num_eval_samples=0).result()
        peak: float = max(line["peak_memory_gib"] for line in logged(folder))
        return peak


METHODS = [
    *(Method(name, 140, own) for name, own in DISTILLED.items()),
    *(Method(name, 60, own, START) for name, own in ALIGNED.items()),
]


def cells(root: Path, seed: int, methods: list[Method], longer: dict[str, int]) -> dict[str, tuple[Method, Path]]:
    """Method and run folder of each row, by title; trains what is not there.

    Args:
        longer: Updates of a second row by method; those that are missing are computed from this seed.
    """
    trained(root / f"{START}-seed{seed}", seed=seed, stage2_steps=0)
    found: dict[str, tuple[Method, Path]] = {}
    allowed: dict[str, float] = {}  # seconds of the first method with this start
    for method in methods:
        folder = method.run(root, seed)
        found[f"{method.name}, {method.updates} updates"] = method, folder
        if method.name not in longer:
            took = seconds(folder, method.stage)
            longer[method.name] = round(method.updates * allowed.setdefault(method.start, took) / took)
        updates = longer[method.name]
        if abs(updates - method.updates) > 0.1 * method.updates:
            found[f"{method.name}, {updates} updates"] = method, method.run(root, seed, updates)
    return found


def measure(root: Path, seeds: list[int], methods: list[Method]) -> Cells:
    """Rows of the table, each with one evaluation per seed."""
    rows: Cells = {}
    longer: dict[str, int] = {}
    for seed in seeds:
        found = cells(root, seed, methods, longer)
        both = {"student": root / f"{START}-seed{seed}", "teacher": Path("teacher")}  # that of the run
        steps = ["--num_inference_steps", "28", "4"]
        teachers = measured(root / f"methods-teacher-seed{seed}", both, *steps, seed=seed)
        for title in ("teacher-28", "teacher-4"):
            rows.setdefault(title.replace("-", ", ") + " steps", []).append(teachers[title])
        places = {title: folder for title, (_, folder) in found.items()}
        for title, values in measured(root / f"methods-seed{seed}", places, seed=seed).items():
            method, folder = found[title]
            cost = {"seconds": seconds(folder, method.stage)}
            if seed == seeds[0]:
                cost["memory"] = method.memory(root, seed)
            rows.setdefault(title, []).append(values | cost)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="rows, beside the first of each kind")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/digits-table"))
    args = parser.parse_args()
    if unknown := set(args.only) - {method.name for method in METHODS}:
        known = ", ".join(method.name for method in METHODS)
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {known}")
    first = {"dmd", "refl"}  # whose seconds the others are given
    chosen = [method for method in METHODS if not args.only or method.name in first | set(args.only)]
    print(markdown(measure(args.output_dir, args.seeds, chosen), COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
