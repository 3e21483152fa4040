"""`metrics.jsonl` of a run, and the same to the tracker."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from dmdr import images
from dmdr.run.checkpoint import Progress


class RunLog:
    """The log of a run.

    Args:
        folder: The run folder.
        report_to: accelerate's tracker, or "none".
    """

    def __init__(self, folder: Path, accelerator: Accelerator, report_to: str) -> None:
        self.file, self.accelerator, self.report_to = folder / "metrics.jsonl", accelerator, report_to

    def begin(self) -> None:
        """Start the tracker, in every process."""
        if self.report_to != "none":
            self.accelerator.init_trackers("tensorboard" if self.report_to == "tensorboard" else "dmdr")

    def forget_after(self, step: int) -> None:
        """Drop the lines of later updates, and torn ones; of a run that is resumed."""
        if self.file.exists():
            lines = [line for line in self.file.read_text().splitlines() if _step_of(line) <= step]
            images.write_atomically(self.file, "".join(f"{line}\n" for line in lines).encode())

    def write(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Add a line; what is not finite is null."""
        if self.report_to != "none":
            self.accelerator.log(dict(values), step=progress.total)
        if self.accelerator.is_main_process:
            with self.file.open("a") as log:
                finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
                log.write(json.dumps({"step": progress.total, "stage": progress.stage, **finite}) + "\n")


def _step_of(line: str) -> float:
    """The step of a line of the log; infinity for one that a crash has torn."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
