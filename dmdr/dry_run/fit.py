"""`--dry_run --gpu_memory 24`: which switches make a run fit on a GPU; each is tried by an estimate."""

import logging
from collections.abc import Callable, Iterator, Sequence

from dmdr.dry_run.estimate import Estimate
from dmdr.run.pace import GIB
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.settings.parse import Settings

SPARE = 0.1  # of the GPU's memory, for kernels' workspaces and what the allocator loses, which nobody counts
HELPS = 0.99  # times the memory that was needed before: a switch that leaves more is left out
logger = logging.getLogger("dmdr")


def advice(estimate: Estimate, settings: Settings, again: Callable[[Sequence[str]], Estimate]) -> str:
    """Whether a run fits, or what to add to its command line so that it does.

    Args:
        estimate: Of the run.
        settings: Of the run; `gpu_memory` is the GPU's, in GiB.
        again: The estimate of the run with further flags.
    """
    gpu_memory = settings.config.gpu_memory
    assert gpu_memory
    room = (1 - SPARE) * gpu_memory * GIB
    what = f"{gpu_memory:g} GiB, of which {SPARE:.0%} are left for what is not counted"
    if estimate.total() <= room:
        return f"fits in {what}"
    flags: list[str] = []
    for switch in switches(settings):
        more = [*(flags[:-2] if switch[0] in flags[-2:] else flags), *switch]  # a second value replaces the first
        logger.warning("%.1f GiB are too many; trying %s", estimate.total() / GIB, " ".join(more))
        found = again(more)
        if found.total() > HELPS * estimate.total():
            continue
        flags, estimate = more, found
        if estimate.total() <= room:
            return f"does not fit in {what}; with these it takes {estimate.total() / GIB:.1f} GiB:\n  {' '.join(flags)}"
    tried = f"; with {' '.join(flags)} it needs {estimate.total() / GIB:.1f} GiB" if flags else ""
    return f"does not fit in {what}{tried}; several GPUs can share the network: --shard all"


def switches(settings: Settings) -> Iterator[list[str]]:
    """What saves memory and is not yet in use, in the order in which it is tried."""
    config, options = settings.config, settings.family.options
    if not options.get("gradient_checkpointing", True):
        yield ["--gradient_checkpointing", "true"]
    if options.get("decode_chunk_size", 1) is None:
        yield ["--decode_chunk_size", "1"]
    if (smaller := OPTIMIZERS[config.optim].smaller) and config.shard == "1":
        yield ["--optim", smaller]
    batch, least = config.per_device_train_batch_size, config.num_generations
    if batch > least:
        passes = config.gradient_accumulation_steps * (batch // least)
        yield ["--per_device_train_batch_size", str(least), "--gradient_accumulation_steps", str(passes)]
    if options.get("vae_tiling") is False:
        yield ["--vae_tiling", "true"]
    packable = "quantize" in options and not options.get("full_finetune") and config.shard == "1"
    if packable and options["quantize"] is None:
        yield from (["--quantize", "int8"], ["--quantize", "nf4"])
