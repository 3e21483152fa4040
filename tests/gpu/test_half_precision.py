"""Every family trains in half precision, as a LoRA and in full."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parts
import sdxl
from family import FAMILIES
from steps import distance, frozen, prepared, question, settings_of, shaken, trainer_of

pytestmark = pytest.mark.gpu
PRECISIONS = ("bf16", "fp16")
STEPS = 6


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "full"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_of_a_family(name: str, precision: str, full: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    """Losses are finite, student and fake score move, and not a bit of the teacher does."""
    given = {"mixed_precision": precision, "full_finetune": full, "gradient_checkpointing": True}
    trainers = prepared(settings_of(name, folders[name], tmp_path, "refl", **given))
    trainer, backend = trainer_of(trainers), trainers.job.backend
    roles = ("student", "fake_score")
    before = {role: {key: p.detach().clone() for key, p in backend.parameters(role).items()} for role in roles}
    teacher = frozen(backend)
    lines = [trainer.train_step(noted=True) for _ in range(STEPS)]
    losses = [value for line in lines for key, value in line.items() if key.startswith("loss/")]
    assert len(losses) >= 3 * STEPS and all(map(math.isfinite, losses)), lines
    norms = [value for key, value in lines[-1].items() if key.startswith("grad_norm/")]
    assert len(norms) == 2 and all(map(math.isfinite, norms)), lines[-1]
    if precision == "fp16":
        assert all(2**8 <= line["loss_scale"] <= 2**17 for line in lines), lines
    for role, old in before.items():
        moved = [not torch.equal(old[key], p) for key, p in backend.parameters(role).items()]
        assert sum(moved) > len(moved) / 2
    after = frozen(backend)
    assert after.keys() == teacher.keys() and all(torch.equal(after[key], value) for key, value in teacher.items())


def test_the_loss_scale_settles(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of 40 steps, the last 35 skip three updates at most."""
    given = {"mixed_precision": "fp16", "gradient_checkpointing": True}
    trainer = trainer_of(prepared(settings_of("sd3", folders["sd3"], tmp_path, "refl", **given)))
    scales = [trainer.train_step()["loss_scale"] for _ in range(40)]
    assert all(2**8 <= scale <= 2**17 for scale in scales), scales
    assert math.log2(scales[4] / scales[-1]) <= 3, scales


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_with_checkpointing_are_those_without(
    name: str, precision: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """CUDA computes them in a thread of its own; there, another role is active at another strength."""
    for role, other in (("student", "fake_score"), ("fake_score", "student")):
        found = []
        for checkpointing in (False, True):
            given = {"mixed_precision": precision, "gradient_checkpointing": checkpointing}
            trainers = prepared(settings_of(name, folders[name], tmp_path, "none", **given))
            backend = shaken(trainers)
            loss = getattr(backend, role)(*question(trainers)).value.square().mean()
            with backend.roles._as((other, 0.3)):
                loss.backward()
            found.append(gradient(backend, role))
        plain, recomputed = found
        assert bool(plain.isfinite().all()) and distance(recomputed, plain) < 1e-2, role


def gradient(backend: Any, role: str) -> Tensor:
    """Of all parameters of a role that have one."""
    grads = [p.grad.flatten() for p in backend.parameters(role).values() if p.grad is not None]
    return torch.cat(grads)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_rewards_gradient_through_the_decoder(precision: str, tmp_path: Path) -> None:
    """It is finite, is not lost, and has the direction of that in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sdxl.build(tmp_path / "model", vae=parts.vae(scaling_factor=0.7, force_upcast=False))
    found = []
    for mixed_precision in (precision, "no"):
        trainers = prepared(settings_of("sdxl", tmp_path / "model", tmp_path, "refl", mixed_precision=mixed_precision))
        trainer, backend, rewards = trainer_of(trainers), trainers.job.backend, trainers.job.rewards
        x, _, cond = question(trainers)
        leaf = x.requires_grad_()
        images = backend.decode(leaf)
        scores = rewards(images, cond.prompts, **cond.columns)
        found.append(trainer.context(0).grad(scores.sum() / 1000, leaf))  # as small as in a large batch
        assert images.dtype == scores.dtype == found[-1].dtype == torch.float32
    half, single = found
    assert bool(half.isfinite().all()) and (half != 0).float().mean() > 0.9
    assert torch.cosine_similarity(half.flatten().double(), single.flatten().double(), 0) > 0.99


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "grpo" in family.objectives])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_grpo_finds_its_rollout_again(name: str, checkpointing: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    """Steps with gradient are by the same student as the rollout without, or GRPO would stop the run."""
    given = {"mixed_precision": "bf16", "gradient_checkpointing": checkpointing}
    trainer = trainer_of(prepared(settings_of(name, folders[name], tmp_path, "grpo", **given)))
    lines = [trainer.train_step() for _ in range(2)]
    assert all(math.isfinite(line["loss/grpo"]) for line in lines), lines
