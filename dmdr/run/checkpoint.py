"""Checkpoints of a run. Each is complete or absent; a run that goes on from one repeats every bit on a CPU."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmdr.errors import ConfigError
from dmdr.states import check_storable, load_strict

PATTERN = re.compile(r"step-(\d{6,})")
Tensors = Mapping[str, Mapping[str, torch.Tensor]]  # role -> name -> tensor


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: 1 or 2.
        step: Student updates done in this stage; `total` in the whole run.
        prompts_consumed: Batches read from the prompt stream.
    """

    stage: int
    step: int
    total: int
    prompts_consumed: int


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

    Args:
        folder: The run's `checkpoints/`.
        tensors: Weights by role, and the student's average as "ema"; each role is a file.
        optimizers: By role; their moments are kept, their settings come from the configuration on resuming.
        extra: Further state of plain containers and tensors (objectives, loss scaler).
        stage_end: Keep it whatever `prune` is asked to.

    Raises:
        TrainingError: If `extra` holds what could not be loaded again; nothing is written.
    """
    for name, state in extra.items():
        check_storable(state, f"state_dict() of {name}")
    final = folder / f"step-{progress.total:06d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for role, named in tensors.items():
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, _file(partial, role))
    moments = {role: optimizer.state_dict()["state"] for role, optimizer in optimizers.items()}
    torch.save({"moments": moments, "extra": dict(extra)}, partial / "training.pt")
    (partial / "progress.json").write_text(json.dumps(asdict(progress)))
    if stage_end:
        (partial / "stage_end").touch()
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


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
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise ConfigError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    for role, optimizer in optimizers.items():
        if role not in state["moments"]:
            raise ConfigError(f"{checkpoint} holds no optimizer state of the {role}")
        own = optimizer.state_dict()
        optimizer.load_state_dict({"state": state["moments"][role], "param_groups": own["param_groups"]})
    extra: Mapping[str, Any] = state["extra"]
    return extra


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
        raise ConfigError(f"{checkpoint} is no checkpoint of a run: {error}") from error


def load_parameters(checkpoint: Path, role: str, parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy a role's weights, or the student's average ("ema"), from a checkpoint.

    Raises:
        ConfigError: If the file is missing or damaged, or names or shapes differ; says which.
    """
    file = _file(checkpoint, role)
    if not file.is_file():
        what = "average of the student (--ema_decay)" if role == "ema" else role
        raise ConfigError(f"{checkpoint} holds no {what} to go on with")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error
    load_strict(parameters, state, str(file))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if PATTERN.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def prune(folder: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; those that end a stage stay."""
    if limit is not None:
        ordinary = [path for path in checkpoints(folder) if not (path / "stage_end").exists()]
        for path in ordinary[:-limit]:
            shutil.rmtree(path)


def find_initial(path: str) -> Path:
    """What `--init_student` means: a checkpoint, an export, or the last checkpoint of a run folder's stage 1.

    Raises:
        ConfigError: If the path is none of them.
    """
    folder = Path(path)
    if (folder / "progress.json").is_file() or (folder / "sampling.json").is_file():
        return folder
    first_stage = [found for found in checkpoints(folder) if read_progress(found).stage == 1]
    if not first_stage:
        raise ConfigError(f"--init_student {path} is no checkpoint, no export, and no run folder with a stage 1")
    return first_stage[-1]
