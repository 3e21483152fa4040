"""One process of the benchmark: builds a loop, then takes a step whenever it is told to.

    python -m examples.benchmarks.worker CASE OBJECTIVE dmdr|plain FOLDER

A line on the standard input is answered by a line of JSON on the standard output. `step` is timed; in `count` the
floating-point operations are counted, in `memory` the tensors that are alive, and in `profile` the time that is spent
within torch's operators.
"""

import gc
import json
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dmdr.protocols import CachesPrompts
from dmdr.run.device import open_accelerator
from dmdr.run.job import assemble
from dmdr.run.trainers import Trainers
from dmdr.settings.parse import Settings, parse
from dmdr.training.phases import Clock
from dmdr.types import dtype_of

from .cases import CASES
from .plain import Plain


class Joint:
    """The trainer of a run's first stage, as `dmdr-train` builds it."""

    def __init__(self, settings: Settings, accelerator: Any) -> None:
        job = assemble(settings)
        backend, device = job.backend, accelerator.device
        if isinstance(backend, CachesPrompts):
            backend.cache_prompts(accelerator, [row["prompt"] for row in job.prompts.first(job.prompts.size or 1)])
        if job.rewards:
            job.rewards.prepare(device, dtype_of(job.config.reward_dtype))
        backend.prepare(accelerator, roles=job.plan.roles)
        scaler = torch.amp.GradScaler(device.type, enabled=accelerator.mixed_precision == "fp16")
        self.trainer = Trainers(job, accelerator, scaler).of(job.plan.stages[0])
        self.batch, self.dtype = job.plan.batch.whole, dtype_of(accelerator.mixed_precision)

    def step(self) -> dict[str, float]:
        """One update of the student and those of the fake score before; the first has the plain loop's rollouts."""
        rollouts, first = self.trainer.rollouts, self.trainer.step == 0
        usual, rollouts.count = rollouts.count, self.trainer.rounds if first else rollouts.count
        line = self.trainer.train_step()
        rollouts.count = usual
        return {name.removeprefix("loss/"): value for name, value in line.items() if name.startswith("loss/")}


def main(name: str, objective: str, loop: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed
    settings = parse(settings=CASES[name].run(objective, Path(folder)))
    accelerator = open_accelerator(settings.config.mixed_precision)
    device = accelerator.device
    runs: Joint | Plain
    if loop == "dmdr":
        runs = Joint(settings, accelerator)
    else:
        runs = Plain(settings, device, dtype_of(accelerator.mixed_precision))
    asked = {"step": partial(timed, runs, device), "count": partial(counted, runs)}
    asked |= {"profile": partial(profiled, runs), "memory": partial(highest, runs, device)}
    for command in sys.stdin:
        print(json.dumps(asked[command.strip()]()), file=answers, flush=True)


def timed(runs: Joint | Plain, device: torch.device) -> dict[str, Any]:
    """A step: its losses, and its seconds in all and by phase."""
    started = time.perf_counter()
    with Clock(device) as clock:
        losses = runs.step()
        shares = clock.read()
    seconds = time.perf_counter() - started
    phases = {phase: share * seconds for phase, share in shares.items()}
    about = {"device": device.type, "dtype": str(runs.dtype).removeprefix("torch."), "batch": runs.batch}
    return {"losses": losses, "seconds": seconds, "phases": phases} | about


def counted(runs: Joint | Plain) -> dict[str, int]:
    """Floating-point operations of a step, in products of matrices, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        runs.step()
    return {"flops": counter.get_total_flops()}


def highest(runs: Joint | Plain, device: torch.device) -> dict[str, int]:
    """The most bytes of tensors that are alive at a time in a step."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        runs.step()
        return {"peak": torch.cuda.max_memory_allocated()}
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {}
    for found in tensors:
        with suppress(RuntimeError):  # of a compiler's tensors, which hold nothing
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    live = peak = sum(storages.values())
    del tensors, found
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        runs.step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return {"peak": peak}


def profiled(runs: Joint | Plain) -> dict[str, float]:
    """The share of a step's time on the CPU that is spent outside torch's operators: in Python."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        runs.step()
        seconds = time.perf_counter() - started
    inside = sum(event.self_cpu_time_total for event in profiler.key_averages()) / 1e6
    return {"python": 1 - inside / seconds}


if __name__ == "__main__":
    main(*sys.argv[1:])
