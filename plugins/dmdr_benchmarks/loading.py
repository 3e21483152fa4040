"""Networks of transformers, from a folder or the hub; every failure is one line."""

from pathlib import Path
from typing import Any

import torch

from dmdr.errors import ConfigError, MissingFile, one_line
from dmdr.hub import cached_only, is_hub_id, unreachable
from dmdr.states import refuse_misfits


def load(kind: Any, name: str, option: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen model in eval mode.

    Args:
        kind: Its class in transformers, or an `AutoModel`.
        name: A folder or hub id.
        option: The field of the benchmark that names it.
        device, dtype: Where it runs, and in what precision.

    Raises:
        ConfigError: If it is missing, damaged, of another kind, or lacks a weight.
    """
    safely = {"weights_only": True, "output_loading_info": True}  # a pickle that could run code is refused
    model, report = _from_pretrained(kind, name, option, dtype=dtype, **safely)
    # Its configuration says what it has: tensors beside that are leftovers of older releases, and do no harm.
    weights = {name for name, _ in model.named_parameters()}
    refuse_misfits(f"{option} {name}", weights.intersection(report["missing_keys"]), ())
    return model.to(device).eval().requires_grad_(False)


def load_beside(kind: Any, name: str, option: str, **options: Any) -> Any:
    """A tokenizer or processor that lies beside a model.

    Args:
        kind: An `Auto` class of transformers.
        name, option: As of `load`.
        options: For its `from_pretrained`.

    Raises:
        ConfigError: If it is missing or damaged.
    """
    return _from_pretrained(kind, name, option, **options)


def _from_pretrained(kind: Any, name: str, option: str, **options: Any) -> Any:
    from dmdr.backends.loading import quiet  # which imports diffusers

    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or not is_hub_id(name)):
        raise ConfigError(f"{option} {name} is no folder; give one of a model of transformers, or a hub id as org/name")
    where = {} if path.is_dir() else cached_only()
    try:
        with quiet():  # transformers' table of missing names would bury our line
            # Code of the folder's is not run, about which transformers would ask on a terminal.
            return kind.from_pretrained(
                str(path) if path.is_dir() else name, trust_remote_code=False, **options, **where
            )
    except Exception as error:  # of transformers, safetensors, the hub and the network
        if where and isinstance(error, OSError):  # it is not in the cache
            raise MissingFile(f"{option} {name} cannot be fetched from the hub ({unreachable()})", option) from error
        raise ConfigError(
            f"{option} {name} cannot be loaded as {kind.__name__} ({one_line(error)}); "
            "give a folder or hub id that holds one"
        ) from error
