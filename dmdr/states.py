"""Loading weights strictly: another name or shape is an error that says which."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dmdr.errors import ConfigError


def load_strict(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors of the same names and shapes, whatever their dtype and device.

    Args:
        own: Parameters and buffers to fill.
        given: What was read.
        what: Where from, for messages.

    Raises:
        ConfigError: If anything is missing, unknown or of another shape; names the first three of each kind, and
            nothing was copied.
    """
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]
    kinds = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "of another shape": misshapen,
    }
    found = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]
    if found:
        raise ConfigError(f"{what} does not fit: {'; '.join(found)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
