"""Where the time of a training goes, phase by phase: a clock that makes neither the host nor a GPU wait."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

PHASES = ("rollout", "fake", "direction", "reward", "student", "communication", "evaluation")
OTHER = "other"  # log, checkpoints, and whatever else is between the phases
SETTLE_AT = 4096  # marks of a GPU that are kept before those that it has passed are added up

_running: ContextVar["Clock | None"] = ContextVar("_running", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time inside to this phase, but for that of phases within; also a decorator.

    Without a running clock, nothing happens.
    """
    clock = _running.get()
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()


def gather(accelerator: Accelerator, values: Tensor) -> Tensor:
    """`accelerator.gather`, which is communication if there are several processes; [B, ...] to [N, ...]."""
    if accelerator.num_processes == 1:
        return accelerator.gather(values)
    with phase("communication"):
        return accelerator.gather(values)


class Clock:
    """Runs while this context is open, in the thread that opened it.

    On a GPU it leaves events in the stream, between which the GPU measures, so that a phase gets the time of its own
    kernels whenever they run; elsewhere it reads the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._phases: list[str] = []
        self._marks: list[tuple[str, Any]] = []  # of a GPU: an event, and the phase that ended there
        self._last: Any = None
        self._seconds: Counter[str] = Counter()

    def __enter__(self) -> "Clock":
        self._phases, self._last = [OTHER], self._now()
        self._token = _running.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._mark()
        self._settle()
        _running.reset(self._token)

    def enter(self, name: str) -> None:
        """A phase begins within the present one."""
        self._mark()
        self._phases.append(name)

    def leave(self) -> None:
        """It ends."""
        self._mark()
        self._phases.pop()

    def read(self) -> dict[str, float]:
        """The share of each phase, and of OTHER, in the time since it was last read; 0 .. 1. Waits for a GPU."""
        self._mark()
        self._settle(wait=True)
        total = sum(self._seconds.values())
        shares = {name: self._seconds[name] / total if total else 0.0 for name in (*PHASES, OTHER)}
        self._seconds.clear()
        return shares

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _mark(self) -> None:
        """The present phase ends here."""
        now = self._now()
        if not self._gpu:
            self._seconds[self._phases[-1]] += now - self._last
            self._last = now
            return
        self._marks.append((self._phases[-1], now))
        if len(self._marks) % SETTLE_AT == 0:
            self._settle()

    def _settle(self, *, wait: bool = False) -> None:
        """Add up what the GPU has passed, or all."""
        if wait and self._marks:
            self._marks[-1][1].synchronize()
        passed = 0
        for name, event in self._marks:
            if not event.query():
                break
            self._seconds[name] += self._last.elapsed_time(event) / 1000
            self._last, passed = event, passed + 1
        del self._marks[:passed]
