"""Resuming repeats every bit on a CPU: for each objective, matching and weight, from any step.

In one process; and in two, with the whole network in each or in shares.
"""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import dmdr.run.run
import processes
import sd3
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
    "lcm": {"rl": "lcm"},
    "tdm_r1": {"rl": "tdm_r1", "num_generations": 4},
    "sum": {"rl": "grpo+0.1*refl", "num_generations": 4, "rl_balance": "grad_norm"},
    "decoupled": {"rl": "refl", "matching": "decoupled", "guidance_scale": 3.0},
    "draft": {"rl": "draft+refl+dpo", "num_generations": 4, "kl_beta": 0.1, "each_transition": True},
    "ca_advantage": {"rl": "ca_advantage", "num_generations": 4, "guidance_scale": 3.0, "rl_balance": "grad_norm"},
    "ac_dmd": {"rl": "refl", "matching": "ac_dmd"},
    "dmd2": {"rl": "refl", "matching": "dmd2"},
    "ladd": {"rl": "refl", "matching": "ladd"},
    "tilt": {"rl": "refl", "tilt_baseline": "ema", "tilt_weight": "linear"},
    "tdm": {"rl": "refl", "matching": "tdm", "eta": 0.0, "renoise_times": "logit_normal", "guidance_scale": 3.0},
    "gndm": {"rl": "refl", "matching": "gndm", "num_generations": 2, "sample_weight": "gdmd"},
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
    own = {"dmd2": ["discriminator"], "ladd": ["discriminator"], "tdm_r1": ["surrogate"]}.get(case, [])
    assert wanted.keys() >= {f"{name}.safetensors" for name in ("student", "ema", *own)}
    assert ("fake_score.safetensors" in wanted) == (case != "ladd")
    for step in range(1, 5) if every else (1 + list(CASES).index(case) % 2, 3 + list(CASES).index(case) % 2):
        copy = shutil.copytree(whole, tmp_path / f"from-{step}")
        train(resume_from_checkpoint=str(copy / "checkpoints" / f"step-{step:06d}"))
        last = copy / "checkpoints" / "step-000005"
        assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == wanted
        assert lines(copy) == lines(whole)


READ_REAL = ("lcm", "dmd2", "ladd")  # the cases whose parts read real images
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_rank": 4, "fake_lora_rank": 4},
    "full": {"full_finetune": True, "fake_score": "full"},
    "full fake score": {"lora_rank": 4, "fake_score": "full"},
}


def go_on(rank: int, folder: Path, case: str) -> None:
    """A run of each kind, and one that goes on from each of its checkpoints."""
    dmdr.run.run.write_report = lambda folder: folder  # plots take most of the time
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # leaves the group, needed once more
    small = {"model": str(folder / "sd3"), "prompts": str(folder / "prompts.txt"), "resolution": 16}
    small |= {"num_eval_samples": 0, "save_total_limit": None, "gradient_accumulation_steps": 1}
    if case in READ_REAL:
        small["real_images"] = str(folder / "images")
    for shard in ("1", "all"):
        for kind, roles in KINDS.items():
            if case == "ladd":  # which has no fake score
                roles = {name: value for name, value in roles.items() if not name.startswith("fake")}
            settings = SETTINGS | small | CASES[case] | roles | {"shard": shard}
            whole = folder / f"{kind}-{shard}"
            train(**settings, output_dir=str(whole))
            for step in range(1, 5):
                checkpoint = whole / "checkpoints" / f"step-{step:06d}"
                train(**settings, output_dir=str(whole.with_suffix(f".{step}")), resume_from_checkpoint=str(checkpoint))
    PartialState().destroy_process_group()


def saved(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint but the optimizers', by file and name; the order in a shared file is free."""
    files = checkpoint.rglob("*.safetensors")
    return {f"{file.relative_to(checkpoint)} {name}": each for file in files for name, each in load_file(file).items()}


@pytest.mark.verify
@pytest.mark.parametrize("case", CASES)
def test_several_processes_go_on_to_the_same_bits(tmp_path: Path, case: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("seven\ntwo\nfour\n")
    (tmp_path / "images").mkdir()
    for level, word in enumerate(("seven", "two", "four")):  # real images and their captions
        Image.new("RGB", (16, 16), (100 * level, 50, 200)).save(tmp_path / "images" / f"{level}.png")
        (tmp_path / "images" / f"{level}.txt").write_text(word)
    processes.start(go_on, 2, tmp_path, case)
    for kind, shard in product(KINDS, ("1", "all")):
        whole, last = tmp_path / f"{kind}-{shard}", "checkpoints/step-000005"
        wanted = saved(whole / last)
        for role, is_full in {"student": kind == "full", "fake_score": "full" in kind and case != "ladd"}.items():
            assert any(name.startswith(f"{role}/") for name in wanted) == (shard == "all" and is_full)
        for step in range(1, 5):
            other = whole.with_suffix(f".{step}")
            found = saved(other / last)
            assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
            assert lines(other) == lines(whole)[step:]
