"""Files that runs of an older version have left: it knew no `Options`, and wrote the flags of all model families."""

from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parent / "old"

# "options" of an export's sampling.json, of a run of the defaults.
SAMPLING_OPTIONS: dict[str, Any] = {
    "lora_rank": 64,
    "lora_alpha": 128.0,
    "fake_lora_rank": 32,
    "fake_lora_alpha": 64.0,
    "lora_target_modules": [],
    "full_finetune": False,
    "gradient_checkpointing": False,
    "resolution": None,
    "shift": None,
    "max_sequence_length": None,
    "drop_text_encoders": [],
    "zero_empty_prompt": None,
    "guidance_scale": 7.0,
    "student_weights": None,
    "teacher_lora": None,
    "reward_vae": None,
    "vae_tiling": False,
    "decode_chunk_size": None,
    "torch_compile": False,
    "revision": None,
    "variant": None,
    "attention_backend": None,
    "cpu_offload": False,
    "prompt_cache": None,
    "seed": 0,
}


def old_config(name: str, **settings: Any) -> dict[str, Any]:
    """The settings in `config.yaml` of a run of `digits` or `toy`, but for some."""
    values: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert settings.keys() <= values.keys()
    return values | settings
