"""The folder for files that are built or computed once and used again."""

import os
from hashlib import blake2b
from pathlib import Path


def cache_folder() -> Path:
    """`DMDR_CACHE`, or else `~/.cache/dmdr`; it need not exist yet."""
    return Path(os.environ.get("DMDR_CACHE") or "~/.cache/dmdr").expanduser()


def fingerprint(*settings: object) -> str:
    """A folder's name, 32 hexadecimal digits, for the settings that its content depends on."""
    return blake2b(repr(settings).encode(), digest_size=16).hexdigest()
