"""`metrics.jsonl` of a run, the same to the tracker, and messages beside the progress bar."""

import json
import logging
import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL.Image import Image
from tqdm.contrib.logging import logging_redirect_tqdm

from dmdr import images
from dmdr.run.checkpoint import Progress

logger = logging.getLogger("dmdr")
TAKES_BATCHES = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}  # of images; other trackers take them otherwise


class RunLog:
    """The log of a run.

    Args:
        folder: The run folder.
        report_to: accelerate's tracker, or "none".
    """

    def __init__(self, folder: Path, accelerator: Accelerator, report_to: str) -> None:
        self.file, self.accelerator, self.report_to = folder / "metrics.jsonl", accelerator, report_to

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start the tracker, in every process, and give it the run's settings; those that are no number as text."""
        if self.report_to != "none":
            plain = (bool, int, float, str, type(None))
            config = {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}
            project = "tensorboard" if self.report_to == "tensorboard" else "dmdr"
            self.accelerator.init_trackers(project, config=config)

    def forget_after(self, step: int) -> None:
        """Drop the lines of later updates, and torn ones; of a run that is resumed."""
        if self.file.exists():
            lines = [line for line in self.file.read_text().splitlines() if _step_of(line) <= step]
            images.write_atomically(self.file, "".join(f"{line}\n" for line in lines).encode())

    def show(self, pictures: Mapping[str, Image], step: int) -> None:
        """Give the tracker pictures by name; of the main process."""
        if pictures and self.report_to in TAKES_BATCHES:
            batches = {name: np.asarray(picture)[None] for name, picture in pictures.items()}
            tracker: Any = self.accelerator.get_tracker(self.report_to)
            tracker.log_images(batches, step=step, **TAKES_BATCHES[self.report_to])

    def write(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Add a line; what is not finite is null."""
        if self.report_to != "none":
            self.accelerator.log(dict(values), step=progress.total)
        if self.accelerator.is_main_process:
            with self.file.open("a") as log:
                finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
                log.write(json.dumps({"step": progress.total, "stage": progress.stage, **finite}) + "\n")


def beside_the_bar() -> AbstractContextManager[None]:
    """Inside, what the `dmdr` logger prints goes above a progress bar, and not into it."""
    chain = (logger, logging.root)
    printing = [each for each in chain if any(map(_prints, each.handlers))]
    if not printing and logger.hasHandlers():  # into a file, say
        return nullcontext()
    return logging_redirect_tqdm(printing or [logger])


def _prints(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)


def _step_of(line: str) -> float:
    """The step of a line of the log; infinity for one that a crash has torn."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
