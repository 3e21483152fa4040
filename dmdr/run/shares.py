"""Tensors that processes share, in a checkpoint: each process writes and reads its rows, by torch's distributed one.

The files are safetensors with the place of their rows in the header, so that any number of processes can read them, and
none of them can run code.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, empty

from dmdr.errors import ConfigError, TrainingError, one_line
from dmdr.states import refuse_misfits


def save_shares(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write shared tensors; all processes must do so together.

    Args:
        folder: A new one, that all of them see.
        tensors: By name, of any shape.

    Raises:
        TrainingError: If the disk does not take them.
    """
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
    except CheckpointException as error:
        raise TrainingError(
            f"{folder} could not be written: {_cause(error)}; earlier checkpoints are still good"
        ) from error


def names_of(folder: Path) -> set[str]:
    """The tensors that a folder of shares holds.

    Raises:
        ConfigError: If a file is damaged.
    """
    return set(_shapes(folder))


def load_shares(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, shared or whole, with those of the same names; all processes must do so together.

    Raises:
        ConfigError: If one is missing or of another shape, or a file is damaged.
    """
    shapes = _shapes(folder)
    wrong = [
        f"{name} {tuple(shapes[name])} for {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in shapes and shapes[name] != tensor.shape
    ]
    refuse_misfits(str(folder), tensors.keys() - shapes.keys(), (), wrong)
    try:
        reader = HuggingFaceStorageReader(str(folder))
        with warnings.catch_warnings():  # torch says when a process loads alone
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load({name: tensor.detach() for name, tensor in tensors.items()}, storage_reader=reader)
    except CheckpointException as error:
        raise ConfigError(f"{folder} is damaged: {_cause(error)}") from error


def read_shares(folder: Path, like: Tensor | None) -> dict[str, Tensor]:
    """All tensors of a folder, by name, shared as another tensor is; all processes must ask together.

    Args:
        like: A shared tensor of any shape; None for whole tensors on the CPU.

    Raises:
        ConfigError: If a file is damaged.
    """
    into: dict[str, Tensor] = {}
    for name, entry in _entries(folder).items():
        shape, dtype = entry.size, entry.properties.dtype
        if isinstance(like, DTensor):
            into[name] = empty(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
        else:
            into[name] = torch.empty(shape, dtype=dtype)
    load_shares(folder, into)
    return into


def _shapes(folder: Path) -> dict[str, torch.Size]:
    return {name: entry.size for name, entry in _entries(folder).items()}


def _entries(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        listed = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        return {name: entry for name, entry in listed.items() if isinstance(entry, TensorStorageMetadata)}
    except Exception as error:  # safetensors, JSON and torch have their own
        raise ConfigError(f"{folder} is damaged: {one_line(error)}") from error


def _cause(error: CheckpointException) -> str:
    """Of a failure in some processes, that of the first."""
    first, _ = error.failures[min(error.failures)]
    return one_line(first)
