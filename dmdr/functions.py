"""Plugins that are no installed package: `path/to/file.py:name` and `package.module:name`, and functions as rewards."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from dmdr.errors import ConfigError


def load_object(target: str) -> Any:
    """The object that `path/to/file.py:name` or `package.module:name` means; a file is executed anew each time.

    Raises:
        ConfigError: If there is no such file, module or name, or it cannot be imported.
    """
    module, _, name = target.rpartition(":")
    try:
        found = _execute(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = "" if module.endswith(".py") else "; a file is given as path/to/file.py:name"
        raise ConfigError(f"'{target}' cannot be imported: {error}{hint}") from error
    except Exception as error:
        raise ConfigError(f"'{target}' cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(found, name):
        raise ConfigError(f"'{target}': there is no '{name}' in {module}")
    return getattr(found, name)


def _execute(file: Path) -> Any:
    file = file.expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    name = f"dmdr_file_{file.stem}_{blake2b(bytes(file), digest_size=4).hexdigest()}"  # files may share a stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the types of dataclass fields are looked up
    spec.loader.exec_module(module)
    return module


def as_reward(function: Callable[..., Any], target: str) -> type:
    """A function `score(images, prompts, **columns)` as a reward class without flags and without gradient.

    It is given images [B, 3, H, W] float32 in [0, 1], B prompts and the further columns of the prompt rows. It returns
    B floats; None is a sample that it cannot judge.

    Raises:
        ConfigError: If it cannot be called like that.
    """
    try:
        inspect.signature(function).bind(None, None, **{"any column": None})
    except (TypeError, ValueError) as error:
        text = f"reward '{target}' must be callable as score(images, prompts, **columns): {error}"
        raise ConfigError(text) from error

    @dataclass
    class FunctionReward:
        differentiable: ClassVar[bool] = False

        def prepare(self, device: Any, dtype: Any) -> None:
            pass

        def __call__(self, images: Any, prompts: Sequence[str], **columns: Sequence[Any]) -> Any:
            import torch  # only here: `--help` lists flags without it

            with torch.no_grad():
                scores = function(images, prompts, **columns)
            numbers = [float("nan") if score is None else float(score) for score in scores]
            return torch.tensor(numbers, dtype=torch.float32, device=images.device)

    return FunctionReward
