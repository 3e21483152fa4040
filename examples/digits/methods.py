"""The digits' table of methods: every way to distil, and every way to follow a reward, from the same start.

    python examples/digits/methods.py              # seeds 0-2; hours on two cores, after table.py
    python examples/digits/methods.py --seeds 0 --only dmd tdm

Each method has two rows. In the first it makes as many updates as the others. In the second it takes about as long as
DMD, or as ReFL beside DMD: by the seconds of its own first row and of theirs on the same machine, so run nothing beside
it. The second is left out where the two differ by less than a tenth.

Every cell is an ordinary run folder under --output_dir, which it shares with table.py; finished ones are not repeated.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from table import METRICS, Cells, markdown, measured, trained

DISTIL, ALIGN = 140, 60  # updates, as of the recipe
DISTILLED: Mapping[str, dict[str, Any]] = {  # by row; all but the last two as stage 1
    "dmd": {},
    "dmd, eta 0": {"eta": 0.0},
    "dmd, full fake score": {"fake_score": "full"},
    "dmd, no reward": {"sample_weight": "none"},
    "dmd, gdmd": {"sample_weight": "gdmd"},
    "decoupled": {"matching": "decoupled"},
    "ac_dmd": {"matching": "ac_dmd"},
    "tdm, eta 0": {"matching": "tdm", "eta": 0.0},
    "gndm": {"matching": "gndm", "num_generations": 4},
    "dmd2": {"matching": "dmd2"},
    "ladd": {"matching": "ladd", "gan_learning_rate": 1e-3},
    "lcm": {"rl": "lcm", "dmd_weight": 0.0, "rl_weight": 1.0, "stage2_learning_rate": 1.2e-3},
}
ALIGNED: Mapping[str, dict[str, Any]] = {  # by row; each joins DMD, from one stage 1
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


def cost(folder: Path, stage: int) -> tuple[float, float]:
    """Seconds that the updates of a stage took, and the most memory that its process had, GiB; by the log."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["stage"] == stage]
    first, last = own[0]["step"], own[-1]["step"]
    seconds = sum(line["seconds"] for line in own) / len(own) * (last - first + 1)
    return seconds, max(line["peak_memory_gib"] for line in lines)


def updated(place: Path, updates: int, stage: int, settings: Mapping[str, Any]) -> Path:
    """The folder of a run of so many updates in a stage, trained unless it is there."""
    folder = place.with_name(f"{place.name}-{updates}-seed{settings['seed']}")
    return trained(folder, **settings, **{f"stage{stage}_steps": updates})


def cells(root: Path, seed: int, only: set[str]) -> Iterator[tuple[str, Path, int]]:
    """Title, run folder and stage of each row; trains what is not there."""
    first = trained(root / f"stage1-seed{seed}", seed=seed, stage2_steps=0)
    for kind, methods, usual in (("distilled", DISTILLED, DISTIL), ("aligned", ALIGNED, ALIGN)):
        allowed = 0.0  # seconds of the first method
        for name, own in methods.items():
            if only and name not in only and name != next(iter(methods)):
                continue
            stage = 2 if "rl" in own else 1
            about = {"seed": seed, "teacher_steps": 4, **own}
            if kind == "aligned":
                about |= {"init_student": str(first)}
            elif stage == 1:
                about |= {"stage2_steps": 0}
            else:
                about |= {"stage1_steps": 0}

            place = root / f"{kind}-{name.replace(', ', '-').replace(' ', '_')}"
            folder = updated(place, usual, stage, about)
            seconds, _ = cost(folder, stage)
            allowed = allowed or seconds
            yield f"{name}, {usual} updates", folder, stage
            updates = round(usual * allowed / seconds)
            if abs(updates - usual) > 0.1 * usual:
                yield f"{name}, as long", updated(place, updates, stage, about), stage


def measure(root: Path, seeds: list[int], only: set[str]) -> Cells:
    """Rows of the table, each with one evaluation per seed."""
    rows: Cells = {}
    for seed in seeds:
        found = {title: (folder, stage) for title, folder, stage in cells(root, seed, only)}
        places = {title: folder for title, (folder, _) in found.items()}
        both = {"student": root / f"stage1-seed{seed}", "teacher": Path("teacher")}  # that of the run
        steps = ["--num_inference_steps", "28", "4"]
        teachers = measured(root / f"methods-teacher-seed{seed}", both, *steps, seed=seed)
        for title in ("teacher-28", "teacher-4"):
            rows.setdefault(title.replace("-", ", ") + " steps", []).append(teachers[title])
        for title, values in measured(root / f"methods-seed{seed}", places, seed=seed).items():
            seconds, memory = cost(*found[title])
            rows.setdefault(title, []).append(values | {"seconds": seconds, "memory": memory})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="rows, beside the first of each kind")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/digits-table"))
    args = parser.parse_args()
    if unknown := set(args.only) - DISTILLED.keys() - ALIGNED.keys():
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join([*DISTILLED, *ALIGNED])}")
    print(markdown(measure(args.output_dir, args.seeds, set(args.only)), COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
