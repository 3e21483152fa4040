"""Reading what diffusers and transformers saved, strictly: a weight that is missing or unknown is an error."""

import logging
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from dmdr.errors import ConfigError
from dmdr.states import refuse_misfits


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' warnings and bars, where we say ourselves what is wrong."""
    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    bars = transformers_logging.is_progress_bar_enabled()
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """A library's failure in one line of ours, and nothing of its own."""
    try:
        with quiet():
            yield
    except Exception as error:  # each library, and the hub, has its own
        raise ConfigError(f"{what}: {one_line(error)}") from error


def read_config(cls: Any, folder: str, subfolder: str = "") -> dict[str, Any]:
    """The configuration of a component, or of the pipeline itself where no subfolder is named.

    Raises:
        ConfigError: If it is missing or no JSON.
    """
    with _refusing(f"{_where(folder, subfolder)} has no readable configuration"):
        config: dict[str, Any] = dict(cls.load_config(folder, **({"subfolder": subfolder} if subfolder else {})))
    return config


def load_network(cls: Any, folder: str, subfolder: str, dtype: torch.dtype) -> Any:
    """A network of diffusers with its weights, in eval mode.

    Raises:
        ConfigError: If weights are missing, unexpected or of another shape; names the first three of each.
    """
    where = _where(folder, subfolder)
    extra = {"subfolder": subfolder} if subfolder else {}
    with _refusing(f"{where} cannot be loaded as {cls.__name__}"):
        network, found = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **extra)
    refuse_misfits(where, found["missing_keys"], found["unexpected_keys"])
    return network.eval()


def build_network(cls: Any, folder: str, subfolder: str, dtype: torch.dtype) -> Any:
    """The network that `load_network` would give, on the meta device: of its configuration, without weights.

    Raises:
        ConfigError: If there is no configuration, or no such network.
    """
    config = read_config(cls, folder, subfolder)
    with _refusing(f"{_where(folder, subfolder)} is no {cls.__name__}"), torch.device("meta"):
        return cls.from_config(config).to(dtype).eval()


def load_text_encoder(cls: Any, folder: str, subfolder: str, dtype: torch.dtype) -> Any:
    """A text encoder of transformers, frozen and in eval mode.

    Raises:
        ConfigError: If weights are missing. Others than its own, such as an image tower's, are left out.
    """
    where = _where(folder, subfolder)
    with _refusing(f"{where} cannot be loaded as {cls.__name__}"):
        model, found = cls.from_pretrained(folder, subfolder=subfolder, dtype=dtype, output_loading_info=True)
    refuse_misfits(where, found["missing_keys"], ())
    return model.requires_grad_(False).eval()


def read_text_config(cls: Any, folder: str, subfolder: str) -> Any:
    """The configuration of a text encoder of transformers.

    Raises:
        ConfigError: If it is missing or no JSON.
    """
    with _refusing(f"{_where(folder, subfolder)} has no readable configuration"):
        return cls.config_class.from_pretrained(folder, subfolder=subfolder)


def build_text_encoder(cls: Any, folder: str, subfolder: str, dtype: torch.dtype) -> Any:
    """The text encoder that `load_text_encoder` would give, on the meta device.

    Raises:
        ConfigError: If there is no configuration, or no such encoder.
    """
    config = read_text_config(cls, folder, subfolder)
    with _refusing(f"{_where(folder, subfolder)} is no {cls.__name__}"), torch.device("meta"):
        model = cls(config).to(dtype)
    return model.requires_grad_(False).eval()


def load_tokenizer(cls: Any, folder: str, subfolder: str) -> Any:
    """A tokenizer of transformers.

    Raises:
        ConfigError: If its files are missing or damaged.
    """
    with _refusing(f"{_where(folder, subfolder)} holds no {cls.__name__}"):
        return cls.from_pretrained(folder, subfolder=subfolder)


def identity(folder: str, components: Iterable[str]) -> object:
    """What changes whenever the files of these components do: sizes and times, or the commit on the hub."""
    if Path(folder).is_dir():
        files = sorted(file for name in components for file in (Path(folder) / name).rglob("*") if file.is_file())
        return [(file.parent.name, file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(folder, "model_index.json")).parent.name


def load_pipeline(cls: Any, folder: str, dtype: torch.dtype, **parts: Any) -> Any:
    """A pipeline around parts that are loaded already; None is a part that it does without.

    Raises:
        ConfigError: If another part is missing or damaged.
    """
    with _refusing(f"{folder} cannot be loaded as {cls.__name__}"):
        pipeline = cls.from_pretrained(folder, dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def read_weights(path: str, within: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a weights file: safetensors, or what `torch.save` wrote of a state dict.

    Args:
        path: The file.
        within: Keys of a training checkpoint that may hold the state dict; the first that is there does.

    Raises:
        ConfigError: If there is no such file, or it holds more than tensors: a pickle that could run code is refused.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{path} is no file; expected weights, as .safetensors or a torch state dict")
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            # Training checkpoints often keep their command line, too; a Namespace can hold values only.
            with torch.serialization.safe_globals([Namespace]):
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ConfigError(f"{path} is damaged, or holds more than tensors and is refused") from error
    if isinstance(state, Mapping):
        state = next((state[key] for key in within if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path} is no table of tensors; expected a state dict")
    return dict(state)


def merge_lora(pipeline: Any, network_name: str, path: str) -> dict[str, Tensor]:
    """Merge a LoRA file into the pipeline's network, as its user would with `load_lora_weights` and `fuse_lora`.

    Returns:
        The merged layers at full strength, float32: `<module>.lora_A.weight` and `<module>.lora_B.weight`.

    Raises:
        ConfigError: If it cannot be read, or no layer of the network is among it.
    """
    from peft.tuners.lora import LoraLayer

    network: nn.Module = getattr(pipeline, network_name)
    with _refusing(f"--teacher_lora {path} cannot be loaded"):
        pipeline.load_lora_weights(path, adapter_name="teacher")
    layers = {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer) and "teacher" in m.lora_A}
    if not layers:
        raise ConfigError(f"--teacher_lora {path}: no key of it belongs to a layer of the {network_name}")
    merged: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a, b = (getattr(layer, part)["teacher"].weight.detach().float().cpu() for part in ("lora_A", "lora_B"))
        merged[f"{name}.lora_A.weight"], merged[f"{name}.lora_B.weight"] = a.clone(), b * layer.scaling["teacher"]
    with quiet():
        pipeline.fuse_lora(adapter_names=["teacher"])
        pipeline.unload_lora_weights()
    return merged


def one_line(error: BaseException) -> str:
    """The first line of what a library says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _where(folder: str, subfolder: str) -> str:
    return f"{folder}/{subfolder}" if subfolder else folder
