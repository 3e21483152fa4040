"""Trains a few steps with each `--shard`, and prints their time, their memory, and whether they train the same student.

    python examples/launch/check.py --processes 8 --config examples/sd35l/refl.yaml --model MODEL --prompts prompts.txt

All flags but the first are those of dmdr-train. On GPUs it exits with 1 if a run takes 15 % more or less memory than
`--dry_run` says, and anywhere if a run fails or another student comes out of it. For one machine.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from dmdr.dry_run.estimate import estimate
from dmdr.run.pace import GIB
from dmdr.settings.parse import parse

STEPS = 6
SHORT = {
    "stage1_steps": STEPS, "stage2_steps": STEPS, "logging_steps": 1, "report_to": "none", "num_eval_samples": 0,
    "sample_steps": 0, "save_steps": 0, "sample_images": 1, "teacher_steps": 1,
}  # fmt: skip
WARM_UP = 2  # steps of a stage that are not timed
MEMORY = 0.15
WEIGHTS = 1e-2  # of the norm of a student's change; bf16 rounds sums in another order


def trained(folder: Path, processes: int, flags: list[str]) -> list[dict[str, Any]]:
    """The log of a run.

    Raises:
        SystemExit: If it fails; torchrun has said why.
    """
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m"]
    if subprocess.run([*program, "dmdr.cli.train", *flags, "--output_dir", str(folder)]).returncode:
        raise SystemExit(f"{folder.name} failed")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def expected(processes: int, flags: list[str]) -> dict[str, float]:
    """GiB of one process by `--dry_run`, by phase."""
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    found = estimate(parse([*flags, "--dry_run"]))
    return {phase: sum(parts.values()) / GIB for phase, parts in found.phases.items()}


def student(folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights in float32."""
    (file,) = (folder / "student").rglob("*.safetensors")
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of two students, relative to the norm of the first."""
    apart = sum(float((tensor - other[name]).square().sum()) for name, tensor in one.items())
    return float((apart / sum(float(tensor.square().sum()) for tensor in one.values())) ** 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count())
    parser.add_argument("--output_dir", type=Path, default=Path("runs/check"))
    args, given = parser.parse_known_args()
    flags = [*given, *(word for name, value in SHORT.items() for word in (f"--{name}", str(value)))]
    shutil.rmtree(args.output_dir, ignore_errors=True)
    wrong, first = [], None
    print(
        "| `--shard` | stage | s/step | GiB, peak | GiB, `--dry_run` | student apart from the first |\n"
        + "|---" * 6
        + "|"
    )
    for shard in ("1", "node", "all"):
        own, folder = [*flags, "--shard", shard], args.output_dir / f"shard-{shard}"
        said = expected(args.processes, own)
        lines = defaultdict(list)
        for line in trained(folder, args.processes, own):
            lines[line["stage"]].append(line)
        first = first or student(folder)
        apart = distance(first, student(folder))
        if apart > WEIGHTS:
            wrong.append(f"--shard {shard} trains another student")
        for stage, found in lines.items():
            peak, dry = max(line["peak_memory_gib"] for line in found), said[f"stage {stage}"]
            seconds = median(line["seconds"] for line in found[WARM_UP:])
            print(f"| {shard} | {stage} | {seconds:.3f} | {peak:.2f} | {dry:.2f} | {apart:.1e} |", flush=True)
            if torch.cuda.is_available() and abs(peak - dry) > MEMORY * dry:
                wrong.append(f"--shard {shard} takes {peak:.2f} GiB in stage {stage}, but --dry_run says {dry:.2f}")
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
