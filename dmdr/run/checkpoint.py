"""Checkpoints of a run. Each is complete or absent; a run that goes on from one repeats every bit on a CPU."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dmdr.errors import ConfigError, TrainingError, one_line
from dmdr.run import durable
from dmdr.states import check_storable, load_strict, read_tensors

PATTERN = re.compile(r"step-(\d{6,})")
MANIFEST = "manifest.json"  # name -> size and hash of each file
STAGE_END = "stage_end"
MOST_ROUNDS = 1000  # batches of prompts for each update; a larger count is no count
Tensors = Mapping[str, Mapping[str, torch.Tensor]]  # role -> name -> tensor
logger = logging.getLogger("dmdr")


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: 1 or 2.
        step: Student updates done in this stage; `total` in the whole run.
        prompts_consumed: Batches read from the prompt stream.
        batch: Images of an update, of all processes; None where an older version did not say.
        torn: Whether the next update had begun, and failed: what it changed is in the checkpoint, too.
    """

    stage: int
    step: int
    total: int
    prompts_consumed: int
    batch: int | None = None
    torn: bool = False

    def __post_init__(self) -> None:
        """Refuse what no run can have written.

        Raises:
            ValueError: Says what is wrong.
        """
        for name, kinds in {"torn": (bool,), "batch": (int, type(None))}.items():
            if type(getattr(self, name)) not in kinds:
                raise ValueError(f"{name} must not be {getattr(self, name)!r}")
        for name in ("stage", "step", "total", "prompts_consumed"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        if not (0 <= self.stage <= 2 and 0 <= self.step <= self.total):
            raise ValueError(f"step {self.step} of stage {self.stage}, {self.total} in all")
        if not 0 <= self.prompts_consumed <= MOST_ROUNDS * (self.total + 1):
            raise ValueError(f"{self.prompts_consumed} batches of prompts for {self.total} updates")


def save_checkpoint(
    folder: Path,
    progress: Progress,
    tensors: Tensors,
    optimizers: Mapping[str, torch.optim.Optimizer],
    extra: Mapping[str, Any],
    *,
    stage_end: bool = False,
) -> Path:
    """Write `folder/step-<total>`, under another name until it is complete.

    A whole one of that name is not written again.

    Args:
        folder: The run's `checkpoints/`.
        tensors: Weights by role, and the student's average as "ema"; each role is a file.
        optimizers: By role; their moments are kept, their settings come from the configuration on resuming.
        extra: Further state of plain containers and tensors (objectives, loss scaler).
        stage_end: Keep it whatever `prune` is asked to.

    Raises:
        TrainingError: If `extra` holds what could not be loaded again, or the disk does not take it. What was there is
            untouched.
    """
    for name, state in extra.items():
        check_storable(state, f"state_dict() of {name}")
    final = folder / f"step-{progress.total:06d}"
    try:
        if damage(final) is not None:
            partial = durable.begin(final)
            for role, named in tensors.items():
                save_file(
                    {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, _file(partial, role)
                )
            moments = {role: optimizer.state_dict()["state"] for role, optimizer in optimizers.items()}
            with (partial / "training.pt").open("wb") as file:  # of which torch passes an OSError on, unlike of a name
                torch.save({"moments": moments, "extra": dict(extra)}, file)
            (partial / "progress.json").write_text(json.dumps(asdict(progress)))
            files = {path.name: identity(path) for path in partial.iterdir()}
            (partial / MANIFEST).write_text(json.dumps(files, indent=2))
            durable.finish(partial, final)
        if stage_end:
            (final / STAGE_END).touch()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors say of a full disk what they like
        raise TrainingError(f"{final} could not be written: {_cause(error)}; earlier ones are untouched") from error
    return final


def _cause(error: BaseException) -> str:
    """What the system says, if it is an OSError during which torch complains of its own file; else what is said."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return (found and found.strerror) or one_line(found or error)


def identity(file: Path) -> dict[str, Any]:
    """Size and hash of a file as it is on the disk."""
    with file.open("rb") as content:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. One of an older version, without a manifest, is only looked at."""
    try:
        read_progress(checkpoint)
    except ConfigError as error:
        return str(error)
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        missing = [name for name in ("student.safetensors", "training.pt") if not (checkpoint / name).is_file()]
        return f"{checkpoint} is not complete: it lacks {missing[0]}" if missing else None
    try:
        wanted = json.loads(manifest.read_text())
        for name, saved in wanted.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{checkpoint} is not complete: it lacks {name}"
            if file.stat().st_size != saved["size"] or identity(file) != saved:
                return f"{file} is damaged: it is not as it was saved"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{manifest} is damaged: {one_line(error)}"
    return None


def check_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not as it was saved.

    Raises:
        ConfigError: Names the newest one beside it that is.
    """
    if reason := damage(checkpoint):
        others = (other for other in checkpoints(checkpoint.parent.parent)[::-1] if other.name != checkpoint.name)
        whole = next((other for other in others if damage(other) is None), None)
        raise ConfigError(f"{reason}; {whole} is whole" if whole else reason)


def newest_whole(found: list[Path]) -> Path | None:
    """The last of some checkpoints that is as it was saved; says which ones it passes over."""
    for checkpoint in reversed(found):
        if (reason := damage(checkpoint)) is None:
            return checkpoint
        logger.warning("%s; the checkpoint before it is used", reason)
    return None


def restore(checkpoint: Path, tensors: Tensors, optimizers: Mapping[str, torch.optim.Optimizer]) -> Mapping[str, Any]:
    """Give everything that `save_checkpoint` wrote back, in place.

    Returns:
        The further state, `extra`.

    Raises:
        ConfigError: If a file is missing or damaged, or names or shapes differ; says which.
    """
    for role, named in tensors.items():
        load_parameters(checkpoint, role, named)
    file = checkpoint / "training.pt"
    moments, extra = _read_training(file)
    for role, optimizer in optimizers.items():
        if role not in moments:
            raise ConfigError(f"{checkpoint} holds no optimizer state of the {role}")
        own = optimizer.state_dict()
        try:
            optimizer.load_state_dict({"state": moments[role], "param_groups": own["param_groups"]})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{file}: the optimizer state of the {role} does not fit: {one_line(error)}") from error
    return extra


def _read_training(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Moments by role, and the further state.

    Raises:
        ConfigError: If the file is damaged.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own words advise to load it all the same
        raise ConfigError(f"{file} holds what no checkpoint holds, and is not loaded") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"{file} is damaged: {one_line(error)}") from error
    moments, extra = (state.get(name) if isinstance(state, dict) else None for name in ("moments", "extra"))
    if not (isinstance(moments, dict) and isinstance(extra, dict)):
        raise ConfigError(f"{file} is damaged: it holds no moments, or no further state")
    return moments, extra


def _file(checkpoint: Path, role: str) -> Path:
    return checkpoint / f"{role}.safetensors"


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood.

    Raises:
        ConfigError: If this is no checkpoint.
    """
    try:
        return Progress(**json.loads((checkpoint / "progress.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{checkpoint} is no checkpoint of a run: progress.json: {one_line(error)}") from error


def load_parameters(checkpoint: Path, role: str, parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy a role's weights, or the student's average ("ema"), from a checkpoint.

    Raises:
        ConfigError: If the file is missing or damaged, or names or shapes differ; says which.
    """
    file = _file(checkpoint, role)
    if not file.is_file():
        what = "average of the student (--ema_decay)" if role == "ema" else role
        raise ConfigError(f"{checkpoint} holds no {what} to go on with")
    load_strict(parameters, read_tensors(file), str(file))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if PATTERN.fullmatch(path.name)]
    return sorted(found, key=number_of)


def number_of(checkpoint: Path) -> int:
    """The updates that its name tells."""
    return int(checkpoint.name.removeprefix("step-"))


def prune(folder: Path, limit: int | None, whole: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, if the newest is whole; those that end a stage stay.

    Args:
        whole: A checkpoint that has just been read, and need not be read again.
    """
    found = checkpoints(folder)
    ordinary = [path for path in found if not (path / STAGE_END).exists()]
    surplus = ordinary[:-limit] if limit else []
    if surplus and (found[-1] == whole or damage(found[-1]) is None):
        for path in surplus:
            durable.discard(path)


def find_initial(path: str) -> Path:
    """What `--init_student` means: a checkpoint, an export, or the last checkpoint of a run folder's stage 1.

    Raises:
        ConfigError: If the path is none of them, or the checkpoint is damaged.
    """
    folder = Path(path)
    if (folder / "sampling.json").is_file():
        return folder
    if (folder / "progress.json").is_file():
        check_whole(folder)
        return folder
    initial = newest_whole(list(_of_stage(1, checkpoints(folder))))
    if initial is None:
        raise ConfigError(f"--init_student {path} is no checkpoint, no export, and no run folder with a stage 1")
    return initial


def _of_stage(number: int, found: list[Path]) -> Iterator[Path]:
    for checkpoint in found:
        try:
            if read_progress(checkpoint).stage == number:
                yield checkpoint
        except ConfigError as error:
            logger.warning("%s", error)
