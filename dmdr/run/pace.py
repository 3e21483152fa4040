"""Time, speed and memory of a run, for its log and its progress bar."""

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path

import torch

from dmdr.training.phases import Clock, phase

GIB = 2**30
MUCH = 0.1  # of a run's time, for image grids and evaluations
SUMS = "unscored/"  # counts, of which none between two lines may be lost


class Pace:
    """What there is to say of the updates since the last line of the log, and of those to come.

    Attributes:
        clock: Runs during the training of a stage.
        sums: Counts since the last line, by name; a checkpoint keeps them.
        evaluation: Seconds that image grids and evaluations have taken, those outside of the training included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.clock = device, Clock(device)
        self._updates = self._images = 0
        self._seconds = self._in_updates = self.evaluation = 0.0
        self._opened = time.perf_counter()
        self.sums: Counter[str] = Counter()
        self.begin_stage()

    def begin_stage(self) -> None:
        """Updates may take another time from here on."""
        self._began, self._done, self._in_updates = time.perf_counter(), 0, 0.0

    def add(self, values: Mapping[str, float], seconds: float, images: int) -> None:
        """Count an update in.

        Args:
            values: What it logs.
            images: Rolled out, by all processes.
        """
        self._updates, self._images, self._seconds = self._updates + 1, self._images + images, self._seconds + seconds
        self.sums.update({name: value for name, value in values.items() if name.startswith(SUMS)})
        self._done, self._in_updates = self._done + 1, self._in_updates + seconds

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """An image grid or an evaluation goes on inside."""
        started = time.perf_counter()
        with phase("evaluation"):
            yield
        self.evaluation += time.perf_counter() - started

    def evaluated(self) -> str:
        """Seconds of image grids and evaluations, and of the whole run, in this process."""
        whole = time.perf_counter() - self._opened
        return f"{self.evaluation:.0f} of {whole:.0f} seconds ({self.evaluation / whole:.0%})"

    def too_often(self, seconds: float, flag: str, every: int) -> str:
        """Whether something takes much of the training's time, in words; "" if it does not.

        Args:
            seconds: Of one time.
            flag: The setting that says how often it is done.
            every: Updates between two times; there has been one in this stage.
        """
        update = self._in_updates / self._done
        share, enough = seconds / (seconds + every * update), ceil((1 / MUCH - 1) * seconds / update)
        text = f"take {share:.0%} of the training's time; --{flag} {enough} would make it {MUCH:.0%}"
        return text if share > MUCH else ""

    def seconds_left(self, updates: int) -> float:
        """Of a run with so many updates to come, if all go on as those of this stage, evaluations and all."""
        return updates * (time.perf_counter() - self._began) / max(self._done, 1)

    def line(self, updates_left: int) -> dict[str, float]:
        """The means since the last line, for this one; there is an update in it."""
        values = {
            **self.sums,
            "seconds": self._seconds / self._updates,
            "samples_per_second": self._images / self._seconds,
            "seconds_left": self.seconds_left(updates_left),
            "peak_memory_gib": peak_memory(self.device) / GIB,
            **{f"time/{name}": share for name, share in self.clock.read().items()},
        }
        self._updates = self._images = 0
        self._seconds = 0.0
        self.sums.clear()
        return values


def peak_memory(device: torch.device) -> int:
    """The most memory so far in bytes: of tensors on a GPU, else of the process (its resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # in Linux, where getrusage also counts the process that has started this one
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
