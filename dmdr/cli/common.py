"""Shared by all commands: errors in one line, exit codes, quiet libraries, rewards."""

import argparse
import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dmdr.errors import ConfigError, Refusing, TrainingError

if TYPE_CHECKING:
    import torch

    from dmdr.rewards import Rewards
    from dmdr.settings.chosen import Chosen
    from dmdr.settings.fields import RewardFlags


class CommandParser(Refusing, argparse.ArgumentParser):
    """A parser, and its subcommands', whose errors are one line and which guesses no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)


def command(function: Callable[[list[str]], None]) -> int:
    """Run a command on the process's arguments.

    Returns:
        The exit code: 0; 2 and one line for bad input; 1 and one line for a failure that the run foresaw; 130 after
        Ctrl-C. Anything else is a bug of ours and keeps its traceback.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # where the first step is skipped
    try:
        function(sys.argv[1:])
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):  # what no path that is given can be
            raise
        print(f"{_name()}: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    except (ConfigError, TrainingError) as error:
        print(f"{_name()}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 0
    return 0


def _name() -> str:
    """What the command is called, by `python -m` too."""
    name = os.path.basename(sys.argv[0])
    return f"dmdr-{name.removesuffix('.py').replace('_', '-')}" if name.endswith(".py") else name


def open_rewards(flags: "RewardFlags", chosen: "Sequence[Chosen]") -> "tuple[Rewards, torch.device]":
    """The rewards that a command scores with, loaded, and their device; they resize as published evaluations do.

    Raises:
        ConfigError: If the device, the model or a checkpoint cannot be used.
    """
    from dmdr.run.job import build_rewards
    from dmdr.settings import registry
    from dmdr.types import dtype_of

    device = find_device(flags.device)
    model = registry.load("models", flags.model)() if flags.model else None
    rewards = build_rewards(chosen, model, resize="exact")
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
