"""Resuming repeats every bit on a CPU: for each objective, matching and weight, from any step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dmdr import train
from log_lines import untimed

pytestmark = pytest.mark.usefixtures("no_report")

SETTINGS: dict[str, Any] = {
    "model": "toy", "reward": "toy", "stage1_steps": 2, "stage2_steps": 3, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2, "fake_updates": 2, "save_steps": 1, "logging_steps": 1, "sample_images": 1,
    "teacher_steps": 1, "report_to": "none", "ema_decay": 0.9, "eta": 0.9, "lr_scheduler_type": "cosine",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "none": {"rl": "none", "guidance_scale": 3.0},
    "refl": {"rl": "refl", "rl_weight_schedule": "cosine", "rl_warmup_steps": 2},
    "grpo": {"rl": "grpo", "num_generations": 4, "num_iterations": 2, "beta": 0.1, "policy_steps": "random:2"},
    "dpo": {"rl": "dpo", "num_generations": 4, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "srpo": {"rl": "srpo", "positive": ["Red"], "negative": ["Green"]},
    "nft": {"rl": "nft", "num_generations": 4, "old_decay_ramp": 0.4},
    "rwr": {"rl": "nft+rwr", "num_generations": 4, "kl_beta": 0.1},
    "sum": {"rl": "grpo+0.1*refl", "num_generations": 4, "rl_balance": "grad_norm"},
    "decoupled": {"rl": "refl", "matching": "decoupled", "guidance_scale": 3.0},
    "ac_dmd": {"rl": "refl", "matching": "ac_dmd"},
    "tilt": {"rl": "refl", "tilt_baseline": "ema", "tilt_weight": "linear"},
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.verify)])
@pytest.mark.parametrize("case", CASES)
def test_from_any_step_a_run_goes_on_to_the_same_bits(tmp_path: Path, case: str, every: bool) -> None:
    """From one step of each stage, or from every one."""
    settings = SETTINGS | CASES[case] | {"save_total_limit": None}
    whole = train(**settings, output_dir=str(tmp_path / "whole"))
    wanted = {file.name: file.read_bytes() for file in (whole / "checkpoints" / "step-000005").glob("*.safetensors")}
    assert wanted.keys() >= {"student.safetensors", "fake_score.safetensors", "ema.safetensors"}
    for step in range(1, 5) if every else (1 + list(CASES).index(case) % 2, 3 + list(CASES).index(case) % 2):
        copy = shutil.copytree(whole, tmp_path / f"from-{step}")
        train(resume_from_checkpoint=str(copy / "checkpoints" / f"step-{step:06d}"))
        last = copy / "checkpoints" / "step-000005"
        assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == wanted
        assert lines(copy) == lines(whole)
