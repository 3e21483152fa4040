"""What can go wrong, by exit code."""

import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class ConfigError(ValueError):
    """Bad input: one line that says what, where and what to do. Exit code 2; nothing was written."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # names of files and models may hold ends of lines


class MissingFile(ConfigError):
    """A file that an option names, or has by default, cannot be found or fetched.

    Attributes:
        what: Which file, and why.
        option: The option that can name one on this machine.
    """

    def __init__(self, what: str, option: str) -> None:
        super().__init__(f"{what}; download it and give its local path as '{option}'")
        self.what, self.option = what, option


class TrainingError(RuntimeError):
    """A running training failed; what could be saved is saved. Exit code 1."""


def one_line(error: BaseException) -> str:
    """The first line of what a library says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def printable(text: str) -> str:
    """Text for a terminal: what would move its cursor, colour it or turn its direction is written as an escape.

    Spaces and the ends of lines stay.
    """

    def harmless(letter: str) -> bool:
        return letter in "\n\t" or (unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") and letter not in BIDI)

    return "".join(letter if harmless(letter) else ascii(letter)[1:-1] for letter in text)


@contextmanager
def not_exiting(who: str) -> Iterator[None]:
    """A stranger's code may fail, but it is not for it to end the process, of which nothing could be saved then.

    Args:
        who: Whose code runs inside, for the message.

    Raises:
        TrainingError: If it raises SystemExit or GeneratorExit.
    """
    try:
        yield
    except (SystemExit, GeneratorExit) as error:
        raise TrainingError(f"{who} failed: {one_line(error)}") from error


class Refusing:
    """Mixin of an argparse parser: what is wrong with the arguments is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments, as argparse asks for.

        Raises:
            ConfigError: Always, with what argparse says.
        """
        raise ConfigError(re.sub(r"^argument (\S+)(?=:)", lambda found: _shortest(found[1]), message))


def _shortest(flag: str) -> str:
    """Of the spellings of a flag, which argparse joins with /, the one that users see in the help."""
    plain = [name for name in flag.split("/") if re.fullmatch(r"--\w+", name)]
    return min(plain, key=len, default=flag)
