"""FLUX.1: flow matching on packed latents, as diffusers' `FluxPipeline`; guidance-distilled (dev) or not (schnell)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dmdr.backends.flow import FlowOptions
from dmdr.backends.pipeline import Network
from dmdr.backends.tokens import TokenBackend
from dmdr.errors import ConfigError
from dmdr.protocols import Role
from dmdr.types import Condition

# All attention projections: of both streams in the double blocks, and of the single blocks (RTDMD, arXiv 2605.26108).
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True, kw_only=True)
class FluxOptions(FlowOptions):
    """Options of FLUX.1.

    Attributes:
        guidance_scale: What a guidance-distilled network is told.
    """

    guidance_scale: float = 1.0


class FluxBackend(TokenBackend):
    """Teacher, fake score and student on one FLUX.1 transformer (`protocols.Backend`).

    A guidance-distilled network F(g) is told its guidance scale g, and has no unconditional branch. With w0 the user's
    --guidance_scale, its conditional prediction is c = F(1) and its direction of guidance

        c - u = (F(w0) - F(1)) / (w0 - 1),

    so that u + w (c - u) is the stock pipeline's own prediction at w = 1 and at w = w0, and a straight line through
    both elsewhere. Student, fake score and reference are told 1. Without the guidance input, guidance leads away from
    the empty prompt, as with the pipeline's `true_cfg_scale`.
    """

    Options = FluxOptions
    options: FluxOptions
    pipeline_class = FluxPipeline
    network_class = FluxTransformer2DModel
    lora_targets = LORA_TARGETS
    feature_blocks = ("transformer_blocks", "single_transformer_blocks")

    def __init__(self, folder: str, options: FluxOptions) -> None:
        super().__init__(folder, options)
        self.network_config.require("patch_size", 1)
        self.network_config.require("guidance_embeds", True, False)
        self.distilled: bool = self.network_config["guidance_embeds"]
        for name in ("zero_empty_prompt", "negative_prompt"):
            if self.distilled and getattr(options, name) is not None:
                raise ConfigError(
                    f"--{name}: {folder} has no unconditional answers (guidance is an input); leave it out"
                )

    def own_guidance(self) -> float | None:
        return super().own_guidance() if self.distilled else 1.0

    def other_guidance(self) -> float:
        """The user's scale, where it is an input of the network."""
        return self.options.guidance_scale if self.distilled and self.options.guidance_scale != 1 else 0.0

    def asked(self, cond: Condition, guidance: float) -> Mapping[str, Tensor]:
        """Distilled for no other scale than 1, it has no direction of guidance: all answers are that of 1."""
        if not self.distilled:
            return super().asked(cond, guidance)
        scale = guidance if self.options.guidance_scale != 1 else 1.0
        return {**cond.tensors, "guidance": torch.full((len(cond),), scale, device=self.device)}

    def prepare(self, accelerator: Any, *, roles: Sequence[Role], sharding: DeviceMesh | None = None) -> None:
        super().prepare(accelerator, roles=roles, sharding=sharding)
        place = self.device, self.dtype
        self.image_ids = {
            (height, width): FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, *place)
            for _, height, width in self.latent_shapes
        }

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's sequence [B, max_sequence_length, D] and CLIP's pooled [B, P]."""
        sequence, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=self.text_length
        )
        return {"sequence": sequence, "pooled": pooled}

    def blank_embeddings(self, count: int) -> dict[str, Tensor]:
        config = self.network_config
        sequence = self.blank(count, self.text_length, config.whole("joint_attention_dim"))
        return {"sequence": sequence, "pooled": self.blank(count, config.whole("pooled_projection_dim"))}

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """`cond` may hold the network's `guidance`, [B] float32; it is 1 where it does not."""
        height, width = x_t.shape[2:]
        guidance = cond.get("guidance", torch.ones(len(x_t), device=x_t.device)) if self.distilled else None
        packed: Tensor = network(
            hidden_states=self.pack(x_t),
            timestep=self.path.timestep(t).to(x_t.dtype) / 1000,  # rounded as in the pipeline
            guidance=guidance,
            encoder_hidden_states=cond["sequence"],
            pooled_projections=cond["pooled"],
            txt_ids=x_t.new_zeros(cond["sequence"].shape[1], 3),
            img_ids=self.image_ids[height, width],
            return_dict=False,
        )[0]
        return self.unpack(packed, height, width)
