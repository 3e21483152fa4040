"""The main table and the picture of the digits: distil the digits, then go on with DMD only, jointly, and with RL only.

    python examples/digits/table.py                  # seeds 0-2; about half an hour on two cores
    python examples/digits/table.py --seeds 0        # one seed

Every cell is an ordinary run folder under --output_dir, which `dmdr-eval` measures; what is there is not repeated.
Prints the table in markdown and each gate with its figures, writes `hacking.png`, and exits with 1 if a gate does not
hold. Gates look at what each run measured itself, where the teacher has the student's sampler and noise.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dmdr import images, train
from dmdr.cli import eval as eval_command
from dmdr.run.drawing import open_export
from dmdr_digits import Digits

REWARD = "reward/total"
REWARDS = "0.3*hps+0.3*clip"  # the recipe's
ONE_STEP = 300  # updates; a student of one step learns more slowly than the recipe's, whose stage 1 has 140
METRICS = {
    "accuracy": "class accuracy",
    "frechet_distance": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
    REWARD: "reward",
}
TITLES = {  # rows of the table, in order, by what `dmdr-eval` calls them
    "teacher-28": "teacher, 28 steps",
    "teacher-4": "teacher, 4 steps",
    **{name: name for name in ("stage 1 (DMD), 4 steps", "+ DMD only", "+ joint DMD and ReFL", "+ ReFL only")},
    "teacher-1": "teacher, 1 step",
    "stage 1 (DMD), 1 step": "stage 1 (DMD), 1 step",
}
Columns = dict[str, dict[str, float]]
Cells = dict[str, list[dict[str, float]]]


def trained(folder: Path, **settings: Any) -> Path:
    """The folder of a run, trained unless it is there."""
    if not (folder / "report.html").exists():
        settings = {"num_eval_samples": 2000} | settings | {"overwrite_output_dir": folder.exists()}
        train(model="digits", output_dir=str(folder), **settings)
    return folder


def measured(output: Path, places: Mapping[str, Path], *flags: str, seed: int, reward: str = REWARDS) -> Columns:
    """What `dmdr-eval` says of 2,000 images each, by name.

    Args:
        output: Folder of its tables.
        places: Run folders by name.
        flags: Further ones of the command.
        seed: Of the noise.
        reward: The rewards that the table has.
    """
    about = ["--benchmark=judge", "--model=digits", "--images_per_prompt=200", "--batch_size=200"]
    where = [f"--reward={reward}", f"--seed={seed}", f"--output_dir={output}"]
    eval_command.run([*(f"{name}={place}" for name, place in places.items()), *about, *where, *flags])
    models = json.loads((output / "judge.json").read_text())["models"]
    return {
        name: {metric: figure["value"] for metric, figure in only["figures"].items()}
        for name, (only,) in models.items()
    }


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds(folder: Path, stage: int) -> float:
    """What the updates of a stage took, by the log."""
    own = [line for line in logged(folder) if line["stage"] == stage]
    mean: float = sum(line["seconds"] for line in own) / len(own)
    return mean * (own[-1]["step"] - own[0]["step"] + 1)


def own_columns(folder: Path) -> Columns:
    """What a run measured itself, by column; of stage 2 also when the guard began to see a hacked reward."""
    columns: Columns = json.loads((folder / "evaluation.json").read_text())["columns"]
    if "stage 2" in columns:
        columns["stage 2"]["hacked"] = hacked_since(folder)
    return columns


def hacked_since(folder: Path) -> float:
    """The update at which the run's guard began to see a hacked reward; 0 if it never did."""
    file = folder / "hacking.json"
    found = json.loads(file.read_text()) if file.exists() else []
    return float(next((each["step"] for each in found if each["text"]), 0))


def measure(root: Path, seeds: list[int]) -> tuple[Cells, Cells]:
    """Rows of the table, each with one evaluation per seed, and the rows that the gates look at: the runs' own."""
    rows: Cells = {}
    own: Cells = {}
    for seed in seeds:
        first = trained(root / f"stage1-seed{seed}", seed=seed, stage2_steps=0)
        second = {"seed": seed, "init_student": str(first), "eval_steps": 20}
        runs = {
            "stage 1 (DMD), 4 steps": first,
            "+ DMD only": trained(root / f"dmd-seed{seed}", **second, rl="none"),
            "+ joint DMD and ReFL": trained(root / f"joint-seed{seed}", **second),
            "+ ReFL only": trained(root / f"rl-seed{seed}", **second, dmd_weight=0.0),
            "stage 1 (DMD), 1 step": trained(
                root / f"one-step-seed{seed}", seed=seed, stage1_steps=ONE_STEP, stage2_steps=0, num_inference_steps=1
            ),
        }
        found = measured(root / f"measured-seed{seed}", runs, seed=seed)
        both = {"student": first, "teacher": Path("teacher")}  # that of the run
        steps = ["--num_inference_steps", "28", "4", "1"]
        found |= measured(root / f"teacher-seed{seed}", both, *steps, seed=seed)
        for name, title in TITLES.items():
            rows.setdefault(title, []).append(found[name])
        for name, folder in runs.items():
            columns = own_columns(folder)
            own.setdefault(name, []).append(columns.get("stage 2") or columns["stage 1"])
        for steps_of, folder in (("4 steps", first), ("1 step", runs["stage 1 (DMD), 1 step"])):
            own.setdefault(f"teacher, {steps_of}", []).append(own_columns(folder)[f"teacher, {steps_of}"])
    return rows, own


def markdown(rows: Cells, metrics: dict[str, str] = METRICS) -> str:
    """Mean over the seeds, and half their range if there are several; nothing where a row was not measured."""
    lines = ["| | " + " | ".join(metrics.values()) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, seeds in rows.items():
        texts = []
        for metric in metrics:
            values = [seed[metric] for seed in seeds if metric in seed]
            if not values:
                texts.append("")
                continue
            mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
            digits = 1 if max(map(abs, values)) >= 2 else 3
            texts.append(f"{mean:.{digits}f}" + f" ± {spread:.{digits}f}" * (len(values) > 1))
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def gates(rows: Cells) -> list[tuple[bool, str]]:
    """What must hold for every seed, as (holds, text with the figures)."""
    found = []

    def gate(text: str, values: list[float], holds: list[bool]) -> None:
        found.append((all(holds), f"{text}: " + ", ".join(f"{value:.3f}" for value in values)))

    def each(row: str, metric: str) -> list[float]:
        return [seed[metric] for seed in rows[row]]

    def ratio(row: str, base: str) -> list[float]:
        pairs = zip(each(row, "frechet_distance"), each(base, "frechet_distance"), strict=True)
        return [a / b for a, b in pairs]

    first, joint, rl = "stage 1 (DMD), 4 steps", "+ joint DMD and ReFL", "+ ReFL only"
    values = ratio(first, "teacher, 4 steps")
    gate("4 steps: Frechet distance at most 0.6 x the undistilled teacher's", values, [v <= 0.6 for v in values])
    values = each(first, "recall")
    gate("4 steps: recall at least 0.70", values, [v >= 0.70 for v in values])
    values = ratio("stage 1 (DMD), 1 step", "teacher, 1 step")
    gate("1 step: Frechet distance at most 0.15 x the undistilled teacher's", values, [v <= 0.15 for v in values])
    values = each("stage 1 (DMD), 1 step", "recall")
    gate("1 step: recall at least 0.5", values, [v >= 0.5 for v in values])
    values = [a - b for a, b in zip(each(joint, REWARD), each("+ DMD only", REWARD), strict=True)]
    gate("joint: reward above DMD only by at least 0.02", values, [v >= 0.02 for v in values])
    values = [a - b for a, b in zip(each(joint, "frechet_distance"), each(first, "frechet_distance"), strict=True)]
    limits = [max(0.5 * base, 8.0) for base in each(first, "frechet_distance")]
    holds = [v <= limit for v, limit in zip(values, limits, strict=True)]
    gate("joint: Frechet distance at most 1.5 x stage 1's, or 8 above it", values, holds)
    values = each(joint, "recall")
    gate("joint: recall at least 0.65", values, [v >= 0.65 for v in values])
    values = [a - b for a, b in zip(each(rl, REWARD), each(joint, REWARD), strict=True)]
    gate("RL only: reward above the joint run's", values, [v > 0 for v in values])
    values = ratio(rl, first)
    gate("RL only: Frechet distance at least 3 x stage 1's", values, [v >= 3 for v in values])
    values = each(rl, "recall")
    gate("RL only: recall at most 0.3", values, [v <= 0.3 for v in values])
    values = each(rl, "hacked")
    gate("RL only: the guard sees a hacked reward, since update", values, [v > 0 for v in values])
    values = each(joint, "hacked")
    gate("joint: the guard sees none", values, [v == 0 for v in values])
    return found


def picture(root: Path, seed: int, path: Path) -> None:
    """Three grids (stage 1, joint, RL only) over the curves of the reward and of the Frechet distance."""
    import matplotlib.figure

    runs = {"stage 1 (DMD)": "stage1", "joint DMD and ReFL": "joint", "ReFL only": "rl"}
    figure = matplotlib.figure.Figure(figsize=(12, 7.2), layout="constrained", dpi=110)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    prompts = [row["prompt"] for row in Digits().prompts()] * 8
    for axes, (title, name) in zip(top.subplots(1, 3), runs.items(), strict=True):
        student = root / f"{name}-seed{seed}" / "student"
        about = json.loads((student / "sampling.json").read_text())
        paths = open_export(student, about).draw([{"prompt": prompt} for prompt in prompts], 0, root / "drawn" / name)
        pixels = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255
        axes.imshow(images.image_grid(torch.tensor(pixels).permute(0, 3, 1, 2), columns=10), interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")
    curves = {"DMD only": ("dmd", "C0"), "joint": ("joint", "C2"), "ReFL only": ("rl", "C3")}
    for axes, key, label in zip(
        bottom.subplots(1, 2), ("total", "frechet_distance"), ("reward", "Frechet distance"), strict=True
    ):
        for title, (name, colour) in curves.items():
            lines = (root / f"{name}-seed{seed}" / "metrics.jsonl").read_text().splitlines()
            points = [(line["step"], line[f"eval/{key}"]) for line in map(json.loads, lines) if f"eval/{key}" in line]
            start = json.loads((root / f"stage1-seed{seed}" / "evaluation.json").read_text())["columns"]["stage 1"]
            points = [(0, start[REWARD if key == "total" else key]), *points]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=title)
        axes.set_xlabel("student updates of stage 2")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/digits-table"))
    args = parser.parse_args()
    rows, own = measure(args.output_dir, args.seeds)
    print(markdown(rows) + "\n")
    results = gates(own)
    for holds, text in results:
        print(f"{'holds ' if holds else 'FAILED'}  {text}")
    picture(args.output_dir, args.seeds[0], args.output_dir / "hacking.png")
    return 0 if all(holds for holds, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
