"""What the tests of all families are run on; a family is one entry of `FAMILIES`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

import sd3
import sit


@dataclass(frozen=True)
class Family:
    """A small random pipeline of a model family, and what differs between families in the tests.

    Attributes:
        build: Saves the pipeline into a folder, as `save_pretrained` lays it out.
        prompts: Two that it understands.
        stock: The pipeline as stock diffusers loads it from the folder.
        guidance: A scale that the stock pipeline is guided at.
        call: Further arguments of the stock pipeline's call, beside prompts, steps and guidance.
        timestep: Our time t in [0, 1] of a timestep that the pipeline gives its scheduler.
        unpacked: The pipeline's latents (or network output) as [B, *latent], given our latent shape.
        settings: Settings of a training run.
        objectives: Objectives that a run is made of, with settings of their own.
        variants: Settings of the exports that stock diffusers must reproduce.
    """

    build: Callable[[Path], None]
    prompts: Sequence[str] = ("a handwritten seven", "a handwritten two")
    stock: Callable[[Path], Any] = diffusers.DiffusionPipeline.from_pretrained
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
    "sit": Family(sit.build, prompts=("class 7", "class 2"), stock=sit.stock),
}
