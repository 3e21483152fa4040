"""Training steps of a run on this process's device, without the run's folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmdr.protocols import CachesPrompts
from dmdr.run.device import open_accelerator
from dmdr.run.job import assemble
from dmdr.run.trainers import Trainers
from dmdr.settings.parse import resolve
from dmdr.training.trainer import Trainer
from dmdr.types import Condition
from family import FAMILIES

FEW = {
    "num_inference_steps": 2, "fake_updates": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
    "fake_learning_rate": 1e-3, "fake_lora_rank": 2, "fake_lora_alpha": 3.0, "lora_rank": 4, "lora_alpha": 8.0,
    "reward": "toy", "report_to": "none",
}  # fmt: skip


def settings_of(name: str, folder: Path, place: Path, rl: str, **more: Any) -> dict[str, Any]:
    """Settings of a small run of a family: stage 1 without an objective, stage 2 with one.

    Args:
        name: Of the family.
        folder: Its pipeline.
        place: Folder for the prompts and their embeddings.
    """
    family = FAMILIES[name]
    (place / "prompts.txt").write_text("\n".join(family.prompts))
    given = {"model": str(folder), "prompts": str(place / "prompts.txt"), "guidance_scale": family.guidance, "rl": rl}
    if name != "sit":
        given["prompt_cache"] = str(place / "cache")
    stages = {"stage1_steps": 1000, "stage2_steps": 0} if rl == "none" else {"stage1_steps": 0, "stage2_steps": 1000}
    return FEW | given | stages | dict(family.settings) | dict(family.objectives.get(rl, {})) | more


def prepared(settings: dict[str, Any]) -> Trainers:
    """The trainers of a run, whose networks are on the device."""
    job = assemble(resolve(settings=settings))
    accelerator = open_accelerator(job.config.mixed_precision)
    if isinstance(job.backend, CachesPrompts):
        job.backend.cache_prompts(accelerator, [row["prompt"] for row in job.prompts.first(job.prompts.size or 1)])
    if job.rewards:
        job.rewards.prepare(accelerator.device, torch.float32)
    job.backend.prepare(accelerator, roles=job.plan.roles)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=accelerator.mixed_precision == "fp16")
    return Trainers(job, accelerator, scaler)


def trainer_of(trainers: Trainers, stage: int = 0) -> Trainer:
    """Of one of the run's stages, by its place among them."""
    return trainers.of(trainers.job.plan.stages[stage])


def question(trainers: Trainers) -> tuple[Tensor, Tensor, Condition]:
    """Two noisy states with their times and prompts, the same on all devices."""
    backend: Any = trainers.job.backend
    device = trainers.accelerator.device
    x_t = torch.randn(2, *backend.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.tensor([0.35, 0.8], dtype=torch.float64, device=device)
    return x_t, t, backend.encode([row["prompt"] for row in trainers.job.prompts.first(2)])


def shaken(trainers: Trainers) -> Any:
    """The backend, whose student and fake score are far from their initial values."""
    backend: Any = trainers.job.backend
    for number, role in enumerate(("student", "fake_score")):
        generator = torch.Generator().manual_seed(number)
        for parameter in backend.parameters(role).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return backend


def frozen(backend: Any) -> dict[str, Tensor]:
    """A copy of the teacher's weights and buffers, by name."""
    return {name: t.detach().clone() for name, t in backend.roles.network.state_dict().items() if ".lora_" not in name}


def distance(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, of tensors of one shape."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())
