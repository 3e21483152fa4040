"""What the scripts here share: how a short run is started, and what two runs must have in common."""

import json
import sys
from pathlib import Path
from typing import Any

from safetensors import deserialize

from dmdr.run.checkpoint import checkpoints, damage

SETTINGS: dict[str, Any] = {
    "rl": "refl", "stage1_steps": 12, "stage2_steps": 8, "per_device_train_batch_size": 8, "save_steps": 2,
    "logging_steps": 1, "sample_steps": 5, "sample_images": 2, "num_eval_samples": 8, "teacher_steps": 2,
    "ema_decay": 0.9, "report_to": "none", "fake_updates": 1,
}  # fmt: skip
CLOCKED = ("seconds", "samples_per_second", "peak_memory_gib", "time/")


def command(folder: Path, *launcher: str, **settings: Any) -> list[str]:
    """The words that start a run in a folder.

    Args:
        launcher: Arguments of Python before the module of `dmdr-train`.
        settings: Beside, and in place of, `SETTINGS`.
    """
    flags = [word for name, value in (SETTINGS | settings).items() for word in (f"--{name}", str(value))]
    return [sys.executable, *launcher, "-m", "dmdr.cli.train", *flags, "--output_dir", str(folder)]


def going_on(folder: Path) -> dict[str, Any]:
    """The settings that resume a run, or begin it again where no checkpoint was saved."""
    if checkpoints(folder):
        return {"resume_from_checkpoint": "latest"}
    return {"overwrite_output_dir": True} if folder.exists() else {}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a log without what the clock says, which differs from run to run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith(CLOCKED)} for line in lines]


def damaged(folder: Path) -> list[str]:
    """What is wrong with the checkpoints of a run; each must be whole."""
    return [reason for path in checkpoints(folder) if (reason := damage(path))]


def outcome(folder: Path) -> dict[str, Any]:
    """What an undisturbed run and a disturbed one must have in common."""
    weights = sorted(folder.rglob("*.safetensors"))
    return {
        "log": log_of(folder),
        "weights": {path.relative_to(folder).as_posix(): dict(deserialize(path.read_bytes())) for path in weights},
        "evaluation": json.loads((folder / "evaluation.json").read_text()),
        "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")),
        "damaged": damaged(folder),
    }
