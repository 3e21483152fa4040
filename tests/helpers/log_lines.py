"""Lines of `metrics.jsonl`, for tests."""

from collections.abc import Mapping
from typing import Any

TIMED = ("seconds", "samples_per_second", "peak_memory_gib", "time/")


def untimed(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line without what the clock says, which is another in each run."""
    return {name: value for name, value in line.items() if not name.startswith(TIMED)}
