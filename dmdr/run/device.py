"""Device and precision of a process, and messages between the processes of a run."""

import logging
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
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


def join_processes(**options: Any) -> PartialState:
    """The group of this process: it finds the others, and is told where it computes."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # processes on CPUs find each other only if told that they are
    return PartialState(cpu=cpu, **options)


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
        raise ConfigError("--mixed_precision fp16 needs a GPU; a CPU takes bf16 or no")
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
                f"accelerate launch with {name}: DMDR shards by itself; launch without it, with --shard all"
            )


def on_main_process(state: PartialState | Accelerator, decide: Callable[[], T]) -> T:
    """What the main process decided, in every process.

    Raises:
        ConfigError, TrainingError: In every process, if the main one met it. Of another error the main process has the
            error itself, and the others a TrainingError.
    """
    answer: list[Any] = [None]
    failure: Exception | None = None
    if state.is_main_process:
        try:
            answer = [decide()]
        except Exception as error:  # which the others would wait for
            failure = error
            answer = [ConfigError(str(error)) if isinstance(error, ConfigError) else TrainingError(one_line(error))]
    broadcast_object_list(answer)
    if failure:
        raise failure
    if isinstance(answer[0], ConfigError | TrainingError):
        raise answer[0]
    decided: T = answer[0]
    return decided


def share_of(accelerator: Accelerator, count: int) -> list[int]:
    """Indices of the images that this process draws of `count`: neighbours.

    All shares are as long, the last image filling up the last ones: processes that share a network (--shard) make the
    same passes.
    """
    length = math.ceil(count / accelerator.num_processes)
    start = accelerator.process_index * length
    return [min(index, count - 1) for index in range(start, start + length)]


def together(accelerator: Accelerator, values: Tensor, count: int) -> Tensor:
    """The values of all processes' shares of `count` images in their order, [B, ...] -> [count, ...]."""
    if accelerator.num_processes > 1:
        values = accelerator.gather(values.to(accelerator.device)).to(values.device)
    return values[:count]
