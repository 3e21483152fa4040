"""A training step on a device of its own: what a GPU would refuse, and how often the host would wait for it.

The device is a pretended one (`pretend_device`), so that this needs no GPU. Waits are of the first step of stage 2, or
of stage 1 where there is no objective, for two student steps and one update of the fake score. A budget is what was
counted when it was written: lower it when a change needs less, and raise it only for what cannot do with fewer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dmdr.protocols import CachesPrompts
from dmdr.run.job import assemble
from dmdr.run.trainers import Trainers
from dmdr.settings.parse import parse
from family import FAMILIES
from pretend_device import DEVICE, Process, pretended

COMMON = {
    "num_inference_steps": 2,
    "fake_updates": 1,
    "stage1_steps": 2,
    "stage2_steps": 2,
    "reward": "toy",
    "report_to": "none",
}
SRPO = {"srpo_positive": ["Red"], "srpo_negative": ["Green"], "srpo_template": "{word} {prompt}"}
TOY: dict[str, tuple[int, dict[str, Any]]] = {
    "rt_dm": (17, {"rl": "none"}),
    "rt_dm over time": (17, {"rl": "none", "tilt_baseline": "ema"}),
    "decoupled": (19, {"rl": "none", "matching": "decoupled", "guidance_scale": 3.0}),
    "ac_dmd": (21, {"rl": "none", "matching": "ac_dmd", "guidance_scale": 3.0}),
    "refl": (16, {"rl": "refl"}),
    "refl, grad_norm": (19, {"rl": "refl", "rl_balance": "grad_norm"}),
    "grpo": (37, {"rl": "grpo", "grpo_beta": 0.1, "num_iterations": 2}),
    "dpo": (24, {"rl": "dpo"}),
    "srpo": (21, {"rl": "srpo"} | SRPO),
    "srpo, direct_align": (24, {"rl": "srpo", "direct_align": True} | SRPO),
    "nft": (23, {"rl": "nft", "kl_beta": 0.1}),
    "rwr": (27, {"rl": "rwr"}),
}
FAMILY: dict[str, tuple[int, dict[str, Any]]] = {
    "sd1": (15, {}),
    "sdxl": (15, {}),
    "sd3": (15, {}),
    "flux": (15, {}),
    "z-image": (25, {}),  # each call of its network asks for the lengths of the texts
    "sit": (16, {"full_finetune": True, "ema_decay": 0.9}),
}


def waits_of_a_step(**settings: Any) -> dict[str, int]:
    """How often the host waits, by kind and place."""
    job = assemble(parse(settings=COMMON | settings))
    assert job.rewards
    with pretended() as device:
        process: Any = Process()
        if isinstance(job.backend, CachesPrompts):
            job.backend.cache_prompts(process, [row["prompt"] for row in job.prompts.first(2)])
        job.backend.prepare(process, roles=job.plan.roles)
        job.rewards.prepare(DEVICE, torch.float32)
        stage = job.plan.stages[0 if settings["rl"] == "none" else 1]
        trainer = Trainers(job, process, torch.amp.GradScaler("cpu", enabled=False)).of(stage)
        device.waits.clear()
        trainer.train_step()
    return dict(device.waits.most_common())


def within(budget: int, waits: dict[str, int]) -> None:
    found = sum(waits.values())
    listed = "\n".join(f"{count:4d} {what}" for what, count in waits.items())
    assert found <= budget, f"the host waits {found} times, and not {budget}:\n{listed}"


@pytest.mark.parametrize("name", TOY)
def test_what_a_run_is_made_of(name: str) -> None:
    budget, settings = TOY[name]
    generations = 1 if "ema" in settings.values() else 2
    given = {"model": "toy", "per_device_train_batch_size": 4, "num_generations": generations}
    within(budget, waits_of_a_step(**given, **settings))


@pytest.mark.parametrize("name", FAMILY)
def test_model_families(name: str, tmp_path: Path) -> None:
    family, (budget, settings) = FAMILIES[name], FAMILY[name]
    family.build(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(family.prompts))
    given = {"model": str(tmp_path / "model"), "prompts": str(tmp_path / "prompts.txt"), "rl": "refl"}
    cache = {} if name == "sit" else {"prompt_cache": str(tmp_path / "cache")}
    rank = {} if "full_finetune" in settings else {"lora_rank": 4}
    guided = {"guidance_scale": family.guidance, "per_device_train_batch_size": 2}
    within(budget, waits_of_a_step(**given, **cache, **rank, **guided, **family.settings, **settings))


def test_the_device_refuses_and_counts() -> None:
    with pretended() as device:
        here, there = torch.arange(3.0).to(DEVICE), torch.arange(3.0)
        mixes: list[Callable[[], Any]] = [
            lambda: here + there,
            lambda: there.add_(here),
            lambda: torch.cat([here, there]),
            lambda: torch.stack([here[0], there[0]]),
            lambda: there[here.long()],
            lambda: torch.nn.functional.linear(here, there[None]),
            lambda: Process().gather(there),
        ]
        for mix in mixes:
            with pytest.raises(RuntimeError, match="CPU tensor"):
                mix()
        device.waits.clear()
        waiting: list[Callable[[], Any]] = [
            here[0].item,
            here.tolist,
            here.cpu,
            here.nonzero,
            here.unique,
            lambda: bool((here > 1).any()),
            lambda: here[here > 1],
            lambda: here[torch.tensor([0, 2])],
            lambda: here[[0, 2]],
            lambda: here.new_tensor([1.0]),
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: there.to(DEVICE),
            lambda: here.copy_(there),
        ]
        for count, wait in enumerate(waiting, start=1):
            wait()
            assert sum(device.waits.values()) == count, f"number {count}"
        torch.where(here > 1, here * there[1], 0.0) + there.to(DEVICE, non_blocking=True)  # needs no answer
        assert sum(device.waits.values()) == len(waiting)
