"""Finding, reading and checking checkpoints; every failure is one line."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError, MissingFile
from dmdr.hub import cached_only, fetch, is_hub_id, unreachable
from dmdr.states import refuse_misfits

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
TRANSFORMERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


class Source:
    """A checkpoint: a local file, a local folder, or on the Hugging Face hub `org/name` or `org/name:file`.

    Attributes:
        name: What messages call it.
        file: The one file that was named, on disk; None where files are looked up by name.
    """

    def __init__(self, checkpoint: str, option: str = "checkpoint") -> None:
        """Look for it; a single file on the hub is fetched.

        Args:
            checkpoint: What is named.
            option: The reward's option that names it.

        Raises:
            ConfigError: If there is none.
        """
        path = Path(checkpoint).expanduser()
        self.name = f"checkpoint {checkpoint}"
        self.folder = path if path.is_dir() else None
        self.file = path if path.is_file() else None
        if path.exists() and not (self.folder or self.file):
            raise ConfigError(f"{self.name} is neither a file nor a folder")
        self._option = option
        self._repo = ""
        self._refused = ""  # why the hub did not give what it was asked for
        if not path.exists():
            repo, _, file = checkpoint.partition(":")
            if not is_hub_id(repo) or (not file and checkpoint.endswith(SUFFIXES)):
                raise ConfigError(f"{self.name} does not exist; give a local path or a hub id such as org/name")
            self._repo = repo
            if file:
                self.file = self._fetch(file)
                if self.file is None:
                    raise self.lacks(file)

    @property
    def pretrained(self) -> str:
        """What transformers' `from_pretrained` is given.

        Raises:
            ConfigError: If it is a single file.
        """
        if self.file:
            raise ConfigError(
                f"{self.name} is a single file; give the folder, or the hub id, that holds its config.json"
            )
        return str(self.folder) if self.folder else self._repo

    @property
    def where(self) -> dict[str, bool]:
        """What else it is given, so that it does not wait for a hub that is out of reach."""
        return cached_only() if self._repo else {}

    def find(self, *names: str) -> Path | None:
        """The first of these files that the folder holds, on disk."""
        for name in names:
            path = self.folder / name if self.folder else self._fetch(name) if self._repo else None
            if path is not None and path.is_file():
                return path
        return None

    def require(self, *names: str) -> Path:
        """The first of these files that the folder holds.

        Raises:
            ConfigError: If it holds none of them.
        """
        path = self.find(*names)
        if path is None:
            raise self.lacks(*names)
        return path

    def lacks(self, *names: str) -> ConfigError:
        """The error that none of these files is there."""
        if self._repo and (why := unreachable() or self._refused):
            what = f"{self.name} is no local path and cannot be fetched from the hub: {' or '.join(names)} ({why})"
            return MissingFile(what, self._option)
        return ConfigError(f"{self.name} holds none of {', '.join(names)}")

    def only(self, *suffixes: str) -> Path:
        """The one file of a local folder with one of these suffixes.

        Raises:
            ConfigError: If there is none, or more than one.
        """
        if self.folder is None:
            raise ConfigError(f"{self.name} does not say which file it means; give org/name:file")
        found = sorted(path for path in self.folder.iterdir() if path.suffix in suffixes)
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise ConfigError(f"{self.name} must hold one file that ends with {' or '.join(suffixes)}; found {names}")
        return found[0]

    def _fetch(self, file: str) -> Path | None:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return fetch(self._repo, file)
        except LocalEntryNotFoundError as error:  # offline; it may be optional, and the others in the cache
            self._refused = reason(error)
            return None
        except EntryNotFoundError:
            return None
        except Exception as error:
            self._refused = reason(error)
            raise self.lacks(file) from error


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
            if zipfile.is_zipfile(path) and (torn := zipfile.ZipFile(path).testzip()):  # torch does not check
                raise zipfile.BadZipFile(f"{torn} is damaged")
            with warnings.catch_warnings():  # of odd pickles, with advice that does not concern its reader
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                raise ConfigError(f"checkpoint {path} is a Git LFS pointer; fetch the file itself") from error
        raise ConfigError(
            f"checkpoint {path} cannot be read ({reason(error)}); download it again, or convert it to safetensors"
        ) from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    tensors = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not tensors or not state:
        raise ConfigError(f"checkpoint {path} holds no state dict (tensors by name) or {{'state_dict': ...}}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: If it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({reason(error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return values


def image_processor(source: Source) -> dict[str, Any]:
    """How transformers would preprocess images for this checkpoint; empty where it says nothing.

    Raises:
        ConfigError: If its file is no JSON.
    """
    both = source.find("processor_config.json")  # since transformers 5, of images and texts; it comes first there, too
    nested = read_json(both).get("image_processor") if both else None
    if isinstance(nested, dict):
        return nested
    alone = source.find("preprocessor_config.json")
    return read_json(alone) if alone else {}


def from_pretrained(kind: Any, source: Source) -> Any:
    """A model of transformers in float32, its weights checked strictly.

    Raises:
        ConfigError: If it cannot be loaded as `kind`, or a weight is missing or unexpected.
    """
    from transformers.utils import logging

    pretrained = source.pretrained
    if source.where:  # or transformers would only say that it has no connection
        source.require("config.json")
        source.require(*TRANSFORMERS)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its table of missing names would bury our line
    logging.disable_progress_bar()
    try:
        # float32: transformers otherwise follows the dtype that the file's configuration names.
        model, report = kind.from_pretrained(
            pretrained, dtype=torch.float32, weights_only=True, output_loading_info=True, **source.where
        )
    except Exception as error:
        raise ConfigError(
            f"{source.name} cannot be loaded as {kind.__name__} ({reason(error)}); "
            "give a folder or hub id that holds one"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    refuse_misfits(source.name, report["missing_keys"], report["unexpected_keys"])
    return model


def tokenizer_of(source: Source, vocabulary: int) -> Any:
    """The tokenizer beside a model of transformers that knows so many tokens.

    Raises:
        ConfigError: If there is none, or it is another model's.
    """
    from transformers import AutoTokenizer

    source.require("tokenizer.json", "vocab.json", "vocab.txt")  # without, transformers makes up an empty one
    try:
        # without code of the folder's, about which transformers would ask on a terminal
        tokenizer = AutoTokenizer.from_pretrained(source.pretrained, trust_remote_code=False, **source.where)
    except Exception as error:
        raise ConfigError(
            f"{source.name} has no tokenizer that can be loaded ({reason(error)}); put its files beside the weights"
        ) from error
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"{source.name}: its tokenizer has {len(tokenizer)} tokens, but its network only {vocabulary}"
        )
    return tokenizer


def reason(error: Exception) -> str:
    """Why something could not be read, in one line."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to turn its safety off
        return "it is damaged, or holds more than tensors, which DMDR does not load"
    if isinstance(error, KeyError) and isinstance(error.args[0], str):
        return f"it lacks '{error.args[0]}'"
    if isinstance(error, KeyError | EOFError):  # of the unpickler, which counts what it has read
        return f"it is damaged, or of another kind: {type(error).__name__}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
