"""Signals that end a run after the current update, with a checkpoint, in all processes."""

import signal
import threading
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather

# Ctrl-C; kill, and launchers; SLURM before its time limit; a terminal that closes.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Interrupts:
    """The signals that arrive while this context is open.

    Attributes:
        signal: The one for which all processes leave, or 0.
    """

    def __init__(self, state: PartialState | Accelerator) -> None:
        self.state = state
        self.signal = self._own = 0  # the own one may arrive at any moment, also while processes agree

    def __enter__(self) -> "Interrupts":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other handle signals
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            numbers = [number for number in STOPPING if not (nohup and number == signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._own = number
        for other in self._before:
            # Not the handler before ours: background jobs of a shell start with SIGINT ignored.
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)

    def arrived(self) -> bool:
        """Whether any process got one: they all leave after the same step.

        A second signal of any kind ends a process at once.
        """
        self.signal = self._own
        if self.state.num_processes > 1:
            self.signal = int(gather(torch.tensor([self.signal], device=self.state.device)).max())
        return self.signal != 0

    def leave(self) -> NoReturn:
        """End with the exit code of a process that the signal ended: 130 after Ctrl-C, 143 after SIGTERM.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: After another signal.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
