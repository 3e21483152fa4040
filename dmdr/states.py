"""States in checkpoints: errors name what cannot be stored, and what does not fit when it is loaded."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

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
            tensor.copy_(given[name])


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
