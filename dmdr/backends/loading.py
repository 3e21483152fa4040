"""Reading what diffusers and transformers saved, strictly: a weight that is missing or unknown is an error."""

import json
import logging
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate import init_empty_weights
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, _add_variant
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from dmdr import hub
from dmdr.errors import ConfigError, one_line
from dmdr.states import refuse_misfits

# Weights files as diffusers and transformers name them: `model.safetensors`, `model.fp16-00001-of-00002.safetensors`.
SHARD = r"(?:-\d+-of-\d+)?"
WEIGHTS = re.compile(
    rf"(?:diffusion_pytorch_model|pytorch_model|model){SHARD}(?:\.([\w-]+?){SHARD})?\.(?:safetensors|bin)"
)
CODELESS = {"trust_remote_code": False}  # or transformers would ask on a terminal whether to run a folder's code
logger = logging.getLogger("dmdr")


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


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        folder: Local folder or hub id.
        revision: Branch, tag or commit of the hub; None for the newest.
        variant: Middle part of the weights files' names, such as fp16; None for those without.
    """

    folder: str
    revision: str | None = None
    variant: str | None = None

    def place(self, subfolder: str) -> str:
        """The component's place, for messages."""
        return f"{self.folder}/{subfolder}" if subfolder else self.folder

    def files(self, subfolder: str = "") -> dict[str, Any]:
        """Arguments of `from_pretrained` and `load_config` that say which files are meant."""
        meant = {name: value for name, value in (("subfolder", subfolder), ("revision", self.revision)) if value}
        return meant if Path(self.folder).is_dir() else meant | hub.cached_only()

    def weights(self, subfolder: str = "") -> dict[str, Any]:
        """The same of what has weights; logs which are taken where it has none of the variant that was asked for."""
        variant = self.taken(subfolder)
        if variant != self.variant:
            none = f"of --variant {self.variant}" if self.variant else "without a variant"
            them = f"of variant {variant}" if variant else "without a variant"
            logger.warning("%s has no weights %s; DMDR loads the weights %s", self.place(subfolder), none, them)
        return self.files(subfolder) | ({"variant": variant} if variant else {})

    def taken(self, subfolder: str) -> str | None:
        """The variant that is loaded of a component: as asked for, or else those without one, or else its only one."""
        there = self.variants(subfolder)
        if self.variant in there or not there:
            return self.variant
        if None in there:
            return None
        return next(iter(there)) if self.variant is None and len(there) == 1 else self.variant

    def variants(self, subfolder: str) -> set[str | None]:
        """The variants that a component has weights of, None for those without; empty where this is not known."""
        return {match[1] for match in map(WEIGHTS.fullmatch, self.names(subfolder)) if match}

    def names(self, subfolder: str) -> list[str]:
        """The files of a component; none where this is not known."""
        folder = Path(self.folder)
        if folder.is_dir():
            return [file.name for file in (folder / subfolder).glob("*")]
        try:
            paths = [Path(path) for path in hub.files(self.folder, self.revision)]
        except Exception:  # there is no such repository, or it is not in the cache; whoever loads it says so
            return []
        return [path.name for path in paths if path.parent == Path(subfolder)]

    def fetch(self, subfolder: str, name: str) -> Path:
        """One of them, on this machine; raises what `huggingface_hub` does."""
        local = Path(self.folder)
        if local.is_dir():
            return local / subfolder / name
        return hub.fetch(self.folder, str(Path(subfolder) / name), self.revision)

    def other_variants(self, subfolder: str) -> str:
        """What to say where a component's weights are there, but none that `taken` could choose."""
        there = self.variants(subfolder)
        if self.taken(subfolder) in there or not there:
            return ""
        return f"; use {' or '.join(f'--variant {variant}' for variant in sorted(map(str, there)))}"


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """A library's failure in one line of ours, and nothing of its own.

    Raises:
        ConfigError: For whatever the library raises; begins with `what`.
    """
    try:
        with quiet():
            yield
    except Exception as error:  # each library, and the hub, has its own
        raise ConfigError(f"{what}: {one_line(error)}") from error


def read_config(cls: Any, source: Source, subfolder: str = "") -> dict[str, Any]:
    """The configuration of a component, or of the pipeline itself where no subfolder is named.

    Raises:
        ConfigError: If it is missing or no JSON.
    """
    with refusing(f"{source.place(subfolder)} has no readable configuration"):
        config: dict[str, Any] = dict(cls.load_config(source.folder, **source.files(subfolder)))
    return config


def load_network(cls: Any, source: Source, subfolder: str, dtype: torch.dtype, *, meta: bool = False) -> Any:
    """A network of diffusers with its weights, in eval mode.

    Args:
        cls: Class of the network.
        source: Where the pipeline's files are.
        subfolder: The component's folder there, "" for the source itself.
        dtype: Of the weights.
        meta: Of its configuration alone, on the meta device.

    Raises:
        ConfigError: If weights are missing, unexpected or of another shape; names the first three of each.
    """
    place = source.place(subfolder)
    if meta:
        config = read_config(cls, source, subfolder)
        with refusing(f"{place} is no {cls.__name__}"), torch.device("meta"):
            network = cls.from_config(config).eval()
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.to(_dtype_of(name, network, dtype))
        return network
    with refusing(f"{place} cannot be loaded as {cls.__name__}{source.other_variants(subfolder)}"):
        network, found = cls.from_pretrained(
            source.folder, dtype=dtype, output_loading_info=True, **source.weights(subfolder)
        )
    refuse_misfits(place, found["missing_keys"], found["unexpected_keys"])
    return network.eval()


def open_network(cls: Any, source: Source, subfolder: str, dtype: torch.dtype) -> Any:
    """A network as `load_network` gives it, but its parameters take no memory and have no values; buffers have theirs.

    Raises:
        ConfigError: If its configuration cannot be read.
    """
    config = read_config(cls, source, subfolder)
    with refusing(f"{source.place(subfolder)} is no {cls.__name__}"), init_empty_weights(include_buffers=False):
        network = cls.from_config(config).eval()
    kept = network.state_dict().keys()
    for name, buffer in network.named_buffers():
        if name in kept and buffer.is_floating_point():  # as `from_pretrained` does with what the file holds
            buffer.data = buffer.to(_dtype_of(name, network, dtype))
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            own = _dtype_of(f"{path}.{name}", network, dtype)
            # On the CPU, because PEFT leaves adapters of parameters on the meta device without values.
            setattr(module, name, nn.Parameter(torch.zeros((), dtype=own).expand(parameter.shape), False))
    return network


def _dtype_of(name: str, network: Any, dtype: torch.dtype) -> torch.dtype:
    """Of a tensor that is loaded in `dtype`; a class may keep some modules in float32, as `from_pretrained` does."""
    kept = set(type(network)._keep_in_fp32_modules or ())
    return torch.float32 if kept & set(name.split(".")) else dtype


def weight_files(source: Source, subfolder: str) -> dict[str, Path]:
    """The safetensors file of each tensor of a component, by the tensor's name.

    Raises:
        ConfigError: If there are none, or the index is damaged.
    """
    place, variant = source.place(subfolder), source.taken(subfolder)
    index, single = (_add_variant(name, variant) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME))
    with refusing(f"{place} has no readable weights in safetensors files{source.other_variants(subfolder)}"):
        if index in source.names(subfolder):
            listed = json.loads(source.fetch(subfolder, index).read_text())["weight_map"]
            files = {name: source.fetch(subfolder, name) for name in sorted(set(listed.values()))}
            return {name: files[file] for name, file in listed.items()}
        file = source.fetch(subfolder, single)
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file)


def load_text_encoder(cls: Any, source: Source, subfolder: str, dtype: torch.dtype, *, meta: bool = False) -> Any:
    """A text encoder of transformers, frozen and in eval mode.

    Args:
        cls: Class of the encoder.
        source: Where the pipeline's files are.
        subfolder: The component's folder there.
        dtype: Of the weights.
        meta: Of its configuration alone, on the meta device.

    Raises:
        ConfigError: If weights are missing. Others than its own, such as an image tower's, are left out.
    """
    place = source.place(subfolder)
    if meta:
        config = read_text_config(cls, source, subfolder)
        with refusing(f"{place} is no {cls.__name__}"), torch.device("meta"):
            return cls(config).to(dtype).requires_grad_(False).eval()
    with refusing(f"{place} cannot be loaded as {cls.__name__}{source.other_variants(subfolder)}"):
        model, found = cls.from_pretrained(
            source.folder, dtype=dtype, output_loading_info=True, **CODELESS, **source.weights(subfolder)
        )
    refuse_misfits(place, found["missing_keys"], ())
    return model.requires_grad_(False).eval()


def read_text_config(cls: Any, source: Source, subfolder: str) -> Any:
    """The configuration of a text encoder of transformers.

    Raises:
        ConfigError: If it is missing or no JSON.
    """
    with refusing(f"{source.place(subfolder)} has no readable configuration"):
        return cls.config_class.from_pretrained(source.folder, **CODELESS, **source.files(subfolder))


def load_tokenizer(cls: Any, source: Source, subfolder: str) -> Any:
    """A tokenizer of transformers.

    Raises:
        ConfigError: If its files are missing or damaged.
    """
    with refusing(f"{source.place(subfolder)} holds no {cls.__name__}"):
        return cls.from_pretrained(source.folder, **CODELESS, **source.files(subfolder))


def identity(source: Source, components: Iterable[str]) -> object:
    """What changes whenever the files of these components do: digests of them, or the commit on the hub."""
    folder = Path(source.folder)
    if folder.is_dir():
        files = sorted(file for name in components for file in (folder / name).rglob("*") if file.is_file())
        return [(str(file.relative_to(folder)), digest(file)) for file in files]
    return hub.fetch(source.folder, "model_index.json", source.revision).parent.name


def digest(file: Path) -> str:
    """Of size and content, all of it up to 2 MiB; of a larger file 512 pages at even distances.

    Whatever a training changes, it changes in more than the 20 MiB that lie between two pages of 10 GiB.
    """
    size, page = file.stat().st_size, 4096
    found = blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as content:
        for start in range(0, size, max(page, size // 512)):
            content.seek(start)
            found.update(content.read(page))
    return found.hexdigest()


def load_pipeline(cls: Any, source: Source, dtype: torch.dtype, **parts: Any) -> Any:
    """A pipeline around parts that are loaded already; None is a part that it does without.

    Raises:
        ConfigError: If another part is missing or damaged.
    """
    with refusing(f"{source.folder} cannot be loaded as {cls.__name__}"):
        pipeline = cls.from_pretrained(source.folder, dtype=dtype, **source.files(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_there(flag: str, path: str | None) -> None:
    """Refuse a file that is not there, before anything heavy is loaded; what may be a hub id is let pass.

    Raises:
        ConfigError: If a path that ends as weights files do, or is no `owner/name`, leads nowhere.
    """
    if path is None or Path(path).expanduser().exists():
        return
    if Path(path).suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt") or not hub.is_hub_id(path):
        raise ConfigError(f"{flag} {path}: no such file or folder")


def read_weights(path: str, within: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a weights file by name, of any shape: safetensors, or what `torch.save` wrote of a state dict.

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
                mapped = is_zipfile(file)  # as torch saves since 1.6
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        what = "is damaged, or holds more than tensors, which DMDR does not load"
        raise ConfigError(f"{path} {what}: {one_line(error)}") from error
    if isinstance(state, Mapping):
        state = next((state[key] for key in within if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path} holds no state dict (tensors by name)")
    return dict(state)


@contextmanager
def on_device(device: torch.device, *modules: nn.Module, offload: bool) -> Iterator[None]:
    """Modules on the device; back on the CPU afterwards where they are to be offloaded.

    What a graph was built with stays, for its backward pass, until its next use without a gradient.
    """
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        if offload and not torch.is_grad_enabled():
            for module in modules:
                module.to("cpu")
