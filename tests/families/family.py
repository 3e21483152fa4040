"""What the tests of all families are run on; a family is one entry of `FAMILIES`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline
from torch import Tensor

import flux
import sd3
import z_image


@dataclass(frozen=True)
class Family:
    """A small random pipeline of a model family, and what differs between families in the tests.

    Attributes:
        build: Saves the pipeline into a folder, as `save_pretrained` lays it out.
        guidance: A scale that the stock pipeline is guided at.
        guided: Arguments of the stock pipeline's call that guide it at a scale.
        call: Further arguments of the call, beside prompts and steps.
        timestep: Our time t in [0, 1] of a timestep that the pipeline gives its scheduler.
        unpacked: The pipeline's latents (or network output) as [B, *latent], given our latent shape.
        settings: Settings of a training run.
        objectives: Objectives that a run is made of, with settings of their own.
        variants: Settings of the exports that stock diffusers must reproduce.
    """

    build: Callable[[Path], None]
    guidance: float = 4.0
    guided: Callable[[float], Mapping[str, Any]] = lambda scale: {"guidance_scale": scale}
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
    variants: Sequence[Mapping[str, Any]] = ({}, {"full_finetune": True}, {"sample_eta": 0.0})


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
    "flux": Family(
        flux.dev,
        settings={"resolution": 16, "max_sequence_length": 8},
        call={"height": 16, "width": 16, "max_sequence_length": 8},
        unpacked=lambda latents, shape: FluxPipeline._unpack_latents(latents, *shape[1:], 1),
    ),
    "flux-schnell": Family(
        flux.schnell,
        guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", ""]},
        settings={"resolution": 16, "max_sequence_length": 8},
        call={"height": 16, "width": 16, "max_sequence_length": 8},
        unpacked=lambda latents, shape: FluxPipeline._unpack_latents(latents, *shape[1:], 1),
        objectives={"none": {}},
        variants=({},),
    ),
    "z-image": Family(
        z_image.build,
        guided=lambda scale: {"guidance_scale": scale - 1},
        settings={"resolution": 16, "max_sequence_length": 40},
        call={"height": 16, "width": 16, "max_sequence_length": 40},
    ),
}
