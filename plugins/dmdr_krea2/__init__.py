"""Krea 2: flow matching on packed latents of Qwen-Image's VAE, as diffusers' `Krea2Pipeline`; raw or turbo."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor

from dmdr.backends.flow import FlowOptions
from dmdr.backends.latents import QwenImageLatents
from dmdr.backends.pipeline import Network
from dmdr.backends.texts import stacked
from dmdr.backends.tokens import MaskedTextBackend
from dmdr.protocols import unread

# All attention projections, of the blocks and of the stage that fuses the text encoder's layers.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_gate", "to_out.0")
DISTILLED_MU = 1.15  # of the turbo model's shift, at every size (diffusers' `Krea2Pipeline`)


@dataclass(frozen=True, kw_only=True)
class Krea2Options(FlowOptions):
    """Options of Krea 2."""

    zero_empty_prompt: None = unread()
    reward_vae: None = unread()


class Krea2Backend(MaskedTextBackend):
    """Teacher, fake score and student on one Krea 2 transformer (`protocols.Backend`).

    Guidance is w in u + w (c - u); the pipeline counts from zero, c + g (c - u), and thus calls the same g = w - 1.
    """

    Options = Krea2Options
    pipeline_class = Krea2Pipeline
    network_class = Krea2Transformer2DModel
    latents_class = QwenImageLatents
    lora_targets = LORA_TARGETS
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 0.0}

    def __init__(self, folder: str, options: Krea2Options) -> None:
        super().__init__(folder, options)
        self.index.require("patch_size", self.patch_size)

    def own_guidance(self) -> float | None:
        return 1.0 if self.index["is_distilled"] else super().own_guidance()

    def own_shift(self) -> float:
        turbo = self.index["is_distilled"] and self.scheduler_config["use_dynamic_shifting"]
        return math.exp(DISTILLED_MU) if turbo else super().own_shift()

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Layers of the text encoder, [B, max_sequence_length, layers, D], zero after each prompt's length [B] int64.

        The pipeline pads in the middle of its template; the network knows no order of these rows.
        """
        states, mask = pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.text_length)
        return stacked([text[own] for text, own in zip(states, mask, strict=True)], self.text_length)

    def blank_embeddings(self, count: int) -> dict[str, Tensor]:
        layers, width = (self.network_config.whole(name) for name in ("num_text_layers", "text_hidden_dim"))
        return stacked([self.blank(self.text_length, layers, width)] * count, self.text_length)

    def answer(self, network: Network, x_t: Tensor, t: Tensor, sequence: Tensor, mask: Tensor | None) -> Tensor:
        places = [size // self.patch_size for size in x_t.shape[2:]]
        packed: Tensor = network(
            hidden_states=self.pack(x_t),
            encoder_hidden_states=sequence,
            timestep=(self.path.timestep(t).to(torch.float32) / 1000).to(x_t.dtype),  # rounded as in the pipeline
            position_ids=Krea2Pipeline.prepare_position_ids(sequence.shape[1], *places, x_t.device),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return packed
