"""Artefacts: those that the package holds, and others that are built once, each complete or absent."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from dmdr.cache import cache_folder
from dmdr.errors import ConfigError

VERSION = 2  # raise it whenever what a build writes changes, and run `python -m dmdr_digits`
PACKAGED = Path(__file__).parent / "built"


def budget() -> float:
    """Share of the full training length, `DMDR_DIGITS_BUDGET`; 1 by default."""
    text = os.environ.get("DMDR_DIGITS_BUDGET") or "1"
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100:
        raise ConfigError(f"DMDR_DIGITS_BUDGET={text} must be above 0 and below 100; 1 is the full training length")
    return value


def scaled(steps: int) -> int:
    """Training steps within the budget, of `steps` at the full one."""
    return max(1, round(steps * budget()))


def root() -> Path:
    """The folder of all artefacts of this version and budget, under `DMDR_CACHE` or ~/.cache/dmdr."""
    return cache_folder() / f"digits-v{VERSION}-b{budget():g}"


def cached(name: str, build: Callable[[Path], None], *, seed: int = 0) -> Path:
    """The folder of an artefact: the package's own, unless `DMDR_DIGITS_BUDGET` asks for a training of its own.

    One that the package lacks is built by `build(folder)` on first use, from this seed.
    The build works beside its final place and is renamed when it is complete; one process builds, others wait for it.
    """
    if not os.environ.get("DMDR_DIGITS_BUDGET") and (PACKAGED / name).exists():
        return PACKAGED / name
    target = root() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{name}.lock")):
        if not target.exists():
            partial = target.with_name(f"{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed: nobody else holds the lock
            partial.mkdir()
            with isolated(seed):
                build(partial)
            partial.rename(target)
    return target


@contextmanager
def isolated(seed: int = 0) -> Iterator[None]:
    """Seed the CPU generator, use one thread and enable gradients; the caller's state comes back unchanged.

    One thread makes the result independent of the number of cores, and these models are too small for more.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the caller's GPUs, too
            yield
    finally:
        torch.set_num_threads(threads)
