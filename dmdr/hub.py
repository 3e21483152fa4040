"""The Hugging Face hub.

Without a connection, its library tries for half a minute to get each file. Here the hub is asked once whether it
answers; if it does not, only its cache on this machine is read.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from dmdr.errors import one_line

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


@cache
def _silence() -> str:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the network, a proxy, certificates
        return f"{constants.ENDPOINT} does not answer: {one_line(error)}"
    return ""
