"""Qwen-Image: flow matching on packed latents of Wan's VAE, as diffusers' `QwenImagePipeline`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor

from dmdr.backends.flow import FlowOptions
from dmdr.backends.latents import QwenImageLatents
from dmdr.backends.pipeline import Network
from dmdr.backends.texts import stacked
from dmdr.backends.tokens import MaskedTextBackend
from dmdr.paths import Prediction
from dmdr.protocols import unread

# All attention projections, of the image and of the text stream (ModelTC/Qwen-Image-Lightning).
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True, kw_only=True)
class QwenImageOptions(FlowOptions):
    """Options of Qwen-Image.

    Attributes:
        negative_prompt: Guidance leads away from this text; a space by default, as on the model's card.
    """

    zero_empty_prompt: None = unread()
    reward_vae: None = unread()
    negative_prompt: str = " "


class QwenImageBackend(MaskedTextBackend):
    """Teacher, fake score and student on one Qwen-Image transformer (`protocols.Backend`).

    The guided answer is the pipeline's: v = u + w (c - u), of which each token has the norm of c's token.
    """

    Options = QwenImageOptions
    pipeline_class = QwenImagePipeline
    network_class = QwenImageTransformer2DModel
    latents_class = QwenImageLatents
    lora_targets = LORA_TARGETS
    text_limit = 1024
    unguided: ClassVar[Mapping[str, Any]] = {"true_cfg_scale": 1.0}

    def __init__(self, folder: str, options: QwenImageOptions) -> None:
        super().__init__(folder, options)
        self.network_config.require("patch_size", self.patch_size)
        for name in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            self.network_config.require(name, False)  # of models that edit images or draw them in layers

    @property
    def network_channels(self) -> Mapping[str, int]:
        """Its configuration counts those of the output before packing."""
        return {**super().network_channels, "out_channels": self.latents.channels}

    def guided(self, c: Prediction, other: Prediction, w: Tensor) -> Prediction:
        line = super().guided(c, other, w)
        wanted, tokens = self.pack(c.value), self.pack(line.value)
        rescaled = tokens * (wanted.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True))
        return replace(line, value=self.unpack(rescaled, *line.value.shape[2:]))

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Sequence [B, max_sequence_length, D], zero after each prompt's own length [B] int64."""
        sequences, mask = pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.text_length
        )
        if mask is not None:  # which the pipeline leaves out where all have as many rows
            sequences = [text[own.bool()] for text, own in zip(sequences, mask, strict=True)]
        return stacked(list(sequences), self.text_length)

    def blank_embeddings(self, count: int) -> dict[str, Tensor]:
        width = self.network_config.whole("joint_attention_dim")
        return stacked([self.blank(self.text_length, width)] * count, self.text_length)

    def answer(self, network: Network, x_t: Tensor, t: Tensor, sequence: Tensor, mask: Tensor | None) -> Tensor:
        places = [size // self.patch_size for size in x_t.shape[2:]]
        packed: Tensor = network(
            hidden_states=self.pack(x_t),
            timestep=self.path.timestep(t).to(x_t.dtype) / 1000,  # rounded as in the pipeline
            encoder_hidden_states=sequence,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *places)]] * len(x_t),
            return_dict=False,
        )[0]
        return packed
