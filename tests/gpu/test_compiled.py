"""Compiled blocks: as the plain ones, and no graph is new after a few steps."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from steps import distance, prepared, question, settings_of, shaken, trainer_of

pytestmark = pytest.mark.gpu


def graphs_by_step(trainer: Any, steps: int) -> list[int]:
    """How many graphs there are after each step; the share of the fake score in the teacher changes every step."""
    found, shares = [], []
    for _ in range(steps):
        shares.append(trainer.train_step()["dyna/fake_mix"])
        found.append(counters["stats"]["unique_graphs"])
    assert len(set(shares)) == steps or not any(shares)
    return found


def test_inductors_code(folders: dict[str, Path], tmp_path: Path) -> None:
    """SD3 with checkpointing: every role as without it, six steps of stage 1, and GRPO, whose replay is compiled."""
    answers = []
    stages = {"stage1_steps": 1000, "stage2_steps": 1000}
    for compiled in (False, True):
        given = {"mixed_precision": "bf16", "gradient_checkpointing": True, "torch_compile": compiled} | stages
        trainers = prepared(settings_of("sd3", folders["sd3"], tmp_path, "grpo", **given))
        backend, asked = shaken(trainers), question(trainers)
        answers.append(
            [
                backend.teacher(*asked).value,
                backend.teacher(*asked, fake_mix=0.25).value,
                backend.student(*asked).value.detach(),
                backend.fake_score(*asked).value.detach(),
            ]
        )
    for plain, found in zip(*answers, strict=True):
        assert distance(found, plain) < 2e-2
    counters.clear()
    graphs = graphs_by_step(trainer_of(trainers), 6)
    assert graphs[5] == graphs[2] > 0, graphs
    assert graphs[5] <= 16
    graphs = graphs_by_step(trainer_of(trainers, 1), 3)
    assert graphs[2] == graphs[1], graphs


@pytest.mark.parametrize(
    ("name", "precision", "full"),
    [("sdxl", "fp16", False), ("flux", "bf16", False), ("z-image", "fp16", False), ("sit", "bf16", True)],
)
def test_graphs_of_a_family(
    name: str, precision: str, full: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is compiled but the code of kernels, which takes most of the time."""
    compiled = partial(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module))
    counters.clear()
    given = {"mixed_precision": precision, "full_finetune": full, "gradient_checkpointing": True, "torch_compile": True}
    given |= {"num_inference_steps": 1, "fake_updates": 1}
    trainers = prepared(settings_of(name, folders[name], tmp_path, "none", **given))
    graphs = graphs_by_step(trainer_of(trainers), 5)
    assert graphs[4] == graphs[2] > 0, graphs
