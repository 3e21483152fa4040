"""The Hugging Face hub, and what its library `datasets` reads from there or from this machine.

Without a connection, its library tries for half a minute to get each file. Here the hub is asked once whether it
answers; if it does not, only its cache on this machine is read.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dmdr.errors import ConfigError, one_line

SECONDS = 3.0  # a hub that does not answer within this time is out of reach
OFFLINE = "HF_HUB_OFFLINE is set"


def is_hub_id(name: str) -> bool:
    """Whether this may be an id on the hub, `owner/name`, and not only a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def unreachable() -> str:
    """Why only the cache can be read, in one line; empty if the hub answers."""
    from huggingface_hub import constants

    return OFFLINE if constants.HF_HUB_OFFLINE else _silence()


def cached_only() -> dict[str, bool]:
    """The argument of all loaders of the hub that keeps them to its cache, where it is out of reach."""
    return {"local_files_only": True} if unreachable() else {}


def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """A file of the hub, on this machine; raises what `huggingface_hub` does."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, revision=revision, local_files_only=bool(unreachable())))


@cache
def files(repository: str, revision: str | None = None) -> Sequence[str]:
    """Paths of a repository's files, or of those in the cache; raises what `huggingface_hub` does."""
    from huggingface_hub import list_repo_files, snapshot_download

    if not unreachable():
        return list_repo_files(repository, revision=revision)
    folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    return [str(file.relative_to(folder)) for file in folder.rglob("*")]


def open_dataset(name: str, config: str | None, split: str, *, streaming: bool, how: tuple[str, str]) -> Any:
    """A split of a dataset: `datasets.Dataset`, or an `IterableDataset`.

    Args:
        name: A folder that `datasets` reads or saved, or an id on the hub.
        config, split: As `datasets` calls them.
        streaming: Of what it did not save: read it row by row where it is, without a copy.
        how: The flag that named it, and how another split is chosen, for messages.

    Raises:
        ConfigError: If the hub does not answer, or a saved dataset has no such split. Else what `datasets` raises.
    """
    flag, other = how
    place = Path(name)
    with quiet_datasets():
        from datasets import Dataset, load_dataset, load_from_disk

        if any((place / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(name)
            if isinstance(saved, Dataset):
                return saved
            if split not in saved:
                raise ConfigError(f"{flag}: {name} has no split '{split}' ({other}); it has {', '.join(saved)}")
            return saved[split]
        if not place.is_dir() and (why := unreachable()) not in ("", OFFLINE):  # which costs `datasets` half a minute
            what = f"no such file, and {why}; set HF_HUB_OFFLINE=1 to read a dataset from the cache"
            raise ConfigError(f"{flag}: {name}: {what}")
        return load_dataset(name, config, split=split, streaming=streaming)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the library's words on what we refuse in our own. Imports it: most of a second, and 80 MB."""
    from datasets import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@cache
def _silence() -> str:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the network, a proxy, certificates
        return f"{constants.ENDPOINT} does not answer: {one_line(error)}"
    return ""
