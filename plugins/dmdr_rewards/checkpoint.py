"""Finding, reading and checking checkpoints of open_clip's layouts; every failure is one line."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError

CONFIG = "open_clip_config.json"
# Tried in this order, in a folder as on the hub; a folder may hold a single file of another name instead.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def locate(checkpoint: str) -> tuple[Path, dict[str, Any] | None]:
    """The weights file of a checkpoint, and its `open_clip_config.json`; None where it is a bare weights file.

    Args:
        checkpoint: A local file, a local folder, or on the Hugging Face hub `org/name` or `org/name:file`.

    Raises:
        ConfigError: If there is none, or a folder is incomplete.
    """
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path, None
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ConfigError(f"checkpoint folder {path} has no {CONFIG}; add it, or name the weights file itself")
        return _weights_in(path), _read_config(path / CONFIG)
    return _download(str(checkpoint))


def require_hub_id(checkpoint: str) -> None:
    """Before the hub is asked for what is not here.

    Raises:
        ConfigError: If it can only have been meant as a local path.
    """
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", checkpoint)
    if not hub_id or (not hub_id[1] and checkpoint.endswith(SUFFIXES)):
        raise ConfigError(f"checkpoint {checkpoint} does not exist; give a local path or a hub id such as org/name")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, on the CPU; `{"state_dict": ...}` and a leading `module.` are unwrapped.

    Raises:
        ConfigError: If it cannot be read, or holds anything but tensors: a pickle that could run code is refused.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"checkpoint {path} cannot be read ({reason(error)}); download it again, or convert it to safetensors"
        ) from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"checkpoint {path} is no table of tensors; expected a state dict or {{'state_dict': ...}}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def reason(error: Exception) -> str:
    """Why something could not be read, in one line."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to turn its safety off
        return "it is damaged, or holds more than tensors and is refused"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"checkpoint folder {folder} must hold one weights file; found {names}")
    return found[0]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        return {"model_cfg": dict(config["model_cfg"]), "preprocess_cfg": dict(config.get("preprocess_cfg", {}))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no configuration of open_clip ({reason(error)})") from error


def _download(checkpoint: str) -> tuple[Path, dict[str, Any] | None]:
    require_hub_id(checkpoint)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repo, _, file = checkpoint.partition(":")
    try:
        if file:
            return Path(hf_hub_download(repo, file)), None
        config = _read_config(Path(hf_hub_download(repo, CONFIG)))
        for name in WEIGHTS:
            try:
                return Path(hf_hub_download(repo, name)), config
            except EntryNotFoundError:
                continue
        raise ConfigError(f"none of {', '.join(WEIGHTS)} is there")
    except Exception as error:
        raise ConfigError(
            f"checkpoint {checkpoint} is no local path and cannot be fetched from the hub "
            f"({reason(error)}); download it and give its local path"
        ) from error
