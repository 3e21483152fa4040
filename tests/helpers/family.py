"""What the tests of all families are run on; a family is one entry of `FAMILIES`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import FluxPipeline
from torch import Tensor

import flux
import flux2
import krea2
import qwen_image
import sd1
import sd3
import sdxl
import sit
import z_image
from dmdr.errors import ConfigError
from dmdr.settings.parse import parse

SIZES = "24x16,16"  # of a run, in pixels
FIRST = {"height": 16, "width": 24}
Stock = Callable[[Path, Sequence[str], Path], None]  # draws an export's images for prompts, as its card says


@dataclass(frozen=True)
class Family:
    """A small random pipeline of a model family, and what differs between families in the tests.

    Attributes:
        build: Saves the pipeline into a folder, as `save_pretrained` lays it out.
        prompts: Two that it understands.
        stock: The pipeline as stock diffusers loads it from the folder.
        guidance: A scale that the stock pipeline is guided at.
        guided: Arguments of the stock pipeline's call that guide it at a scale.
        argument: Of the stock pipeline's call for the prompts.
        negative: Whether it knows a negative prompt.
        call: Further arguments of the call, beside prompts and steps.
        timestep: Our time t in [0, 1] of a timestep that the pipeline gives its scheduler.
        unpacked: The pipeline's latents (or network output) as [B, *latent], given our latent shape.
        settings: Settings of a training run.
        objectives: Objectives that a run is made of, with settings of their own.
        lora_keys: Form of the keys in an exported LoRA file.
        variants: Settings of the exports that stock diffusers must reproduce.
    """

    build: Callable[[Path], None]
    prompts: Sequence[str] = ("a handwritten seven", "a handwritten two")
    stock: Callable[[Path], Any] = diffusers.DiffusionPipeline.from_pretrained
    guidance: float = 4.0
    guided: Callable[[float], Mapping[str, Any]] = lambda scale: {"guidance_scale": scale}
    argument: str = "prompt"
    negative: bool = True
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

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The prompts as rows."""
        return [{"prompt": prompt} for prompt in self.prompts]


# Kohya's names: stock diffusers and ComfyUI read them.
UNET_LORA_KEYS = r"lora_unet_\w+\.lora_(down|up)\.weight"
UNET_OBJECTIVES = {
    **Family(sdxl.build).objectives,
    "grpo": {"num_generations": 2, "sde_type": "ddim", "eta": 0.8},
}
UNET_VARIANTS: Sequence[Mapping[str, Any]] = (
    {"num_inference_steps": 1},
    {"num_inference_steps": 1, "sde_type": "ddim", "eta": 0.9, "sample_eta": 0.5},
    {"num_inference_steps": 4},
    {"timesteps": [999, 749, 500, 250], "sample_eta": 0.0},
    BETWEEN := {"timesteps": [999, 749, 499, 249], "sde_type": "ddim", "eta": 0.9, "sample_eta": 0.9},
    {"full_finetune": True},
)

# Who reads the flags that some families do not.
FLOWS = ("Flux2KleinPipeline", "FluxPipeline", "Krea2Pipeline", "QwenImagePipeline")
UNETS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
TEXTUAL = ", ".join([*FLOWS, "StableDiffusion3Pipeline", *UNETS, "ZImagePipeline"])
READERS = {
    "drop_text_encoders": "StableDiffusion3Pipeline",
    "max_sequence_length": ", ".join([*FLOWS, "StableDiffusion3Pipeline", "ZImagePipeline"]),
    "negative_prompt": ", ".join([*FLOWS[1:], "StableDiffusion3Pipeline", *UNETS, "ZImagePipeline"]),
    "prompt_cache": TEXTUAL,
    "quantize": TEXTUAL,
    "reward_vae": ", ".join(["FluxPipeline", "SiTPipeline", "StableDiffusion3Pipeline", *UNETS, "ZImagePipeline"]),
    "shift": ", ".join([*FLOWS, "SiTPipeline", "StableDiffusion3Pipeline", "ToyPipeline", "ZImagePipeline"]),
    "zero_empty_prompt": ", ".join(["FluxPipeline", "StableDiffusion3Pipeline", *UNETS]),
}


def refuses_unread(folder: Path, option: str, value: Any) -> None:
    """The settings refuse a flag for a pipeline's folder, whose family does not read it, and say whose do."""
    family = json.loads((folder / "model_index.json").read_text())["_class_name"]
    who = f"model family with this flag: {READERS[option]}; this run uses {family}, so leave it out"
    with pytest.raises(ConfigError) as error:
        parse(settings={"model": str(folder), option: value})
    assert str(error.value) == f"unknown setting '{option}' ({who})"


FAMILIES: dict[str, Family] = {
    "sd3": Family(
        sd3.build,
        objectives={**Family(sd3.build).objectives, "nft": {"num_generations": 2, "old_decay_ramp": 0.1}},
        settings={"max_sequence_length": 5, "resolution": SIZES},
        call={"max_sequence_length": 5, **FIRST},
        variants=(
            {},
            {"full_finetune": True},
            {"sample_eta": 0.0, "shift": 5.0},
            {"drop_text_encoders": ["text_encoder_3"]},
        ),
    ),
    "sdxl": Family(
        sdxl.build,
        settings={"resolution": SIZES},
        call=FIRST,
        lora_keys=UNET_LORA_KEYS,
        objectives=UNET_OBJECTIVES,
        variants=UNET_VARIANTS,
    ),
    "sd1": Family(
        sd1.build,
        lora_keys=UNET_LORA_KEYS,
        objectives={"grpo": UNET_OBJECTIVES["grpo"]},
        variants=({"num_inference_steps": 1}, {"sample_eta": 0.0}),
    ),
    "sd1-v": Family(
        partial(sd1.build, prediction_type="v_prediction"),
        lora_keys=UNET_LORA_KEYS,
        objectives={"none": {}},
        variants=({"num_inference_steps": 1}, {"sample_eta": 0.0}, BETWEEN),
    ),
    "flux": Family(
        flux.dev,
        negative=False,
        settings={"resolution": SIZES, "max_sequence_length": 8},
        call={**FIRST, "max_sequence_length": 8},
        unpacked=lambda latents, shape: FluxPipeline._unpack_latents(latents, *shape[1:], 1),
    ),
    "flux-schnell": Family(
        flux.schnell,
        guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", ""]},
        settings={"resolution": SIZES, "max_sequence_length": 8},
        call={**FIRST, "max_sequence_length": 8},
        unpacked=lambda latents, shape: FluxPipeline._unpack_latents(latents, *shape[1:], 1),
        objectives={"none": {}},
        variants=({},),
    ),
    "flux2-klein": Family(
        flux2.build,
        negative=False,
        settings={"resolution": SIZES, "max_sequence_length": 48},
        call={**FIRST, "max_sequence_length": 48},
        unpacked=lambda latents, shape: latents.mT.unflatten(2, shape[1:]),
    ),
    "qwen-image": Family(
        qwen_image.build,
        guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": [" ", " "]},
        settings={"resolution": SIZES, "max_sequence_length": qwen_image.TEXT},
        call={**FIRST, "max_sequence_length": qwen_image.TEXT},
        unpacked=lambda latents, shape: FluxPipeline._unpack_latents(latents, *shape[1:], 1),
    ),
    "krea2": Family(
        krea2.build,
        guided=lambda scale: {"guidance_scale": scale - 1},
        settings={"resolution": SIZES, "max_sequence_length": qwen_image.TEXT},
        call={**FIRST, "max_sequence_length": qwen_image.TEXT},
        unpacked=lambda latents, shape: FluxPipeline._unpack_latents(latents, *shape[1:], 1),
    ),
    "z-image": Family(
        z_image.build,
        guided=lambda scale: {"guidance_scale": scale - 1},
        settings={"resolution": SIZES, "max_sequence_length": 40},
        call={**FIRST, "max_sequence_length": 40},
    ),
    "sit": Family(sit.build, argument="class_labels", negative=False, prompts=("class 7", "class 2"), stock=sit.stock),
}
