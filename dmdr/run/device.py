"""Device and precision of a process, and messages between the processes of a run."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from dmdr.errors import ConfigError, one_line

T = TypeVar("T")


def avoid_mps() -> None:
    """Stay on the CPU where the only accelerator is one without float64, in which times and weights are kept."""
    if torch.backends.mps.is_available() or not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def open_accelerator(mixed_precision: str, **options: Any) -> Accelerator:
    """An accelerator of this precision, whatever an earlier run of this process had.

    Raises:
        ConfigError: If the device cannot compute in it.
    """
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, **options)
    except ValueError as error:
        raise ConfigError(f"--mixed_precision {mixed_precision}: {one_line(error)}") from error
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":  # where accelerate has no autocast to it
        raise ConfigError("--mixed_precision fp16 needs a GPU; a CPU takes bf16 or no")
    return accelerator


def on_main_process(state: PartialState, decide: Callable[[], T]) -> T:
    """What the main process decided, or the ConfigError that it met, in every process."""
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            answer = [decide()]
        except ConfigError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], ConfigError):
        raise answer[0]
    decided: T = answer[0]
    return decided
