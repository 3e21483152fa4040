"""The benchmark compares loops that compute the same."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from examples.benchmarks import __main__ as benchmarks
from examples.benchmarks import cases, published, worker
from examples.benchmarks.cases import Case
from examples.benchmarks.plain import Plain

from dmdr.errors import TrainingError
from dmdr.settings.parse import parse

SMALL = {"max_sequence_length": 2, "per_device_train_batch_size": 3, "lora_rank": 4, "fake_lora_rank": 4}
CPU = torch.device("cpu")
UNET = {
    "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": 1, "attention_head_dim": 2,
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + published.CLIP_G,
    "layers_per_block": 1,
}  # fmt: skip
VAE = {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 16, "layers_per_block": 1}
FLUX = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
CASES = {
    "sd3": Case("", SMALL, {"none": {}}, partial(cases.sd3, width=64, layers=1, size=4)),
    "sit": Case(
        "",
        {"full_finetune": True, "num_inference_steps": 1, "guidance_scale": 1.0, "per_device_train_batch_size": 2},
        {"none": {}},
        partial(cases.sit, width=32, layers=1, heads=2),
    ),
    "sdxl": Case(
        "",
        {"resolution": 64, "per_device_train_batch_size": 2, "lora_rank": 4, "fake_lora_rank": 4},
        {"none": {}},
        partial(published.sdxl, device=CPU, vae=VAE, **UNET),
    ),
    "flux": Case(
        "",
        SMALL | {"resolution": 64, "guidance_scale": 3.5, "guidance_jitter": 0.0},
        {"none": {}},
        partial(published.flux, device=CPU, vae=VAE, **FLUX),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_loops_begin_alike(name: str, tmp_path: Path) -> None:
    cache = {} if name == "sit" else {"prompt_cache": "off"}
    settings = parse(settings=CASES[name].run("none", tmp_path / "model") | cache)
    ours = worker.Joint(settings, Accelerator(cpu=True))
    plain = Plain(settings, torch.device("cpu"), torch.float32)
    benchmarks.check(name, ours.step(), plain.step())
    if name in ("sdxl", "flux"):
        return  # what is measured is the same for all
    flops = [worker.counted(each)["flops"] for each in (ours, plain)]
    assert 0 < flops[0] <= flops[1]  # of one step, a student draws as many rollouts as the plain loop
    assert worker.highest(ours, torch.device("cpu"))["peak"] > 0


def test_loops_that_differ_are_not_compared() -> None:
    with pytest.raises(TrainingError, match=r"digits none: the first steps differ: loss dmd is 0\.2 and 0\.1"):
        benchmarks.check("digits none", {"dmd": 0.2, "fake": 1.0}, {"dmd": 0.1})


def test_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(name: str, objective: str, repeats: int, folder: Path) -> dict[str, Any]:
        phases = dict.fromkeys(benchmarks.PARTS, 0.0) | {"fake": 1.5}
        about = {"least": 1.0, "most": 3.0, "phases": phases, "batch": 4, "dtype": "float32", "python": 0.5}
        return {
            "dmdr": {"seconds": 2.0, "peak": 2**20, "flops": 1e9} | about,
            "plain": {"seconds": 4.0, "peak": 2**22, "flops": 2e9} | about,
        }

    monkeypatch.setattr(benchmarks, "measure", measure)
    monkeypatch.setattr(benchmarks, "matmul_rate", lambda *_: 1e9)
    file = tmp_path / "now.json"
    command = ["benchmarks", "--cases", "sit-b", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    assert benchmarks.main() == 0
    rows = capsys.readouterr().out.splitlines()
    assert "| sit-b | none | dmdr | 2 (1-3) | 2 | 1 | 1 | 50% | 50% | fake 75% |" in rows
    assert "| sit-b | none | dmdr / plain | 0.50 | 2.00 | 0.25 | 0.50 | | | |" in rows
    before = json.loads(file.read_text())
    before["figures"]["sit-b none"]["dmdr"]["seconds"] = 4.0
    file.write_text(json.dumps(before))
    monkeypatch.setattr(sys, "argv", [*command, "--against", str(file)])
    assert benchmarks.main() == 0
    assert "| sit-b | none | 0.50 | 0.50 | 1.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["--against", "absent.json"], "--against absent.json is no file"),
        (["--cases", "sit-b", "--objectives", "grpo"], "--objectives: these cases have no grpo"),
        (["--cases", "digits", "sdxl"], "--cases sdxl: models of published shapes need a GPU"),
    ],
)
def test_bad_flags(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *flags])
    assert benchmarks.main() == 2
    assert capsys.readouterr().err == f"benchmarks: {said}\n"
