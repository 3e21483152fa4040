"""What can go wrong, by exit code."""


class ConfigError(ValueError):
    """Bad input: one line that says what, where and what to do. Exit code 2; nothing was written."""


class TrainingError(RuntimeError):
    """A failure in a running training: saved what could be saved. Exit code 1."""
