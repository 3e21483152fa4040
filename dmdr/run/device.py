"""Device and precision of a process, and messages between the processes of a run."""

import gc
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed.nn  # before a process group is there, as `training.learner` says
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dmdr.errors import ConfigError, TrainingError, one_line

T = TypeVar("T")
logger = logging.getLogger("dmdr")
PRECISIONS = ("no", "bf16", "fp16")


def avoid_mps() -> None:
    """Stay on the CPU where the only accelerator is one without float64, in which times and weights are kept."""
    if torch.backends.mps.is_available() or not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def chosen_precision(given: str | None, *, gpu: bool) -> str:
    """The precision of the networks: the one given, else `accelerate launch`'s, else bf16 on a GPU and no on a CPU.

    Raises:
        ConfigError: If the launcher names one that no network is computed in here.
    """
    chosen = given or os.environ.get("ACCELERATE_MIXED_PRECISION") or ("bf16" if gpu else "no")
    if chosen not in PRECISIONS:
        raise ConfigError(f"accelerate launch --mixed_precision {chosen}: expected {', '.join(PRECISIONS)}")
    return chosen


def join_processes(*, cpu: bool = False, **options: Any) -> PartialState:
    """The group of this process: it finds the others, and is told where it computes.

    Raises:
        ConfigError: If it has left them after an earlier run: they would wait for each other.
    """
    if PartialState._shared_state and PartialState().use_distributed and not torch.distributed.is_initialized():
        raise ConfigError("these processes have already made a run: start new ones for the next run")
    # Processes on CPUs find each other only if told that they are.
    return PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), **options)


def open_accelerator(mixed_precision: str | None, **options: Any) -> Accelerator:
    """An accelerator of this precision, or of the default one, whatever an earlier run of this process had.

    On a GPU, float32 products are computed in TF32.

    Raises:
        ConfigError: If the device cannot compute in it.
    """
    gpu = join_processes().device.type != "cpu"
    mixed_precision = chosen_precision(mixed_precision, gpu=gpu)
    if gpu:
        torch.set_float32_matmul_precision("high")
        logger.info("precision %s; float32 products are computed in TF32", mixed_precision)
        if mixed_precision == "no":
            logger.warning("float32 networks on a GPU take twice the memory and several times as long as bf16")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, **options)
    except ValueError as error:
        raise ConfigError(f"--mixed_precision {mixed_precision}: {one_line(error)}") from error
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":  # where accelerate has no autocast to it
        raise ConfigError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    return accelerator


def mesh_of(count: int, accelerator: Any) -> DeviceMesh:
    """The processes in shares of `count` neighbours; where there are several shares, they are the first dimension."""
    processes, kind = accelerator.num_processes, accelerator.device.type
    if count == processes:
        return init_device_mesh(kind, (count,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (processes // count, count), mesh_dim_names=("replicate", "shard"))


def refuse_other_engines() -> None:
    """Refuse a launcher that wants the networks wrapped.

    Raises:
        ConfigError: Says what to use instead.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ConfigError(
                f"accelerate launch with {name} does not work here; launch without it, and add --shard all"
            )


def free_memory() -> None:
    """Give back what networks held that nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def on_main_process(state: PartialState | Accelerator, decide: Callable[[], T]) -> T:
    """What the main process decided, in every process.

    Raises:
        ConfigError, TrainingError: In every process, if the main one met it. Of another error the main process has the
            error itself, and the others a TrainingError.
    """
    answer: list[Any] = [None]
    with failing_together():
        if state.is_main_process:
            answer = [decide()]
    broadcast_object_list(answer)
    decided: T = answer[0]
    return decided


@contextmanager
def failing_together() -> Iterator[None]:
    """A block that all processes enter: if one of them fails inside, all fail at its end.

    Raises:
        ConfigError, TrainingError: In every process, if one met it. Of another error that process has the error itself,
            and the others a TrainingError.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # of which the others know nothing yet
        failure = error
    told = None
    if failure:
        kind = ConfigError if isinstance(failure, ConfigError) else TrainingError
        told = kind(str(failure) if isinstance(failure, kind) else one_line(failure))
    try:
        answers = gather_object([told])
    except RuntimeError as error:  # the backend's, whose connection is closed
        raise failure or TrainingError(f"another process has ended: {one_line(error)}") from error
    if found := failure or next(filter(None, answers), None):
        raise found


def rounds(own: Iterator[T]) -> Iterator[list[T]]:
    """What all processes make of their own, in rounds: one item of each, then the next, until none has any left.

    Raises:
        ConfigError, TrainingError: As `failing_together`.
    """
    while True:
        with failing_together():
            item = list(islice(own, 1))  # none at the end
        items: list[T] = gather_object(item)
        if not items:
            return
        yield items


def share_of(state: PartialState | Accelerator, count: int, *, padded: bool = True) -> list[int]:
    """Indices of the images that are this process's share of `count`: neighbours.

    Args:
        state: The processes.
        count: Images of all of them.
        padded: All shares are as long, the last image filling up the last ones: processes that share a network
            (--shard) make the same passes. Otherwise each image is in one share only, and the last ones may be empty.
    """
    length = math.ceil(count / state.num_processes)
    start = state.process_index * length
    return [min(index, count - 1) for index in range(start, start + length) if padded or index < count]


def together(accelerator: Accelerator, values: Tensor, count: int) -> Tensor:
    """The values of all processes' shares of `count` images in their order, [B, ...] -> [count, ...]."""
    if accelerator.num_processes > 1:
        values = accelerator.gather(values.to(accelerator.device)).to(values.device)
    return values[:count]
