"""A training step on a device of its own: what a GPU would refuse, and how often the host would wait for it.

The device is a pretended one (`pretend_device`), so that this needs no GPU. Waits are of the first step; their budgets
are in `step_waits`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dmdr.protocols import CachesPrompts
from dmdr.run.job import assemble
from dmdr.run.trainers import Trainers
from dmdr.settings.parse import parse
from pretend_device import DEVICE, Process, pretended
from step_waits import FAMILY, TOY, of_family, of_toy, within


def waits_of_a_step(settings: dict[str, Any]) -> dict[str, int]:
    """How often the host waits, by kind and place."""
    job = assemble(parse(settings=settings))
    assert job.rewards
    with pretended() as device:
        process: Any = Process()
        if isinstance(job.backend, CachesPrompts):
            job.backend.cache_prompts(process, [row["prompt"] for row in job.prompts.first(2)])
        job.backend.prepare(process, roles=job.plan.roles)
        job.rewards.prepare(DEVICE, torch.float32)
        stage = job.plan.stages[0 if settings["rl"] == "none" else 1]
        trainer = Trainers(job, process, torch.amp.GradScaler("cpu", enabled=False)).of(stage)
        device.waits.clear()
        trainer.train_step()
    return dict(device.waits.most_common())


@pytest.mark.parametrize("name", TOY)
def test_what_a_run_is_made_of(name: str) -> None:
    within(TOY[name][0], waits_of_a_step(of_toy(name)))


@pytest.mark.parametrize("name", FAMILY)
def test_model_families(name: str, tmp_path: Path) -> None:
    within(FAMILY[name][0], waits_of_a_step(of_family(name, tmp_path)))


def test_the_device_refuses_and_counts() -> None:
    with pretended() as device:
        here, there = torch.arange(3.0).to(DEVICE), torch.arange(3.0)
        mixes: list[Callable[[], Any]] = [
            lambda: here + there,
            lambda: there.add_(here),
            lambda: torch.cat([here, there]),
            lambda: torch.stack([here[0], there[0]]),
            lambda: there[here.long()],
            lambda: torch.nn.functional.linear(here, there[None]),
            lambda: Process().gather(there),
        ]
        for mix in mixes:
            with pytest.raises(RuntimeError, match="CPU tensor"):
                mix()
        device.waits.clear()
        waiting: list[Callable[[], Any]] = [
            here[0].item,
            here.tolist,
            here.cpu,
            here.nonzero,
            here.unique,
            lambda: bool((here > 1).any()),
            lambda: here[here > 1],
            lambda: here[torch.tensor([0, 2])],
            lambda: here[[0, 2]],
            lambda: here.new_tensor([1.0]),
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: there.to(DEVICE),
            lambda: here.copy_(there),
        ]
        for count, wait in enumerate(waiting, start=1):
            wait()
            assert sum(device.waits.values()) == count, f"number {count}"
        torch.where(here > 1, here * there[1], 0.0) + there.to(DEVICE, non_blocking=True)  # needs no answer
        assert sum(device.waits.values()) == len(waiting)
