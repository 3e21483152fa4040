"""Where things are kept that are built or computed once."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`DMDR_CACHE`, or else `~/.cache/dmdr`; it need not exist yet."""
    return Path(os.environ.get("DMDR_CACHE", Path.home() / ".cache" / "dmdr"))
