"""Named tensors, whole or shared by processes: how they are stored and loaded; errors name what does not fit."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dmdr.errors import ConfigError, TrainingError, one_line

PLAIN = (bool, int, float, str, bytes, type(None), torch.Size, torch.dtype, torch.device)  # with weights_only


def check_storable(state: Any, where: str) -> None:
    """Refuse a state that `torch.load(weights_only=True)`, with which a run is resumed, would refuse.

    Raises:
        TrainingError: Names the place and the type.
    """
    if type(state) in (dict, OrderedDict):
        for name, value in state.items():
            check_storable(value, f"{where}, {name}")
    elif type(state) in (list, tuple, set):
        for value in state:
            check_storable(value, where)
    elif not isinstance(state, Tensor) and type(state) not in PLAIN:
        kind = f"{type(state).__module__}.{type(state).__qualname__}"
        raise TrainingError(f"{where}: a checkpoint can hold tensors, numbers, text, lists and dicts, but not a {kind}")


def replaced(state: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """A copy of a state of plain containers in which each value is another.

    Args:
        state: As `check_storable` wants it.
        change: Gives the new value for a place, as in `['a'][0]`, and the old value.
        place: Where the state itself is.
    """
    if type(state) in (dict, OrderedDict):
        found = copy(state)  # a module's state has attributes, too
        found.update((name, replaced(value, change, f"{place}[{name!r}]")) for name, value in state.items())
        return found
    if type(state) in (list, tuple):
        return type(state)(replaced(value, change, f"{place}[{number}]") for number, value in enumerate(state))
    return change(place, state)


def refuse_misfits(
    what: str, missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str] = ()
) -> None:
    """Refuse a state that is not the model's.

    Args:
        what: Where the state comes from, for the message.
        missing: Names that the model has and the state has not.
        unexpected: Names that the state has and the model has not.
        misshapen: Names of both whose shapes differ, perhaps with the two shapes.

    Raises:
        ConfigError: If any name is given; names the first three of each kind.
    """
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    found = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})" for kind, names in kinds.items() if names]
    if found:
        raise ConfigError(f"{what} does not fit its architecture: {'; '.join(found)}")


def load_strict(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors of the same names and shapes, whatever their dtype and device.

    Args:
        own: Parameters and buffers to fill, by name, of any shape.
        given: What was read, by name.
        what: Where from, for messages.

    Raises:
        ConfigError: If anything is missing, unexpected or of another shape; nothing was copied.
    """
    misshapen = [
        f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    refuse_misfits(what, own.keys() - given.keys(), given.keys() - own.keys(), misshapen)
    with torch.no_grad():
        for name, tensor in own.items():
            own_rows(tensor).copy_(rows_of(tensor, given[name]))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a student's safetensors file, by name, of any shape.

    Raises:
        ConfigError: If it is missing or damaged, or holds a number that is not finite.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:  # the last two of a dtype that torch lacks
        raise ConfigError(f"{file} is damaged: {one_line(error)}") from error
    refuse_infinite(tensors, str(file))
    return tensors


def refuse_infinite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights of which a student could draw nothing.

    Args:
        tensors: By name, of any shape.
        what: Where they come from, for the message.

    Raises:
        ConfigError: If one holds a number that is not finite; names it.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ConfigError(f"{what} is damaged: {name} holds numbers that are not finite")


# --- Tensors that processes share (--shard): each has some rows of them -----------------------------------------------


def is_shared(tensor: Tensor) -> bool:
    """Whether each process has some rows only of a tensor of any shape."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of any shape with all its rows. All processes that share it must ask together."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def own_rows(tensor: Tensor) -> Tensor:
    """The rows of this process, [rows, ...] on the same memory; of a tensor that is not shared, all of it."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def rows_of(tensor: Tensor, source: Any) -> Tensor:
    """The rows of another tensor that belong to those of this process.

    Args:
        tensor: Of any shape, shared or not.
        source: Of the same shape: a tensor, whole or shared alike, or a slice of a safetensors file, of which only the
            rows are read.
    """
    if is_shared(source):
        return own_rows(source)
    if not isinstance(tensor, DTensor):
        found: Tensor = source[...]
        return found
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return source[offset[0] : offset[0] + shape[0]] if shape[0] else own_rows(tensor)
