"""Steps of all objectives, matchings and families, and how often the host may wait for the device in each.

Waits are of a step of stage 2, or of stage 1 where there is no objective, for two student steps and one update of the
fake score. A budget is what was counted when it was written: lower it when a change needs less, and raise it only for
what cannot do with fewer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from family import FAMILIES

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
    "tdm": (20, {"rl": "none", "matching": "tdm", "guidance_scale": 3.0, "eta": 0.0}),
    "gndm": (19, {"rl": "none", "matching": "gndm", "guidance_scale": 3.0, "num_generations": 2}),
    "gdmd": (17, {"rl": "none", "sample_weight": "gdmd"}),
    "refl": (16, {"rl": "refl"}),
    "refl, grad_norm": (19, {"rl": "refl", "rl_balance": "grad_norm"}),
    "refl, kl": (16, {"rl": "refl", "kl_beta": 0.1}),
    "draft": (16, {"rl": "draft"}),
    "ca_advantage": (23, {"rl": "ca_advantage", "guidance_scale": 3.0}),
    "grpo": (37, {"rl": "grpo", "grpo_beta": 0.1, "num_iterations": 2}),
    "dpo": (24, {"rl": "dpo"}),
    "srpo": (21, {"rl": "srpo"} | SRPO),
    "srpo, direct_align": (24, {"rl": "srpo", "direct_align": True} | SRPO),
    "nft": (23, {"rl": "nft", "kl_beta": 0.1}),
    "rwr": (27, {"rl": "rwr"}),
    "lcm": (26, {"rl": "lcm"}),
    "dmd2": (37, {"rl": "none", "matching": "dmd2"}),
    "ladd": (31, {"rl": "none", "matching": "ladd"}),
}
FAMILY: dict[str, tuple[int, dict[str, Any]]] = {
    "sd1": (15, {}),
    "sdxl": (15, {}),
    "sd3": (15, {}),
    "flux": (15, {}),
    "flux2-klein": (15, {}),
    "qwen-image": (24, {}),
    "krea2": (17, {}),
    "z-image": (18, {}),
    "sit": (16, {"full_finetune": True, "ema_decay": 0.9}),
}


def of_toy(name: str) -> dict[str, Any]:
    """Settings of a step of `TOY`."""
    settings = TOY[name][1]
    generations = 1 if "ema" in settings.values() else 2
    return COMMON | {"model": "toy", "per_device_train_batch_size": 4, "num_generations": generations} | settings


def of_family(name: str, place: Path) -> dict[str, Any]:
    """Settings of a step of `FAMILY`, whose pipeline and prompts are put into a folder."""
    family, (_, settings) = FAMILIES[name], FAMILY[name]
    family.build(place / "model")
    (place / "prompts.txt").write_text("\n".join(family.prompts))
    given = {"model": str(place / "model"), "prompts": str(place / "prompts.txt"), "rl": "refl"}
    cache = {} if name == "sit" else {"prompt_cache": str(place / "cache")}
    rank = {} if "full_finetune" in settings else {"lora_rank": 4}
    guided = {"guidance_scale": family.guidance, "per_device_train_batch_size": 2}
    return COMMON | given | cache | rank | guided | dict(family.settings) | settings


def within(budget: int, waits: Mapping[str, int]) -> None:
    """Hold the waits, by kind and place, against a budget."""
    found = sum(waits.values())
    listed = "\n".join(f"{count:4d} {what}" for what, count in waits.items())
    assert found <= budget, f"the host waits {found} times, and not {budget}:\n{listed}"
