"""Golden trajectories: the first steps of every objective, matching and sample weight, as they were when checked in.

A change that should not change numbers must keep them. One that should rewrites the file, with a line under *Numerics*
in the changelog: `DMDR_WRITE_GOLDEN=1 make test PYTEST_OPTIONS=tests/training/test_golden.py`. On one machine the
numbers are the same to the bit; the tolerance is for other processors, whose kernels round otherwise.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sd3
from dmdr import train

GOLDEN = Path(__file__).with_name("golden.json")
WRITE = os.environ.get("DMDR_WRITE_GOLDEN") == "1"
TOLERANCE = {"rel": 2e-3, "abs": 2e-5}
COMMON: dict[str, Any] = {
    "fake_updates": 2,
    "logging_steps": 1,
    "sample_steps": 0,
    "sample_images": 2,
    "teacher_steps": 2,
    "report_to": "none",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "save_steps": 0,
}
TOY = COMMON | {"model": "toy", "gradient_accumulation_steps": 2, "stage1_steps": 2, "stage2_steps": 10}
SD3 = COMMON | {"stage1_steps": 1, "stage2_steps": 3, "lora_rank": 4, "lora_alpha": 8.0, "fake_lora_rank": 4,
                "fake_lora_alpha": 8.0, "num_inference_steps": 2, "reward": "toy", "learning_rate": 1e-3,
                "prompt_cache": "off", "guidance_scale": 3.0, "fake_updates": 1}  # fmt: skip
WORDS = {"positive": ["Red"], "negative": ["Green"]}
CASES: dict[str, dict[str, Any]] = {
    "toy/refl": TOY | {"rl": "refl"},
    "toy/refl last, grad_norm": TOY | {"rl": "refl", "steps": "last", "rl_balance": "grad_norm"},
    "toy/refl, kl": TOY | {"rl": "refl", "kl_beta": 0.5},
    "toy/draft": TOY | {"rl": "draft"},
    "toy/ca_advantage": TOY | {"rl": "ca_advantage", "guidance_scale": 3.0},
    "toy/grpo": TOY | {"rl": "grpo", "policy_steps": "random:2"},
    "toy/grpo again, beta": TOY | {"rl": "grpo", "num_iterations": 2, "grpo_beta": 0.1},
    "toy/dpo": TOY | {"rl": "dpo"},
    "toy/dpo, each transition": TOY | {"rl": "dpo", "each_transition": True},
    "toy/dpo diffusion": TOY | {"rl": "dpo", "form": "diffusion"},
    "toy/srpo": TOY | {"rl": "srpo", **WORDS},
    "toy/srpo direct_align": TOY | {"rl": "srpo", "direct_align": True, **WORDS},
    "toy/nft": TOY | {"rl": "nft", "kl_beta": 0.1},
    "toy/rwr": TOY | {"rl": "rwr"},
    "toy/tdm_r1": TOY | {"rl": "tdm_r1"},
    "toy/lcm": TOY | {"rl": "lcm"},
    "toy/grpo+refl": TOY | {"rl": "grpo+0.1*refl", "refl_steps": "last", "rl_weight_schedule": "cosine"},
    "toy/dmd": TOY | {"rl": "none", "stage1_steps": 10, "stage2_steps": 0},
    "toy/dmd, ema tilt": TOY | {"tilt_baseline": "ema", "num_generations": 1, "stage1_steps": 10, "stage2_steps": 0},
    "toy/decoupled": TOY | {"rl": "refl", "matching": "decoupled"},
    "toy/ac_dmd, ema": TOY | {"rl": "grpo", "matching": "ac_dmd", "eta": 0.9, "ema_decay": 0.9},
    "toy/tdm": TOY | {"rl": "refl", "matching": "tdm", "eta": 0.0},
    "toy/gndm, gdmd": TOY
    | {"rl": "none", "matching": "gndm", "sample_weight": "gdmd", "stage1_steps": 10, "stage2_steps": 0},
    "toy/dmd2": TOY | {"rl": "none", "matching": "dmd2", "gan_r1_weight": 10.0},
    "toy/ladd": TOY | {"rl": "refl", "matching": "ladd"},
    "sd3/refl": SD3 | {"rl": "refl"},
    "sd3/grpo again": SD3 | {"rl": "grpo", "num_iterations": 2},
    "sd3/dpo": SD3 | {"rl": "dpo"},
    "sd3/nft": SD3 | {"rl": "nft"},
    "sd3/ac_dmd": SD3 | {"rl": "none", "matching": "ac_dmd", "eta": 0.9},
    "sd3/decoupled": SD3 | {"rl": "none", "matching": "decoupled"},
    "sd3/dmd, times": SD3
    | {"rl": "none", "renoise_times": "shifted", "time_weight": "alpha", "guidance_interval": [0.2, 0.7]},
}


@pytest.fixture(scope="module")
def small_sd3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A StableDiffusion3Pipeline with random weights, and prompts for it."""
    folder = tmp_path_factory.mktemp("golden")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(folder / "sd3")
    (folder / "prompts.txt").write_text("zero\none\ntwo\nthree\n")
    return {"model": str(folder / "sd3"), "prompts": str(folder / "prompts.txt")}


def trajectory(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What is logged of each step, and the size and a projection of what is trained at the end."""
    train(**settings, output_dir=str(folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss/", "grad_norm/", "reward/")
    found = [{key: value for key, value in line.items() if key.startswith(kept)} for line in lines]
    last = max((folder / "checkpoints").iterdir())
    weights = {}
    for role in ("student", "fake_score" if settings.get("matching") != "ladd" else "discriminator"):
        flat = torch.cat([tensor.flatten() for _, tensor in sorted(load_file(last / f"{role}.safetensors").items())])
        probe = torch.cos(torch.arange(len(flat), dtype=torch.float64))
        weights[role] = [flat.double().norm().item(), (flat.double() @ probe).item()]
    return {"lines": found, "weights": weights}


@pytest.mark.parametrize("case", CASES)
def test_trajectory(case: str, small_sd3: dict[str, str], tmp_path: Path, no_report: None) -> None:
    settings = CASES[case] | (small_sd3 if case.startswith("sd3") else {})
    found = trajectory(settings, tmp_path / "run")
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if WRITE:
        rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.7g}"))
        GOLDEN.write_text(json.dumps(golden | {case: rounded}, indent=1) + "\n")
        return
    expected = golden[case]
    assert len(found["lines"]) == len(expected["lines"])
    for step, (line, wanted) in enumerate(zip(found["lines"], expected["lines"], strict=True), start=1):
        assert line == pytest.approx(wanted, **TOLERANCE), f"logged line {step}"
    for role, wanted in expected["weights"].items():
        assert found["weights"][role] == pytest.approx(wanted, **TOLERANCE), role


def test_every_objective_and_matching_has_one() -> None:
    from dmdr.settings import registry

    named = [word for settings in CASES.values() for key in ("rl", "matching") for word in [settings.get(key, "")]]
    for group in ("objectives", "matchings"):
        for name, plugin in registry.plugins(group).items():
            if plugin.distribution == "dmdr":
                assert name == "dmd" or any(name in word for word in named), name
