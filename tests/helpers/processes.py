"""A function run by several processes that make a group, as torchrun starts them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

PRELOADED = ["dmdr.run.run", "dmdr_sd3"]  # by the process that the others are forks of: imports take seconds


def start(work: Callable[..., None], count: int, *arguments: Any, machine: int | None = None) -> None:
    """Run `work(rank, *arguments)` in `count` processes on the CPU, `machine` of them on each; wait for their ends."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": count}
    place |= {"LOCAL_WORLD_SIZE": machine or count, "ACCELERATE_USE_CPU": "true"}
    torch.multiprocessing.start_processes(begin, (work, place, arguments), nprocs=count, start_method="forkserver")


def begin(rank: int, work: Callable[..., None], place: dict[str, Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update({key: str(value) for key, value in place.items()} | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    work(rank, *arguments)
