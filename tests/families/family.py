"""What the tests of all families are run on; a family is one entry of `FAMILIES`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sd1
import sd3
import sdxl
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """A small random pipeline of a model family, and what differs between families in the tests.

    Attributes:
        build: Saves the pipeline into a folder, as `save_pretrained` lays it out.
        guidance: A scale that the stock pipeline is guided at.
        call: Further arguments of the stock pipeline's call, beside prompts, steps and guidance.
        timestep: Our time t in [0, 1] of a timestep that the pipeline gives its scheduler.
        unpacked: The pipeline's latents (or network output) as [B, *latent], given our latent shape.
        settings: Settings of a training run.
        objectives: Objectives that a run is made of, with settings of their own.
        lora_keys: Form of the keys in an exported LoRA file.
        variants: Settings of the exports that stock diffusers must reproduce.
    """

    build: Callable[[Path], None]
    guidance: float = 4.0
    call: Mapping[str, Any] = field(default_factory=dict)
    timestep: Callable[[Tensor], Tensor] = lambda timestep: timestep.double() / 1000
    unpacked: Callable[[Tensor, Sequence[int]], Tensor] = lambda latents, shape: latents
    settings: Mapping[str, Any] = field(default_factory=dict)
    objectives: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "none": {},
            "refl": {},
            "grpo": {"num_generations": 2},
            "dpo": {"num_generations": 2},
            "srpo": {"srpo_positive": ["Red"], "srpo_negative": ["Green"], "srpo_template": "{word} {prompt}"},
        }
    )
    lora_keys: str = r"transformer\..*\.lora_[AB]\.weight"
    variants: Sequence[Mapping[str, Any]] = ({}, {"full_finetune": True}, {"sample_eta": 0.0})


# Kohya's names: stock diffusers and ComfyUI read them.
UNET_LORA_KEYS = r"lora_unet_\w+\.lora_(down|up)\.weight"
UNET_OBJECTIVES = {
    **Family(sdxl.build).objectives,
    "grpo": {"num_generations": 2, "sde_type": "ddim", "eta": 0.8},
}
UNET_VARIANTS: Sequence[Mapping[str, Any]] = (
    {"num_inference_steps": 1},
    {"num_inference_steps": 1, "sample_eta": 0.0},
    {"num_inference_steps": 4},
    {"timesteps": [999, 749, 500, 250], "sample_eta": 0.0},
    {"full_finetune": True},
)

FAMILIES: dict[str, Family] = {
    "sd3": Family(
        sd3.build,
        settings={"max_sequence_length": 5},
        call={"max_sequence_length": 5},
        variants=(
            {},
            {"full_finetune": True},
            {"sample_eta": 0.0, "shift": 5.0},
            {"drop_text_encoders": ["text_encoder_3"]},
        ),
    ),
    "sdxl": Family(
        sdxl.build,
        lora_keys=UNET_LORA_KEYS,
        objectives=UNET_OBJECTIVES,
        variants=UNET_VARIANTS,
    ),
    "sd1": Family(
        sd1.build,
        lora_keys=UNET_LORA_KEYS,
        objectives={"none": {}, "grpo": UNET_OBJECTIVES["grpo"]},
        variants=({"num_inference_steps": 1}, {"sample_eta": 0.0}),
    ),
    "sd1-v": Family(
        partial(sd1.build, prediction_type="v_prediction"),
        lora_keys=UNET_LORA_KEYS,
        objectives={"none": {}, "grpo": UNET_OBJECTIVES["grpo"]},
        variants=({"num_inference_steps": 1}, {"sample_eta": 0.0}),
    ),
}
