"""What every command does with an error: one line for the user's and the machine's, a traceback for ours."""

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dmdr
from dmdr.cli import common, eval, sample, train
from dmdr.errors import ConfigError, TrainingError, not_exiting, one_line, printable

Said = Callable[[BaseException], tuple[int, str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Exit code and line of a command that raises."""
    monkeypatch.setattr(sys, "argv", ["/bin/dmdr-sample"])

    def said(error: BaseException) -> tuple[int, str]:
        def fail(arguments: list[str]) -> None:
            raise error

        code = common.command(fail)
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return code, err.strip().removeprefix("dmdr-sample: ")

    return said


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a\x1b[31m\nb\u202ec"), 2, "a\\x1b[31m b\\u202ec"),
        (TrainingError("a\x9b\r\x07"), 1, "a\\x9b \\x07"),
        (PermissionError(errno.EACCES, "Permission denied", "a/\x1b.png"), 2, "Permission denied: a/\\x1b.png"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), 2, "No such file or directory: gone"),
        (OSError(errno.EROFS, "Read-only file system", b"x"), 2, "Read-only file system: x"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), 1, "Disk quota exceeded: x"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files"),
    ],
)
def test_errors_of_users_and_machines_are_one_line(said: Said, error: BaseException, code: int, line: str) -> None:
    assert said(error) == (code, line)


@pytest.mark.parametrize(
    "error",
    [
        OSError("a library's own"),
        OSError(errno.EBADF, "Bad file descriptor"),
        FileNotFoundError(errno.ENOENT, "No such file", str(Path(dmdr.__file__).parent / "templates" / "gone")),
        ValueError("x"),
    ],
)
def test_a_bug_keeps_its_traceback(said: Said, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        said(error)
    assert caught.value is error


@pytest.mark.parametrize(("place", "code", "said"), [("/dev/full", 1, "-c: No space left on device\n"), ("", 0, "")])
def test_a_reader_that_has_seen_enough_and_a_full_disk(place: str, code: int, said: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(place, "w") if place else os.fdopen(write, "w") as output:
        script = "import sys; from dmdr.cli.common import command; sys.exit(command(lambda arguments: print('x')))"
        done = subprocess.run([sys.executable, "-c", script], stdout=output, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def test_log_lines_are_escaped() -> None:
    record = logging.LogRecord("dmdr", logging.INFO, "", 0, "of %s\nand", ("\x1b[2J\u2066",), None)
    assert common.Line("%(message)s").format(record) == "of \\x1b[2J\\u2066\nand"
    assert printable("naïve 😀\t雪") == "naïve 😀\t雪"


def test_strangers_do_not_end_the_process() -> None:
    for error in (SystemExit(3), GeneratorExit()):
        with pytest.raises(TrainingError, match=f"^it failed: {one_line(error)}$"), not_exiting("it"):
            raise error
    with pytest.raises(KeyboardInterrupt), not_exiting("it"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("command", [train, sample, eval])
def test_a_place_that_cannot_be_looked_at(
    command: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def locked(path: Path, *arguments: object, **named: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    arguments = {
        train: ["--model", "toy", "--output_dir", "locked/run"],
        sample: ["locked/student", "--prompt", "a"],
        eval: ["locked", "--reward", "toy", "--prompts", "locked/a.txt"],
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dmdr", *arguments[command]])  # type: ignore[index]
    for name in ("is_file", "is_dir", "exists", "stat", "iterdir"):
        monkeypatch.setattr(Path, name, locked)
    with pytest.raises(SystemExit) as end:
        command.main()  # type: ignore[attr-defined]
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "Permission denied" in err
