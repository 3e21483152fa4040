"""`--dry_run --gpu_memory 24`: which switches make a run fit on a GPU; each is tried by an estimate."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from dmdr.dry_run.estimate import Estimate
from dmdr.run.pace import GIB
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.settings.parse import Settings

SPARE = 0.1  # of the GPU's memory, for kernels' workspaces and what the allocator loses, which nobody counts
HELPS = 0.99  # times the memory that was needed before: a switch that leaves more is left out
logger = logging.getLogger("dmdr")


@dataclass(frozen=True)
class Fit:
    """A run on a GPU; `str` says whether it fits, and with which flags.

    Attributes:
        gpu_memory: Of the GPU, in GiB.
        flags: Switches that it needs, or that help but are not enough.
        estimate: With them.
    """

    gpu_memory: float
    flags: Sequence[str]
    estimate: Estimate

    @property
    def fits(self) -> bool:
        return self.estimate.total() <= (1 - SPARE) * self.gpu_memory * GIB

    def __str__(self) -> str:
        what = f"{self.gpu_memory:g} GiB, of which {SPARE:.0%} are left for what is not counted"
        needed, flags = f"{self.estimate.total() / GIB:.1f} GiB", " ".join(self.flags)
        if self.fits:
            return f"does not fit in {what}; with these it takes {needed}:\n  {flags}" if flags else f"fits in {what}"
        tried = f"; with {flags} it needs {needed}" if flags else ""
        return f"does not fit in {what}{tried}; several GPUs can share the network: --shard all"


def fitted(estimate: Estimate, settings: Settings, again: Callable[[Sequence[str]], Estimate]) -> Fit:
    """What makes a run fit on its GPU.

    Args:
        estimate: Of the run.
        settings: Of the run; `gpu_memory` is the GPU's, in GiB.
        again: The estimate of the run with further flags.
    """
    assert settings.config.gpu_memory
    fit = Fit(settings.config.gpu_memory, (), estimate)
    for switch in switches(settings):
        if fit.fits:
            break
        flags = list(fit.flags)
        more = [*(flags[:-2] if switch[0] in flags[-2:] else flags), *switch]  # a second value replaces the first
        logger.warning("%.1f GiB are too many; trying %s", fit.estimate.total() / GIB, " ".join(more))
        found = again(more)
        if found.total() <= HELPS * fit.estimate.total():
            fit = replace(fit, flags=more, estimate=found)
    return fit


def switches(settings: Settings) -> Iterator[list[str]]:
    """What saves memory and is not yet in use, in the order in which it is tried."""
    config, options = settings.config, settings.family.options
    if not options.get("gradient_checkpointing", True):
        yield ["--gradient_checkpointing", "true"]
    if options.get("decode_chunk_size", 1) is None:
        yield ["--decode_chunk_size", "1"]
    full = options.get("full_finetune") or options.get("fake_score") == "full"
    if (smaller := OPTIMIZERS[config.optim].smaller) and (config.shard == "1" or not full):
        yield ["--optim", smaller]
    batch, least = config.per_device_train_batch_size, config.num_generations
    if batch > least:
        passes = config.gradient_accumulation_steps * (batch // least)
        yield ["--per_device_train_batch_size", str(least), "--gradient_accumulation_steps", str(passes)]
    if options.get("vae_tiling") is False:
        yield ["--vae_tiling", "true"]
    packable = "quantize" in options and not full and config.shard == "1"
    if packable and options["quantize"] is None:
        yield from (["--quantize", "int8"], ["--quantize", "nf4"])
