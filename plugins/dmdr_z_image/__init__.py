"""Z-Image: flow matching on a single-stream transformer, as diffusers' `ZImagePipeline`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from dmdr.backends.flow import FlowBackend, FlowOptions
from dmdr.backends.pipeline import Network
from dmdr.backends.texts import LENGTH, in_groups, stacked
from dmdr.protocols import unread

# All attention projections, of the blocks and of both refiners (diffusers' DreamBooth example for Z-Image).
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK = 32  # tokens: the network fills up texts to a multiple of them


@dataclass(frozen=True, kw_only=True)
class ZImageOptions(FlowOptions):
    """Options of Z-Image, which knows no zeros in place of the empty prompt, and has one text encoder."""

    zero_empty_prompt: None = unread()


class ZImageBackend(FlowBackend):
    """Teacher, fake score and student on one Z-Image transformer (`protocols.Backend`).

    Guidance is w in u + w (c - u); the pipeline counts from zero, c + g (c - u), and thus calls the same g = w - 1.
    """

    Options = ZImageOptions
    pipeline_class = ZImagePipeline
    network_class = ZImageTransformer2DModel
    lora_targets = LORA_TARGETS
    padded = ("sequence",)
    text_unit = BLOCK
    feature_blocks = ("layers",)
    unguided: ClassVar[Mapping[str, Any]] = {"guidance_scale": 0.0}
    patch_size = 2  # the network's own default, of those that it has

    def __init__(self, folder: str, options: ZImageOptions) -> None:
        super().__init__(folder, options)
        for name, taken in (("all_patch_size", self.patch_size), ("all_f_patch_size", 1)):
            if taken not in self.network_config.wholes(name):
                raise self.network_config.refused(name, f"a list with {taken}")

    @property
    def feature_width(self) -> int:
        return self.network_config.whole("dim")

    @property
    def text_limit(self) -> int:
        """Text, in whole blocks, and the image behind it share the first axis of the rotary embedding."""
        return self.network_config.wholes("axes_lens")[0] // BLOCK * BLOCK - BLOCK

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Sequence [B, max_sequence_length, D], zero after each prompt's own length [B] int64."""
        sequences, _ = pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return stacked(sequences, self.text_length)

    def blank_embeddings(self, count: int) -> dict[str, Tensor]:
        width = self.network_config.whole("cap_feat_dim")
        return stacked([self.blank(self.text_length, width)] * count, self.text_length)

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return in_groups(partial(self._ask, network), self.together(cond), x_t, t, cond)

    def _ask(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        texts = zip(cond["sequence"], cond[LENGTH].tolist(), strict=True)
        negative = network(
            x=list(x_t.unsqueeze(2)),  # of one frame each
            t=(1 - t).to(torch.float32),  # 0 is noise
            cap_feats=[text[:length] for text, length in texts],
            return_dict=False,
        )[0]
        return -torch.stack(list(negative)).squeeze(2)

    def image_places(self, answer: Any, x_t: Tensor) -> Tensor:
        """The text comes behind the image, whose tokens are filled up, too."""
        places: Tensor = answer[:, : x_t[0, 0].numel() // self.patch_size**2]
        return places

    def draw_noise(self, step: int, count: int) -> Tensor:
        """All in float32."""
        return self._randn((count, *self.latent_shape), torch.float32)
