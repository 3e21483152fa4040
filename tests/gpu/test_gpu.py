"""A whole run on a GPU in half precision; skipped, with a reason, where there is none."""

import json
from pathlib import Path

import pytest
import torch

import dmdr
from dmdr_digits import Digits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_run_in_half_precision(digits: Digits, tmp_path: Path, mixed_precision: str) -> None:
    folder = dmdr.train(
        stage1_steps=4, stage2_steps=4, mixed_precision=mixed_precision, gradient_checkpointing=True, logging_steps=1,
        num_eval_samples=8, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert all(abs(line[key]) < 1e3 for line in lines for key in line if key.startswith(("loss/", "reward/")))
    assert (folder / "student" / "pytorch_lora_weights.safetensors").is_file()
