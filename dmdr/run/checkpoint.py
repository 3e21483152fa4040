"""Checkpoints of a run. Each is complete or absent; a run that goes on from one repeats every bit on a CPU."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmdr.errors import ConfigError, TrainingError, one_line
from dmdr.run import durable
from dmdr.run.shares import load_shares, names_of, read_shares, save_shares
from dmdr.states import (
    check_storable,
    is_shared,
    load_strict,
    own_rows,
    read_tensors,
    refuse_misfits,
    replaced,
    rows_of,
    whole,
)

PATTERN = re.compile(r"step-(\d{6,})")
MANIFEST = "manifest.json"  # name -> size and hash of each file
STAGE_END = "stage_end"
STATES = "states"  # a folder: what processes share of the further state
WEIGHTS = "weights"  # before the names of parameters, where a role's shares are weights and moments
MOST_ROUNDS = 1000  # batches of prompts for each update; a larger count is no count
Tensors = Mapping[str, Mapping[str, Tensor]]  # role -> name -> tensor
Moments = dict[int, dict[str, Any]]  # number of the parameter -> name of the moment -> tensor
Once = Callable[[Callable[[], Any]], Any]
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
            raise ValueError(f"step {self.step} of stage {self.stage} cannot be update {self.total} of the run")
        if not 0 <= self.prompts_consumed <= MOST_ROUNDS * (self.total + 1):
            raise ValueError(f"prompts_consumed cannot be {self.prompts_consumed} after {self.total} updates")


def alone(act: Callable[[], Any]) -> Any:
    """Have this process act by itself (`Once`)."""
    return act()


def save_checkpoint(
    folder: Path,
    progress: Progress,
    tensors: Tensors,
    optimizers: Mapping[str, torch.optim.Optimizer],
    extra: Mapping[str, Any],
    *,
    stage_end: bool = False,
    once: Once = alone,
) -> Path:
    """Write `folder/step-<total>`, under another name until it is complete.

    A whole one of that name is not written again.

    Args:
        folder: The run's `checkpoints/`.
        tensors: Weights by role, and the student's average as "ema"; each role is a file, or a folder of shares with
            their moments.
        optimizers: By role; their moments are kept, their settings come from the configuration on resuming.
        extra: Further state of plain containers and tensors, whole or shared (objectives, loss scaler).
        stage_end: Keep it whatever `prune` is asked to.
        once: Has the main process act, and tells all what came of it (`device.on_main_process`), where all processes
            save together. Left out, this process saves alone, what the processes do not share.

    Raises:
        TrainingError: If `extra` holds what could not be loaded again, or the disk does not take it. What was there is
            untouched.
    """
    for name, state in extra.items():
        check_storable(state, f"state_dict() of {name}")
    final = folder / f"step-{progress.total:06d}"
    moments = {role: optimizer.state_dict()["state"] for role, optimizer in optimizers.items()}
    shared = {role: named for role, named in tensors.items() if any(map(is_shared, named.values()))}
    states: dict[str, Tensor] = {}
    like = _first_shared(tensors)

    def apart(place: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if not value.ndim or like is None or value.placements != like.placements:  # like no parameter
            return whole(value)
        states[place] = value
        return None

    own_extra = replaced(dict(extra), apart)

    def begin() -> Path | None:
        with _reported(final):
            return None if damage(final) is None else durable.begin(final)

    def finish(partial: Path) -> None:
        with _reported(final):
            for role, named in tensors.items():
                if role not in shared:
                    own = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
                    save_file(own, _file(partial, role))
            with (partial / "training.pt").open("wb") as file:  # of which torch passes an OSError on, unlike of a name
                torch.save({"moments": _plain(moments), "extra": own_extra}, file)
            (partial / "progress.json").write_text(json.dumps(asdict(progress)))
            written = sorted(path for path in partial.rglob("*") if path.is_file())
            names = [path.relative_to(partial).as_posix() for path in written]
            with ThreadPoolExecutor() as pool:
                files = dict(zip(names, pool.map(identity, written), strict=True))
            (partial / MANIFEST).write_text(json.dumps(files, indent=2))
            durable.finish(partial, final)

    def mark() -> None:
        with _reported(final):
            (final / STAGE_END).touch()

    if partial := once(begin):
        for role, named in shared.items():
            save_shares(partial / role, _named(named, moments.get(role, {})))
        if states:
            save_shares(partial / STATES, states)
        once(lambda: finish(partial))
    if stage_end:
        once(mark)
    return final


@contextmanager
def _reported(final: Path) -> Iterator[None]:
    """A failure of the disk in one line; torch and safetensors say of a full one what they like.

    Raises:
        TrainingError: In its place.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"{final} could not be written: {_cause(error)}; earlier checkpoints are still good"
        ) from error


def _cause(error: BaseException) -> str:
    """What the system says, if it is an OSError during which torch complains of its own file; else what is said."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return (found and found.strerror) or one_line(found or error)


def _named(tensors: Mapping[str, Tensor], moments: Moments) -> dict[str, Tensor]:
    """A role's shared tensors and moments by one name each: `weights.<name>`, `exp_avg.<name>`."""
    found = {f"{WEIGHTS}.{name}": tensor for name, tensor in tensors.items()}
    for index, name in enumerate(tensors):
        found |= {f"{key}.{name}": value for key, value in moments.get(index, {}).items() if is_shared(value)}
    return found


def _plain(moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """Without what processes share."""
    return {
        role: {
            index: {key: value for key, value in state.items() if not is_shared(value)}
            for index, state in states.items()
        }
        for role, states in moments.items()
    }


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
                return f"{file} is damaged: it changed after it was saved"
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
        raise ConfigError(f"{reason}; use {whole}, which is complete" if whole else reason)


def newest_whole(found: list[Path]) -> Path | None:
    """The last of some checkpoints that is as it was saved; says which ones it passes over."""
    for checkpoint in reversed(found):
        if (reason := damage(checkpoint)) is None:
            return checkpoint
        logger.warning("%s; DMDR looks for an earlier checkpoint", reason)
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
        state, own = moments[role], optimizer.state_dict()
        try:
            if any(map(is_shared, tensors.get(role, {}).values())):
                state = _as_shares(state, list(tensors[role].values()))
            if (checkpoint / role).is_dir():
                _load_moments(checkpoint / role, state, tensors[role])
            optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{file}: the optimizer state of the {role} does not fit: {one_line(error)}") from error
    if (checkpoint / STATES).is_dir():
        states = read_shares(checkpoint / STATES, _first_shared(tensors))
        extra = replaced(extra, lambda place, value: states.get(place, value))
    return extra


def _first_shared(tensors: Tensors) -> Any:
    """One of the tensors that processes share; None where they share none."""
    return next((each for named in tensors.values() for each in named.values() if is_shared(each)), None)


def _as_shares(state: Moments, parameters: Sequence[Tensor]) -> Moments:
    """Moments that were saved whole, shared as the parameters are."""
    return {
        index: {
            key: _share(value, parameters[index]) if value.shape == parameters[index].shape else value
            for key, value in own.items()
        }
        for index, own in state.items()
    }


def _share(value: Tensor, parameter: Tensor) -> Tensor:
    found = torch.zeros_like(parameter.detach())
    own_rows(found).copy_(rows_of(found, value))
    return found


def _load_moments(folder: Path, state: Moments, parameters: Mapping[str, Tensor]) -> None:
    """Add the moments among a role's shares to its state."""
    numbers, into = {name: index for index, name in enumerate(parameters)}, {}
    for each in names_of(folder):
        key, _, name = each.partition(".")
        if key != WEIGHTS:
            into[each] = torch.zeros_like(parameters[name].detach())
            state.setdefault(numbers[name], {})[key] = into[each]
    load_shares(folder, into)


def _read_training(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Moments by role, and the further state.

    Raises:
        ConfigError: If the file is damaged.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own words advise to load it all the same
        raise ConfigError(f"{file} holds data that is not of a checkpoint; DMDR does not load it") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"{file} is damaged: {one_line(error)}") from error
    moments, extra = (state.get(name) if isinstance(state, dict) else None for name in ("moments", "extra"))
    if not (isinstance(moments, dict) and isinstance(extra, dict)):
        raise ConfigError(f"{file} is damaged: 'moments' or 'extra' is missing")
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
    file, folder = _file(checkpoint, role), checkpoint / role
    if folder.is_dir():
        named = {f"{WEIGHTS}.{name}": tensor for name, tensor in parameters.items()}
        refuse_misfits(str(folder), (), {each for each in names_of(folder) if each.startswith(WEIGHTS)} - named.keys())
        load_shares(folder, named)
        return
    if not file.is_file():
        what = "average of the student (--ema_decay)" if role == "ema" else role
        raise ConfigError(f"{checkpoint} holds no {what}, which this run needs")
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


def holds(checkpoint: Path, role: str) -> bool:
    """Whether there are weights of a role, or the student's average ("ema"), in a checkpoint."""
    return _file(checkpoint, role).is_file() or (checkpoint / role).is_dir()


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
