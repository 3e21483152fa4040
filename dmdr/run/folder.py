"""Before a run: which folder, which checkpoint, and what has to go first."""

import re
import shutil
from pathlib import Path

from dmdr.errors import ConfigError
from dmdr.images import can_hold_files
from dmdr.run.checkpoint import checkpoints, read_progress
from dmdr.settings.fields import Config
from dmdr.settings.parse import read_yaml
from dmdr.settings.registry import registered

# What a run writes before its first update; the log has a line of that one.
AT_THE_START = re.compile(
    r"config\.yaml|overview\.json|samples/(teacher|step-0+)\.png"
    r"|tensorboard/([\d.]+/)?(events\.out\.tfevents\.[^/]+|hparams\.yml)"
)


def choose_folder(config: Config) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to resume from; writes nothing.

    Raises:
        ConfigError: If the folder holds another run, or there is nothing to resume from.
    """
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
            raise ConfigError(f"--output_dir {output} is no folder that may be written to")
        held = output.is_dir() and any(output.iterdir())
        if held and not config.overwrite_output_dir and not never_trained(output):
            raise ConfigError(
                f"--output_dir {output} is not empty; go on with --resume_from_checkpoint latest, or delete what it "
                "holds with --overwrite_output_dir"
            )
        if held and not _is_run(output):
            raise ConfigError(f"--overwrite_output_dir: {output} holds no run of ours; delete it yourself")
        return output, None
    if resume == "latest":
        found = checkpoints(output)
        if not found:
            raise ConfigError(f"--resume_from_checkpoint latest: {output} holds no checkpoint")
        return output, found[-1]
    read_progress(Path(resume))
    return output, Path(resume)


def never_trained(folder: Path) -> bool:
    """Whether a folder holds a run that ended before its first update, and nothing else."""
    return _is_run(folder) and all(
        AT_THE_START.fullmatch(path.relative_to(folder).as_posix())
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def empty(folder: Path) -> None:
    """Delete what a folder holds, and not the folder, which may be a link."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run of ours, and not just one with a config.yaml."""
    try:
        return {"model", "matching", "stage1_steps"} <= read_yaml(str(folder / "config.yaml")).keys()
    except ConfigError:
        return False


def _free_folder(base: Path) -> Path:
    """The folder, numbered if there is one already."""
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder
