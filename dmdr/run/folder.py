"""Before a run: which folder, which checkpoint, and what has to go first."""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dmdr.errors import ConfigError, TrainingError
from dmdr.images import can_hold_files
from dmdr.run import durable
from dmdr.run.checkpoint import (
    check_whole,
    checkpoints,
    damage,
    identity,
    newest_whole,
    number_of,
    read_progress,
)
from dmdr.settings.fields import Config
from dmdr.settings.parse import read_yaml
from dmdr.settings.registry import registered

SETTINGS, INPUTS = "config.yaml", "inputs.json"

# What a run writes before its first update; the log has a line of that one.
AT_THE_START = re.compile(
    r"config\.yaml|inputs\.json|overview\.json|guard\.safetensors|samples/(teacher|step-0+)\.png"
    r"|tensorboard/([\d.]+/)?(events\.out\.tfevents\.[^/]+|hparams\.yml)"
)

FIRST_FILE = re.compile(rf"\.{re.escape(SETTINGS)}\.\d+\.tmp")  # of a run that was killed before it had settings


def choose_folder(config: Config) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to resume from; writes nothing.

    Raises:
        ConfigError: If the folder holds another run or one is at work in it, or there is nothing to resume from.
    """
    output, resume = _chosen(config)
    if output.is_dir():
        with claimed(output):  # so that it is said before anything heavy is loaded
            pass
    return output, resume


def _chosen(config: Config) -> tuple[Path, Path | None]:
    resume = config.resume_from_checkpoint
    if config.output_dir is None and resume not in (None, "latest"):
        output = Path(str(resume)).resolve().parent.parent
    elif config.output_dir is None and resume:
        raise ConfigError("--resume_from_checkpoint latest: name the run's folder with --output_dir")
    elif config.output_dir is None:
        model = registered("models", config.model) or Path(config.model).name
        name = f"{model}-{config.rl}".replace("*", "x")
        output = _free_folder(Path("runs") / re.sub(r"[^\w.+-]+", "_", name))
    else:
        output = Path(config.output_dir)
    if resume is None:
        if not can_hold_files(next(path for path in (output, *output.absolute().parents) if path.exists())):
            raise ConfigError(f"--output_dir {output} is no folder, or you may not write into it")
        _check_free(output, overwrite=config.overwrite_output_dir)
        return output, None
    if resume == "latest":
        found = checkpoints(output)
        newest = newest_whole(found)
        if newest is None:
            raise ConfigError(
                f"--resume_from_checkpoint latest: {output} holds no {'complete ' if found else ''}checkpoint"
            )
        return output, newest
    check_whole(Path(resume))
    if Path(resume).resolve().parent.parent != output.resolve() and checkpoints(output):
        raise ConfigError(
            f"--output_dir {output} is of another run than --resume_from_checkpoint {resume}; leave out --output_dir"
        )
    return output, Path(resume)


def _check_free(output: Path, *, overwrite: bool) -> None:
    held = output.is_dir() and any(output.iterdir())
    if held and not overwrite and not never_trained(output):
        raise ConfigError(
            f"--output_dir {output} is not empty; go on with --resume_from_checkpoint latest, or delete what it "
            "holds with --overwrite_output_dir"
        )
    if held and not _is_run(output) and not never_trained(output):
        raise ConfigError(f"--overwrite_output_dir: {output} has no {SETTINGS} of a DMDR run; delete it yourself")


def check_unchanged(config: Config, output: Path, resume: Path | None) -> None:
    """Refuse a folder that another run has used since `choose_folder`.

    Raises:
        ConfigError: If it holds a run now, or a newer checkpoint than the latest one of then.
    """
    if resume is None:
        _check_free(output, overwrite=config.overwrite_output_dir)
    elif config.resume_from_checkpoint == "latest":
        later = [path for path in checkpoints(output) if number_of(path) > number_of(resume)]
        if any(damage(path) is None for path in later):
            raise ConfigError(f"--output_dir {output}: another run has added checkpoints since then; start again")


def never_trained(folder: Path) -> bool:
    """Whether a folder holds what a run writes before its first update, and nothing else."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if not _is_run(folder):  # the settings are what a run writes first
        return bool(files) and all(path.parent == folder and FIRST_FILE.fullmatch(path.name) for path in files)
    return all(
        AT_THE_START.fullmatch(path.relative_to(folder).as_posix()) or durable.LEFTOVER.fullmatch(path.name)
        for path in files
    )


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder that is there. The claim ends with the process and its forks, however they end.

    Raises:
        ConfigError: If another run is at work in it.
    """
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--output_dir {folder}: another run uses it now; wait until it ends, or stop it"
            ) from None
        except OSError:  # some file systems have no locks
            pass
        yield
    finally:
        os.close(place)


def check_there(folder: Path) -> None:
    """Refuse to write into a run folder that is gone: made anew it would lack the settings, the log and what was saved.

    Raises:
        TrainingError: Names it.
    """
    if not folder.is_dir():
        raise TrainingError(f"{folder} is gone: it was moved or removed while the run was writing to it")


def empty(folder: Path) -> None:
    """Delete what a run folder holds, but not the folder, which may be a link, and not yet the settings.

    Without its settings nobody would know a half-deleted run again.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != SETTINGS:
            durable.delete(path)


def check_inputs_survive(output: Path, named: Iterable[tuple[str, Any]]) -> None:
    """Refuse to overwrite a folder that holds a file which a setting names.

    Args:
        named: Settings and their values.

    Raises:
        ConfigError: Names the setting and the file.
    """
    for name, value in ((name, each) for name, given in named for each in _listed(given)):
        path = Path(value.partition(":")[0]) if isinstance(value, str) and value else None  # FILE.py:NAME
        if path and os.path.exists(path) and path.resolve().is_relative_to(output.resolve()):
            raise ConfigError(f"--overwrite_output_dir would delete {value} (--{name}); move it first")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def changes(checkpoint: Path, settings: Mapping[str, Any]) -> list[str]:
    """How a run that goes on from a checkpoint differs from the one that wrote it; what makes it inexact, too."""
    run = checkpoint.resolve().parents[1]
    before = read_yaml(str(run / SETTINGS)) if (run / SETTINGS).is_file() else settings
    found = [
        f"--{name} is {value} now, and was {before[name]}"
        for name, value in settings.items()
        if name in before and not _same(before[name], value)
    ]
    if read_progress(checkpoint).torn:
        found.append(f"{checkpoint} was saved during a failed update; the run goes on, but its result may differ")
    held: Any = None
    with suppress(OSError, ValueError):
        held = json.loads((run / INPUTS).read_text())
    for name, now in json.loads(inputs_of(settings)).items() if isinstance(held, dict) else ():
        if now and held.get(name, now) != now:
            found.append(f"--{name} {' '.join(_listed(settings[name]))} has changed since the run began")
    return found


def _same(before: Any, now: Any) -> bool:
    """Whether a setting has the value that a file has for it; a number may stand for a text (`fields.typed`)."""
    if isinstance(now, str) and isinstance(before, int | float):
        before = str(before)
    return bool(before == (list(now) if isinstance(now, tuple) else now))


def inputs_of(settings: Mapping[str, Any]) -> str:
    """What prompts and real images are read from, as JSON: `identity` of a file or a folder, null of anything else."""
    given = {name: _listed(settings[name]) for name in ("prompts", "validation_prompts", "real_images")}
    places = {name: each[0] if len(each) == 1 and each[0] else "" for name, each in given.items()}
    return json.dumps({name: _identity(place) for name, place in places.items()}) + "\n"


def _identity(place: str) -> dict[str, Any] | None:
    """Size and hash of a file. Of a folder, how many files it has, and a hash of their names and sizes."""
    path = next((Path(name) for name in (place, place.partition(":")[0]) if name and os.path.exists(name)), None)
    if path is None:
        return None
    if path.is_file():
        return identity(path)
    files = sorted((str(file.relative_to(path)), file.stat().st_size) for file in path.rglob("*") if file.is_file())
    return {"files": len(files), "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run of ours, and not just one with a config.yaml."""
    try:
        return {"model", "matching", "stage1_steps"} <= read_yaml(str(folder / SETTINGS)).keys()
    except ConfigError:
        return False


def _free_folder(base: Path) -> Path:
    """The folder, numbered if there is one already."""
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder
