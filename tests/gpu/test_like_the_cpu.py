"""What a step does on a CPU, it does on a GPU: the same numbers, and no more waits of the host."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from step_waits import FAMILY, TOY, of_family, of_toy, within
from steps import prepared, trainer_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", TOY)
def test_a_step_without_networks_is_that_of_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All losses and norms of each objective and matching, whose random numbers are the same on all devices."""
    there, found = lines_of(of_toy(name))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    here, wanted = lines_of(of_toy(name))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (there, here) == ("cuda", "cpu")
    for line, other in zip(found, wanted, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def lines_of(settings: dict[str, Any]) -> tuple[str, list[dict[str, float]]]:
    """The kind of device, and two steps in plain float32 there."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainers = prepared(settings | {"mixed_precision": "no"})
    torch.set_float32_matmul_precision("highest")
    trainer = trainer_of(trainers, 0 if settings["rl"] == "none" else 1)
    return trainers.accelerator.device.type, [trainer.train_step(noted=True) for _ in range(2)]


@pytest.mark.parametrize("name", TOY)
def test_waits_of_objectives(name: str) -> None:
    settings = of_toy(name) | {"mixed_precision": "bf16"}
    within(TOY[name][0], waits_of_a_step(settings))


@pytest.mark.parametrize("name", FAMILY)
def test_waits_of_families(name: str, tmp_path: Path) -> None:
    within(FAMILY[name][0], waits_of_a_step(of_family(name, tmp_path) | {"mixed_precision": "bf16"}))


def waits_of_a_step(settings: dict[str, Any]) -> Counter[str]:
    """How often the host waits for the GPU, by place; the step is a stage's second, in which nothing is new."""
    trainer = trainer_of(prepared(settings), 0 if settings["rl"] == "none" else 1)
    trainer.train_step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in seen if "synchronizing CUDA" in str(each.message)
    )
