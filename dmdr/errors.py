"""What can go wrong, by exit code."""

from typing import NoReturn


class ConfigError(ValueError):
    """Bad input: one line that says what, where and what to do. Exit code 2; nothing was written."""


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


class Refusing:
    """Mixin of an argparse parser: what is wrong with the arguments is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments, as argparse asks for.

        Raises:
            ConfigError: Always, with what argparse says.
        """
        raise ConfigError(message.removeprefix("argument "))
