"""Finding, reading and checking checkpoints; every failure is one line.

For the meta device, on which --dry_run counts memory, nothing is fetched and no weights are read: a checkpoint on this
machine says its architecture by its configuration or the shapes in it, and that of the published one is in the code.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
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
        meta: Whether it is for the meta device.
        known: Whether its architecture is in the code, and no file of it is looked for: the published one, for the meta
            device.
    """

    def __init__(
        self, checkpoint: str | None, published: str, device: torch.device, option: str = "checkpoint"
    ) -> None:
        """Look for it; a single file on the hub is fetched.

        Args:
            checkpoint: What is named; None for the published one.
            published: The published one.
            device: Where the network will be.
            option: The reward's option that names it.

        Raises:
            ConfigError: If there is none.
        """
        checkpoint = checkpoint or published
        path = Path(checkpoint).expanduser()
        self.name = f"checkpoint {checkpoint}"
        self.folder = path if path.is_dir() else None
        self.file = path if path.is_file() else None
        if path.exists() and not (self.folder or self.file):
            raise ConfigError(f"{self.name} is neither a file nor a folder")
        self._option = option
        self._repo = ""
        self._refused = ""  # why the hub did not give what it was asked for
        self.meta = device.type == "meta"
        self.known = self.meta and checkpoint == published and not path.exists()
        if not (self.known or path.exists()):
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
        if not self._repo:
            return {}
        return {"local_files_only": True} if self.meta else cached_only()

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
        if self._repo and self.meta:
            what = f"{self.name} cannot be built without its files: {' or '.join(names)} is not in the hub's cache here"
            return MissingFile(what, self._option)
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
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        if self.meta:
            cached = try_to_load_from_cache(self._repo, file)
            return Path(cached) if isinstance(cached, str) else None
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


def read_state(path: Path, *, meta: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights file, on the CPU; `{"state_dict": ...}` and a leading `module.` are unwrapped.

    Args:
        path: The file.
        meta: On the meta device: what the file says about its tensors, without their values.

    Raises:
        ConfigError: If it cannot be read, or holds anything but tensors: a pickle that could run code is refused.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            zipped = zipfile.is_zipfile(path)
            if zipped and not meta and (torn := zipfile.ZipFile(path).testzip()):  # torch does not check
                raise zipfile.BadZipFile(f"{torn} is damaged")
            with warnings.catch_warnings():  # of odd pickles, with advice that does not concern its reader
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and meta)
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
    return {key: value.to("meta") for key, value in state.items()} if meta else state


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


def from_pretrained(kind: Any, source: Source, published: Mapping[str, Any]) -> Any:
    """A model of transformers in float32, its weights checked strictly; on the meta device of its configuration alone.

    Args:
        kind: Class of the model.
        source: A folder or hub id with it.
        published: The configuration of the published one.

    Raises:
        ConfigError: If it cannot be loaded as `kind`, or a weight is missing or unexpected.
    """
    from transformers.utils import logging

    pretrained = source.pretrained
    if source.meta:
        config = published if source.known else read_json(source.require("config.json"))
        return _without_weights(kind, config, source.name)
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


def _without_weights(kind: Any, config: Mapping[str, Any], what: str) -> Any:
    """A model of transformers on the meta device."""
    own = kind.config_class.model_type
    try:
        if config.get("model_type", own) != own:
            raise ValueError(f"its config.json is of a {config['model_type']}")
        with torch.device("meta"):
            return kind(kind.config_class.from_dict(dict(config)))
    except Exception as error:  # whatever odd settings lead to
        raise ConfigError(f"{what} cannot be built as {kind.__name__} ({reason(error)})") from error


def tokenizer_of(source: Source, vocabulary: int) -> Any:
    """The tokenizer beside a model of transformers that knows so many tokens; any tokens where nothing is read.

    Raises:
        ConfigError: If there is none, or it is another model's.
    """
    from transformers import AutoTokenizer

    if source.known:
        return _any_tokens
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


def _any_tokens(prompts: Sequence[str], *, max_length: int, **options: Any) -> Any:
    """What a tokenizer that pads to `max_length` gives: ids and mask, [B, max_length] each."""
    from transformers import BatchEncoding

    ids = torch.zeros(len(prompts), max_length, dtype=torch.long)
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


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
