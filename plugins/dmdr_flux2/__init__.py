"""FLUX.2 klein: flow matching on 128-channel latents, as diffusers' `Flux2KleinPipeline`; base or distilled."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dmdr.backends.flow import FlowOptions
from dmdr.backends.latents import Latents
from dmdr.backends.pipeline import Network
from dmdr.backends.tokens import TokenBackend
from dmdr.errors import ConfigError
from dmdr.protocols import Role, unread

# All attention projections of the double blocks; those of the single blocks, of which one is also the MLP's first layer
# and the other its last (RTDMD, arXiv 2605.26108).
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "to_qkv_mlp_proj",
)


@dataclass(frozen=True, kw_only=True)
class Flux2KleinOptions(FlowOptions):
    """Options of FLUX.2 klein, whose guidance always leads away from the empty prompt.

    Attributes:
        guidance_scale: Of the teacher; 1 for a distilled model.
    """

    negative_prompt: None = unread()
    zero_empty_prompt: None = unread()
    reward_vae: None = unread()
    guidance_scale: float = 1.0


class Flux2Latents(Latents):
    """Those of an `AutoencoderKLFlux2`: squares of 2 x 2 as channels, brought to unit variance by a batch norm."""

    vae_class = AutoencoderKLFlux2

    def measure(self, reader: str) -> None:
        self.config.require("patch_size", [2, 2], (2, 2))
        self.config.number("batch_norm_eps", positive=True)
        self.channels = 4 * self.config.whole("latent_channels")
        self.scale = 2 ** len(self.config.wholes(self.blocks))

    def decode(self, vae: Any, states: Tensor) -> Tensor:
        mean, deviation = self._moments(vae, states)
        decoded: Tensor = vae.decode(pixel_shuffle(states * deviation + mean, 2).to(vae.dtype), return_dict=False)[0]
        return decoded

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        latents = pixel_unshuffle(self.encoded(vae, pixels), 2)
        mean, deviation = self._moments(vae, latents)
        return (latents - mean) / deviation

    def _moments(self, vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        deviation = (vae.bn.running_var + self.config["batch_norm_eps"]).sqrt()
        mean, deviation = (each.view(1, -1, 1, 1).to(like) for each in (vae.bn.running_mean, deviation))
        return mean, deviation


class Flux2KleinBackend(TokenBackend):
    """Teacher, fake score and student on one FLUX.2 klein transformer (`protocols.Backend`).

    The text's padding takes part in the attention, so that embeddings are stored whole, and another
    --max_sequence_length is another model.

    The pipeline shifts its grid by a rule of the number of steps. Training knew FLUX.1's, by the number of tokens alone
    (black-forest-labs, in the pull request 1516 of Nerogar/OneTrainer): `shift`, for renoising.
    """

    Options = Flux2KleinOptions
    options: Flux2KleinOptions
    pipeline_class = Flux2KleinPipeline
    network_class = Flux2Transformer2DModel
    latents_class = Flux2Latents
    feature_blocks = ("transformer_blocks", "single_transformer_blocks")
    default_size = 64
    patch_size = 1

    def __init__(self, folder: str, options: Flux2KleinOptions) -> None:
        super().__init__(folder, options)
        config = self.network_config
        config.require("patch_size", 1)
        config.require("guidance_embeds", False)
        # `to_out` alone would also name the list that a double block has under this name.
        single = range(config.whole("num_single_layers"))
        self.lora_targets = (*LORA_TARGETS, *(f"single_transformer_blocks.{i}.attn.to_out" for i in single))
        if self.index["is_distilled"] and options.guidance_scale != 1:
            raise ConfigError(
                f"--guidance_scale {options.guidance_scale:g}: {folder} is distilled and is not guided; give 1, or "
                "another teacher"
            )

    def prepare(self, accelerator: Any, *, roles: Sequence[Role], sharding: DeviceMesh | None = None) -> None:
        super().prepare(accelerator, roles=roles, sharding=sharding)

        def places(*lengths: int) -> Tensor:  # of frame, row, column and word
            return torch.cartesian_prod(*(torch.arange(length, device=self.device) for length in lengths))

        self.text_ids = places(1, 1, 1, self.text_length)
        self.image_ids = {(height, width): places(1, height, width, 1) for _, height, width in self.latent_shapes}

    def own_guidance(self) -> float | None:
        return 1.0 if self.index["is_distilled"] else super().own_guidance()

    def own_grid_shift(self, num_inference_steps: int) -> float:
        if not self.scheduler_config["use_dynamic_shifting"]:
            return self.own_shift()
        _, height, width = self.latent_shape
        return math.exp(compute_empirical_mu(height * width, num_inference_steps))

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Three hidden states of the text encoder side by side, [B, max_sequence_length, 3 D]."""
        sequence, _ = pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.text_length)
        return {"sequence": sequence}

    def blank_embeddings(self, count: int) -> dict[str, Tensor]:
        width = self.network_config.whole("joint_attention_dim")
        return {"sequence": self.blank(count, self.text_length, width)}

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        height, width = x_t.shape[2:]
        packed: Tensor = network(
            hidden_states=self.pack(x_t),
            timestep=self.path.timestep(t).to(x_t.dtype) / 1000,  # rounded as in the pipeline
            guidance=None,
            encoder_hidden_states=cond["sequence"],
            txt_ids=self.text_ids,
            img_ids=self.image_ids[height, width],
            return_dict=False,
        )[0]
        return self.unpack(packed, height, width)
