"""The digits' table of objectives: each jointly with DMD and alone, from one stage 1, in about the same time.

    python examples/digits/objectives.py             # seeds 0-2; about an hour and a half on one core, after table.py
    python examples/digits/objectives.py --seeds 0   # one seed

Every cell is an ordinary run folder under --output_dir, which it shares with table.py; finished ones are not repeated.
Prints two tables in markdown and whether each claim holds with its figures, and exits with 1 if one does not. Claims on
the first table look at what each run measured itself.
"""

import argparse
import sys
from pathlib import Path

from table import METRICS, REWARD, Cells, markdown, measured, own_columns, seconds, trained

# Updates of the joint run and of the objective alone that take as long as 60 of ReFL jointly; the table measures it.
STEPS = {
    "refl": (60, 218),
    "grpo": (50, 143),
    "dpo": (54, 185),
    "srpo": (62, 221),
    "nft": (55, 195),
    "rwr": (56, 224),
    "grpo+0.1*refl": (47, 101),
}
SIZE = "examples/digits/png_size.py:score"
AGGREGATIONS = ("normalize_then_sum", "sum_then_normalize")


def measure(root: Path, seeds: list[int]) -> tuple[Cells, Cells]:
    """Rows of the table, each with one evaluation per seed, and the rows that the gates look at: the runs' own."""
    rows: Cells = {}
    own: Cells = {}
    for seed in seeds:
        first = trained(root / f"stage1-seed{seed}", seed=seed, stage2_steps=0)
        runs, times = {"stage 1": first}, {"stage 1": 0.0}
        for rl, (joint, alone) in STEPS.items():
            for kind, steps, weight in (("joint", joint, 1.0), ("only", alone, 0.0)):
                settings = {"seed": seed, "rl": rl, "init_student": str(first), "stage2_steps": steps}
                folder = root / f"{rl.replace('*', 'x')}-{kind}-seed{seed}"
                name = f"{rl} + DMD" if kind == "joint" else f"{rl} only"
                runs[name] = trained(folder, **settings, teacher_steps=4, dmd_weight=weight)
                times[name] = seconds(folder, 2)
        for name, values in measured(root / f"objectives-seed{seed}", runs, seed=seed).items():
            rows.setdefault(name, []).append(values | {"seconds": times[name]})
        for name, folder in runs.items():
            columns = own_columns(folder)
            own.setdefault(name, []).append(columns.get("stage 2") or columns["stage 1"])
    return rows, own


def measure_aggregation(root: Path, seeds: list[int]) -> Cells:
    """GRPO on a network's reward near 0.6 and one of some hundred bytes, by way of adding them up."""
    rows: Cells = {}
    both = f"hps+{SIZE}"
    for seed in seeds:
        first = root / f"stage1-seed{seed}"
        settings = {"seed": seed, "init_student": str(first), "rl": "grpo", "stage2_steps": 50, "teacher_steps": 4}
        runs = {"DMD only": trained(root / f"size-none-seed{seed}", **settings | {"rl": "none", "reward": both})}
        for how in AGGREGATIONS:
            folder = root / f"size-{how}-seed{seed}"
            runs[how] = trained(folder, **settings, reward=both, multi_objective_aggregation=how)
        runs["the size alone"] = trained(root / f"size-alone-seed{seed}", **settings, reward=SIZE)
        for name, values in measured(root / f"aggregation-seed{seed}", runs, seed=seed, reward=both).items():
            rows.setdefault(name, []).append(values)
    return rows


def gates(rows: Cells) -> list[tuple[bool, str]]:
    """What must hold for each objective, as (holds, text with the figures)."""
    found = []
    base = {metric: [seed[metric] for seed in rows["stage 1"]] for metric in METRICS}
    for rl in STEPS:
        joint, alone = rows[f"{rl} + DMD"], rows[f"{rl} only"]
        found.append(
            (
                min(seed[REWARD] for seed in joint) > max(base[REWARD]),
                f"{rl}: every joint seed's reward above every stage 1's: "
                + ", ".join(f"{seed[REWARD]:.3f}" for seed in joint)
                + f" above {max(base[REWARD]):.3f}",
            )
        )
        distances = [seed["frechet_distance"] for seed in joint]
        limits = [max(1.5 * first, first + 8) for first in base["frechet_distance"]]
        holds = all(d <= limit for d, limit in zip(distances, limits, strict=True))
        pairs = ", ".join(f"{d:.1f} (at most {limit:.1f})" for d, limit in zip(distances, limits, strict=True))
        found.append((holds, f"{rl}: joint Frechet distance at most 1.5 x stage 1's, or 8 above it: {pairs}"))
        ratios = [a["frechet_distance"] / j["frechet_distance"] for a, j in zip(alone, joint, strict=True)]
        margins = [a[REWARD] - j[REWARD] for a, j in zip(alone, joint, strict=True)]
        texts = ", ".join(f"{r:.1f} x at {m:+.3f}" for r, m in zip(ratios, margins, strict=True))
        worse = all(r >= 2 and m >= -0.01 for r, m in zip(ratios, margins, strict=True))
        found.append(
            (worse, f"{rl}: without DMD the distance is at least twice the joint one's, reward no lower: {texts}")
        )
    return found


def aggregation_gates(rows: Cells) -> list[tuple[bool, str]]:
    """Whether the small reward is heard."""

    def gains(name: str, metric: str) -> list[float]:
        return [a[metric] - b[metric] for a, b in zip(rows[name], rows["DMD only"], strict=True)]

    apart, summed = (gains(how, "reward/hps") for how in AGGREGATIONS)
    size = gains("the size alone", f"reward/{SIZE}")
    return [
        (
            all(a > b + 0.02 for a, b in zip(apart, summed, strict=True)),
            "hps gains at least 0.02 more if each reward is normalised first: "
            + ", ".join(f"{a:+.3f} against {b:+.3f}" for a, b in zip(apart, summed, strict=True)),
        ),
        (
            all(gain > 0 for gain in size),
            "a function in a file moves its score: " + ", ".join(f"{g:+.1f}" for g in size),
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/digits-table"))
    args = parser.parse_args()
    rows, own = measure(args.output_dir, args.seeds)
    print(markdown(rows, METRICS | {"seconds": "seconds"}) + "\n")
    aggregation = measure_aggregation(args.output_dir, args.seeds)
    names = {"reward/hps": "hps", f"reward/{SIZE}": "minus bytes", "frechet_distance": METRICS["frechet_distance"]}
    print(markdown(aggregation, names) + "\n")
    results = [*gates(own), *aggregation_gates(aggregation)]
    for holds, text in results:
        print(f"{'holds ' if holds else 'FAILED'}  {text}")
    return 0 if all(holds for holds, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
