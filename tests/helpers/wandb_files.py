"""What a wandb run in offline mode has written, for tests."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 2**15  # bytes; of LevelDB's log format, after a header of 7


def records(file: Path) -> list[Any]:
    """The records of a finished `run-*.wandb`, as `wandb_internal_pb2.Record`; a process of wandb's own writes them."""
    until = time.monotonic() + 60
    while True:
        found = list(_read(file.read_bytes()))
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() < until, f"{file} has no end"
        time.sleep(0.1)


def _read(content: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    place, parts = 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:  # no room for a header: the rest of a block is empty
            place += BLOCK - place % BLOCK
            continue
        end, kind = place + 7 + int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if end > len(content):
            return
        parts += content[place + 7 : end]
        place = end
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""
