"""Whole runs on a GPU: their exports, their checkpoints, and a device that is nearly full."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dmdr
from dmdr.errors import TrainingError
from dmdr.run.checkpoint import Progress, checkpoints, damage
from dmdr.run.drawing import open_export
from dmdr.run.keeper import Keeper
from family import FAMILIES, Stock
from steps import FEW, prepared, settings_of, trainer_of
from stock import stock_diffusers

pytestmark = pytest.mark.gpu
EXPORTS = [
    (name, dict(v)) for name, f in FAMILIES.items() for v in f.variants if v in (f.variants[0], {"full_finetune": True})
]
FREE = 2**30  # bytes that are left on a device that is nearly full


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    with stock_diffusers(tmp_path_factory.mktemp("stock"), "cuda") as draw:
        yield draw


@pytest.mark.parametrize(("name", "variant"), EXPORTS, ids=str)
def test_stock_diffusers_draws_what_dmdr_sample_draws(
    name: str, variant: dict[str, Any], folders: dict[str, Path], tmp_path: Path, stock: Stock
) -> None:
    """Within 2/255, on the GPU, of a student that was trained there."""
    few = {"stage1_steps": 2, "sample_images": 1, "teacher_steps": 1}
    settings = settings_of(name, folders[name], tmp_path, "none", mixed_precision="no", **variant) | few
    student = run_of(settings, tmp_path / "run") / "student"
    about, family = json.loads((student / "sampling.json").read_text()), FAMILIES[name]
    open_export(student, about).draw(family.rows, 0, tmp_path / "ours")
    stock(student, family.prompts, tmp_path / "stock")
    for k in range(len(family.prompts)):
        a, b = (np.asarray(Image.open(tmp_path / f / f"{k:04d}.png")).astype(int) for f in ("ours", "stock"))
        assert np.abs(a - b).max() < 2
        assert a.std() > 2  # a picture, not a flat field


def run_of(settings: dict[str, Any], output: Path) -> Path:
    """The folder of a finished run."""
    if settings.get("full_finetune"):
        settings = {name: value for name, value in settings.items() if name not in ("lora_rank", "lora_alpha")}
    return dmdr.train(**settings, output_dir=str(output))


@pytest.mark.parametrize("rl", ["none", "refl"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_goes_on_alike(precision: str, rl: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Losses of steps 3 and 4 are within 1 %; to the bit they would be only on a CPU."""
    few = {"save_steps": 2, "save_total_limit": None, "logging_steps": 1, "sample_images": 1, "teacher_steps": 1}
    few |= {"stage1_steps" if rl == "none" else "stage2_steps": 4, "mixed_precision": precision}
    whole = run_of(settings_of("sd3", folders["sd3"], tmp_path, rl) | few, tmp_path / "run")
    copy = shutil.copytree(whole, tmp_path / "copy")
    dmdr.train(resume_from_checkpoint=str(copy / "checkpoints" / "step-000002"))
    wanted, found = (losses(folder)[2:] for folder in (whole, copy))
    assert len(found) == len(wanted) == 2
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2)


def losses(folder: Path) -> list[dict[str, float]]:
    """Of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key.startswith("loss/")} for line in lines]


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "full"])
def test_a_checkpoint_is_saved_on_a_device_that_is_nearly_full(full: bool, wide: Path, tmp_path: Path) -> None:
    """A full student has more bytes than are free; if it cannot be saved, one line says so."""
    output = tmp_path / "run"
    output.mkdir()
    settings = FEW | {
        "model": str(wide), "prompts": str(wide / "prompts.txt"), "prompt_cache": str(tmp_path / "cache"),
        "rl": "none", "mixed_precision": "bf16", "stage1_steps": 1000, "stage2_steps": 0, "full_finetune": full,
        "ema_decay": 0.9, "per_device_train_batch_size": 1, "max_sequence_length": 16, "lora_rank": 64,
    }  # fmt: skip
    trainers = prepared(settings)
    trainer = trainer_of(trainers)
    trainer.train_step()
    torch.cuda.empty_cache()
    taken = torch.empty(torch.cuda.mem_get_info()[0] - FREE, dtype=torch.uint8, device=trainers.accelerator.device)
    said = ""
    try:
        Keeper(trainers, output, Counter()).save(trainer, Progress(1, 1, 1, 1, trainers.job.plan.batch.whole))
    except TrainingError as error:
        said = str(error)
    del taken
    saved = checkpoints(output)
    assert [damage(checkpoint) for checkpoint in saved] == [None] * (not said)
    assert "\n" not in said
