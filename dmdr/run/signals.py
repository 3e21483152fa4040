"""Ctrl-C and SIGTERM: the run ends after the current update, in all processes."""

import signal
import threading
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator


class Interrupts:
    """The signals that arrive while this context is open.

    Attributes:
        signal: The first one, or None. A second one ends the process at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal: int | None = None

    def __enter__(self) -> "Interrupts":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other handle signals
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # Not the handler before ours: background jobs of a shell start with SIGINT ignored.
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def arrived(self) -> bool:
        """Whether any process got one: they all leave after the same step."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(self.signal or 0, device=self.accelerator.device)
            self.signal = int(self.accelerator.gather(flag[None]).max()) or None
        return self.signal is not None

    def leave(self) -> NoReturn:
        """End as the signal asks: Ctrl-C exits with 130, SIGTERM with 143."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
