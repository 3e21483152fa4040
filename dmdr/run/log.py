"""`metrics.jsonl` of a run, the same to its trackers, and messages beside the progress bar."""

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
from accelerate.tracking import TensorBoardTracker
from PIL.Image import Image
from tqdm.contrib.logging import logging_redirect_tqdm

from dmdr import images
from dmdr.errors import TrainingError, one_line
from dmdr.run.checkpoint import Progress
from dmdr.run.device import failing_together
from dmdr.settings.fields import Config
from dmdr.settings.trackers import trackers_of

logger = logging.getLogger("dmdr")


class RunLog:
    """The log of a run.

    Args:
        folder: The run folder, in which TensorBoard's is `tensorboard/`.
        config: Its trackers, and their names for the run.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, config: Config) -> None:
        self.folder, self.accelerator, self.config = folder, accelerator, config
        self.file, self.trackers = folder / "metrics.jsonl", trackers_of(config.report_to)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start the trackers, in every process, and give them the run's settings; those that are no number as text.

        Raises:
            TrainingError: In every process, if one does not start: it may want a login, or a server.
        """
        config, name = self.config, self.config.run_name
        plain = (bool, int, float, str, type(None))
        values = {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}
        kwargs = {key: {each.run_name: name} for key, each in self.trackers.items() if each.run_name and name}
        self.accelerator.log_with = [  # TensorBoard keeps its files in a folder of the project's name
            TensorBoardTracker("tensorboard", self.folder) if key == "tensorboard" else key for key in self.trackers
        ]
        with failing_together():
            try:
                self.accelerator.init_trackers(config.tracker_project_name, values, kwargs)
            except Exception as error:  # each has its own
                raise TrainingError(f"--report_to {config.report_to}: {one_line(error)}") from error
        silent = [key for key, each in self.trackers.items() if each.images is None]
        if silent and self.accelerator.is_main_process:
            logger.warning("--report_to: no image grids for %s, whose tracker takes none", ", ".join(silent))

    def forget_after(self, step: int) -> None:
        """Drop the lines of later updates, and torn ones; of a run that is resumed."""
        if self.file.exists():
            lines = [line for line in self.file.read_text().splitlines() if _step_of(line) <= step]
            images.write_atomically(self.file, "".join(f"{line}\n" for line in lines).encode())

    def show(self, pictures: Mapping[str, Image], step: int) -> None:
        """Give the trackers pictures by name; of the main process."""
        if not pictures:
            return
        batches = {name: np.asarray(picture)[None] for name, picture in pictures.items()}
        for key, each in self.trackers.items():
            if each.images is not None:
                tracker: Any = self.accelerator.get_tracker(key)
                tracker.log_images(batches, step=step, **each.images)

    def write(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Add a line; what is not finite is null."""
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
