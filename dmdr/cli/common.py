"""What all commands share: errors in one line, exit codes, quiet libraries."""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from dmdr.errors import ConfigError, TrainingError


def refuse(message: str) -> NoReturn:
    """`error` of a parser, in one line."""
    raise ConfigError(message)


def command(function: Callable[[list[str]], None]) -> int:
    """Run a command on the process's arguments.

    Returns:
        The exit code: 0; 2 and one line for bad input; 1 and one line for a failure that the run foresaw; 130 after
        Ctrl-C. Anything else is a bug of ours and keeps its traceback.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        function(sys.argv[1:])
    except (ConfigError, TrainingError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 0
    return 0
