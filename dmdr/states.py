"""Loading weights strictly: another name or shape is an error that says which."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dmdr.errors import ConfigError


def refuse_misfits(
    what: str, missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str] = ()
) -> None:
    """Refuse a state that is not the model's.

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
        own: Parameters and buffers to fill.
        given: What was read.
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
