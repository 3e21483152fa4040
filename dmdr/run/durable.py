"""Folders that are complete or absent, whenever the process is killed or the power fails."""

import os
import re
import shutil
from pathlib import Path

LEFTOVER = re.compile(r"\..+\.(partial|gone|\d+\.tmp)")  # what a killed process leaves behind


def begin(folder: Path) -> Path:
    """An empty folder to write in, beside the one that it will become (`finish`)."""
    partial = folder.with_name(f".{folder.name}.partial")
    delete(partial)
    partial.mkdir(parents=True)
    return partial


def finish(partial: Path, folder: Path) -> None:
    """Give the folder its name; one that has it already is deleted only when the new one is in its place."""
    mode = partial.stat().st_mode & 0o666  # what the user's umask leaves; safetensors writes for its owner alone
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(mode)
        _sync(file)
    _sync(partial)
    if os.path.lexists(folder):
        gone = _set_aside(folder)
        partial.rename(folder)
        delete(gone)
    else:
        partial.rename(folder)
    _sync(folder.parent)


def discard(path: Path) -> None:
    """Delete a folder so that no half of it keeps its name; of a link, the link alone."""
    delete(_set_aside(path))


def sweep(folder: Path) -> None:
    """Delete what killed processes have left in a folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if LEFTOVER.fullmatch(path.name):
            delete(path)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    gone = path.with_name(f".{path.name}.gone")
    delete(gone)
    path.rename(gone)
    return gone


def _sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
