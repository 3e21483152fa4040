"""Shared by all commands: errors in one line, exit codes, quiet libraries, rewards."""

import argparse
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dmdr
from dmdr.errors import ConfigError, Refusing, TrainingError, printable

if TYPE_CHECKING:
    import torch

    from dmdr.prompts import Row
    from dmdr.rewards import Rewards
    from dmdr.settings.chosen import Chosen
    from dmdr.settings.fields import RewardFlags


# A disk, or the machine, that is at its end; these errors seldom name a file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class CommandParser(Refusing, argparse.ArgumentParser):
    """A parser, and its subcommands', whose errors are one line and which guesses no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)


def command(function: Callable[[list[str]], None]) -> int:
    """Run a command on the process's arguments.

    Returns:
        The exit code: 0; 2 and one line for bad input, a place that cannot be used included; 1 and one line for a
        failure that the run foresaw, or a full disk; 130 after Ctrl-C. Anything else is a bug of ours and keeps its
        traceback.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # where the first step is skipped
    try:
        try:
            function(sys.argv[1:])
        finally:
            sys.stdout.flush()  # here, where it may fail in one line
    except BrokenPipeError:  # who reads has seen enough
        _forget_output()
        return 0
    except OSError as error:
        if not _is_of_the_machine(error):
            raise
        _forget_output()
        where = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
        say(f"{error.strerror}{where}")
        return 1 if error.errno in FULL else 2
    except (ConfigError, TrainingError) as error:
        say(str(error))
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _forget_output() -> None:
    """What could not be written stays in the buffer, of which Python would complain when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_of_the_machine(error: OSError) -> bool:
    """Whether a disk is full or a place cannot be used, rather than that we have made a mistake.

    A place is one that the user could have named: none of our own package.
    """
    if error.errno in FULL:
        return True
    named = isinstance(error.filename, str | bytes) and error.errno is not None
    return named and not Path(os.fsdecode(error.filename)).absolute().is_relative_to(Path(dmdr.__file__).parent)


def say(text: str) -> None:
    """A line on stderr, after the command's name."""
    print(f"{_name()}: {printable(' '.join(text.split()))}", file=sys.stderr)


class Line(logging.Formatter):
    """Of log lines, which hold names and answers of strangers."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _name() -> str:
    """What the command is called, by `python -m` too."""
    name = os.path.basename(sys.argv[0])
    return f"dmdr-{name.removesuffix('.py').replace('_', '-')}" if name.endswith(".py") else name


def open_rewards(
    flags: "RewardFlags", chosen: "Sequence[Chosen]", rows: "Sequence[Row]" = ()
) -> "tuple[Rewards, torch.device]":
    """The rewards that a command scores with, loaded, and their device; they resize as published evaluations do.

    Args:
        flags, chosen: What the user asks for.
        rows: Prompt rows; none where they are not known yet.

    Raises:
        ConfigError: If the device, the model or a checkpoint cannot be used.
    """
    from dmdr.run.job import build_rewards
    from dmdr.settings import registry
    from dmdr.types import dtype_of

    device = find_device(flags.device)
    model = registry.load("models", flags.model)() if flags.model else None
    rewards = build_rewards(chosen, model, rows, resize="exact")
    rewards.prepare(device, dtype_of(flags.dtype))
    return rewards, device


def find_device(name: str) -> "torch.device":
    """The device of this name; `auto` is the accelerator, or else the CPU.

    Raises:
        ConfigError: If it is not there.
    """
    import torch

    if name == "auto":
        usable = torch.accelerator.is_available() and not torch.backends.mps.is_available()  # which has no float64
        name = str(torch.accelerator.current_accelerator()) if usable else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # meta tensors have no values
        return probe.device
    except Exception as error:  # each kind of device has its own
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from error
