"""Kernels and packed weights that only a GPU, or other packages, have."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from dmdr.backends.quantized import PACKAGES, Format, QuantizedLinear
from steps import FEW, distance, prepared, question, settings_of, trainer_of

pytestmark = pytest.mark.gpu
WIDE = {"mixed_precision": "bf16", "rl": "none", "reward": "none", "stage1_steps": 1000, "stage2_steps": 0}


@pytest.mark.parametrize("name", ["flux", "z-image"])
@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "full"])
def test_attention_kernels_agree(name: str, full: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    """PyTorch's choice, and its flash attention alone; both train."""
    answers = []
    for kernel in ("native", "_native_flash"):
        given = {"attention_backend": kernel, "mixed_precision": "bf16", "full_finetune": full}
        trainers = prepared(settings_of(name, folders[name], tmp_path, "refl", **given))
        backend: Any = trainers.job.backend
        answers.append([getattr(backend, role)(*question(trainers)).value for role in ("teacher", "student")])
        line = trainer_of(trainers).train_step()
        assert all(math.isfinite(value) for key, value in line.items() if key.startswith(("loss/", "grad_norm/")))
    for one, other in zip(*answers, strict=True):
        assert distance(other, one) < 2e-2


def peak_of(settings: dict[str, Any]) -> tuple[int, Any]:
    """Most bytes from loading a model to the end of its second step, and its trainers."""
    before = torch.cuda.memory_allocated()
    trainers = prepared(settings)
    trainer = trainer_of(trainers)
    trainer.train_step()
    torch.cuda.reset_peak_memory_stats()
    line = trainer.train_step()
    assert all(math.isfinite(value) for key, value in line.items() if key.startswith(("loss/", "grad_norm/")))
    return torch.cuda.max_memory_allocated() - before, trainers


def wide_settings(wide: Path, place: Path, **more: Any) -> dict[str, Any]:
    where = {"model": str(wide), "prompts": str(wide / "prompts.txt"), "prompt_cache": str(place / "cache")}
    return FEW | WIDE | where | {"max_sequence_length": 16, "per_device_train_batch_size": 1} | more


@pytest.mark.parametrize(
    "to",
    [
        pytest.param(to, marks=pytest.mark.skipif(find_spec(PACKAGES[to]) is None, reason=f"needs {PACKAGES[to]}"))
        for to in get_args(Format)
    ],
)
def test_packed_weights_train_in_less_memory(to: Format, wide: Path, tmp_path: Path) -> None:
    """Of what the blocks' weights shrink by, at least four fifths are seen in the peak of a step."""
    plain, trainers = peak_of(wide_settings(wide, tmp_path))
    del trainers
    packed, trainers = peak_of(wide_settings(wide, tmp_path, quantize=to))
    network = trainers.job.backend.roles.network
    layers = [module for module in network.modules() if isinstance(module, QuantizedLinear)]
    weights = sum(2 * layer.in_features * layer.out_features for layer in layers)
    print(f"\n{to}: {packed / 2**20:.0f} MiB instead of {plain / 2**20:.0f}")
    assert layers and plain - packed > 0.8 * weights * (0.7 if to == "nf4" else 0.5)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_adamw_in_8_bits(wide: Path, tmp_path: Path) -> None:
    """Its moments take a byte a number, it moves the student, and its state can be stored and brought back."""
    _, trainers = peak_of(wide_settings(wide, tmp_path, optim="adamw_bnb_8bit", lora_rank=64))
    trainer = trainer_of(trainers)
    before = [p.detach().clone() for p in trainer.student.parameters.values()]
    trainer.train_step()
    moved = [not torch.equal(old, p) for old, p in zip(before, trainer.student.parameters.values(), strict=True)]
    assert sum(moved) > len(moved) / 2
    optimizer = trainer.student.optimizer
    moments = [state["state1"] for state in optimizer.state.values()]
    assert {moment.dtype for moment in moments if moment.numel() >= 4096} == {torch.uint8}
    file = tmp_path / "state.pt"
    torch.save(optimizer.state_dict(), file)
    other = trainer_of(trainers).student.optimizer
    other.load_state_dict(torch.load(file, weights_only=True))
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name].to(mine[name])) for name in ("state1", "state2"))
