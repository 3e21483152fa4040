"""The Hugging Face hub. Without a connection its library tries again for half a minute for each file; here it is asked
once whether it is there.
"""

import re
from functools import cache
from pathlib import Path

from dmdr.errors import one_line

SECONDS = 3.0  # after which a hub that has not answered is taken for out of reach
OFFLINE = "HF_HUB_OFFLINE is set"


def is_hub_id(name: str) -> bool:
    """Whether this may be an id on the hub, `owner/name`, and not only a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def unreachable() -> str:
    """Why no more of the hub is to be had than its cache on this machine, in one line; empty if it answers."""
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
def _silence() -> str:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the network, a proxy, certificates
        return f"{constants.ENDPOINT} does not answer: {one_line(error)}"
    return ""
