"""Stable Diffusion 3 and 3.5: flow matching on an MMDiT, as diffusers' `StableDiffusion3Pipeline`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from dmdr.backends.flow import FlowBackend, FlowOptions
from dmdr.backends.pipeline import Network
from dmdr.errors import ConfigError
from dmdr.protocols import require

# All attention projections of the MMDiT blocks, of the image and of the text stream (DMDR's released scripts).
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True, kw_only=True)
class SD3Options(FlowOptions):
    """Options of Stable Diffusion 3.

    Attributes:
        drop_text_encoders: text_encoder_3 does without T5, whose part of the sequence is then zero.
    """

    drop_text_encoders: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        others = set(self.drop_text_encoders or ()) - {"text_encoder_3"}
        require(self, "drop_text_encoders", not others, "text_encoder_3, which alone the pipeline can do without")


class SD3Backend(FlowBackend):
    """Teacher, fake score and student on one SD3 transformer (`protocols.Backend`)."""

    Options = SD3Options
    options: SD3Options
    pipeline_class = StableDiffusion3Pipeline
    network_class = SD3Transformer2DModel
    lora_targets = LORA_TARGETS

    def __init__(self, folder: str, options: SD3Options) -> None:
        super().__init__(folder, options)
        self.network_config.whole("sample_size")  # its position embeddings are cut from the middle of the table
        longest = self.network_config.whole("pos_embed_max_size") * self.patch_size * self.latents.scale
        for size in self.sizes:
            if max(size) > longest:
                raise ConfigError(f"--resolution {size} is too large for {folder}: give {longest} or less")

    @property
    def dropped_text_encoders(self) -> Sequence[str]:
        return self.options.drop_text_encoders or ()

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Sequence [B, 77 + max_sequence_length, D] and pooled [B, P]; without T5 its part of the sequence is zero."""
        sequence, _, pooled, _ = pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"sequence": sequence, "pooled": pooled}

    def blank_embeddings(self, count: int) -> dict[str, Tensor]:
        config, length = self.network_config, self.text.clip_length() + self.text_length
        sequence = self.blank(count, length, config.whole("joint_attention_dim"))
        return {"sequence": sequence, "pooled": self.blank(count, config.whole("pooled_projection_dim"))}

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = network(
            hidden_states=x_t,
            timestep=self.path.timestep(t).to(torch.float32),
            encoder_hidden_states=cond["sequence"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]
        return output
