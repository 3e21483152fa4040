"""How the plain loop calls a stock pipeline: its text encoders, and its network in its own layout."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dmdr.paths import NoisePath
from dmdr.prompts import Row
from dmdr_sit.pipeline import SiTPipeline

Cond = tuple[Tensor, ...]


class Stock:
    """A pipeline on a device.

    Attributes:
        pipeline: The class that loads it.
        network: Its denoising network.
        eps: Whether that predicts the noise; else it predicts the velocity eps - x0.
        guided: Whether guidance is an input of the network.
    """

    name: ClassVar[str] = "transformer"
    eps: ClassVar[bool] = False
    pipeline: ClassVar[Any] = DiffusionPipeline
    guided = False

    def __init__(self, pipe: Any, path: NoisePath, text_length: int, size: tuple[int, int]) -> None:
        self.pipe, self.path, self.text_length, self.size = pipe, path, text_length, size
        self.network: Any = getattr(pipe, self.name)

    def encode(self, rows: Sequence[Row]) -> Cond:
        """The condition of prompt rows, each [B, ...]."""
        raise NotImplementedError

    def empty(self, count: int) -> Cond:
        """What guidance leads away from."""
        return self.encode([{"prompt": ""}] * count)

    def call(self, network: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        """The network's answer [B, *latent] to x_t [B, *latent] at times t [B]."""
        raise NotImplementedError


class SD3(Stock):
    """`StableDiffusion3Pipeline`."""

    def encode(self, rows: Sequence[Row]) -> Cond:
        prompts = [row["prompt"] for row in rows]
        sequence, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return sequence, pooled

    def call(self, network: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        answer: Tensor = network(x_t, cond[0], cond[1], 1000 * t).sample
        return answer


class SiT(Stock):
    """`SiTPipeline`."""

    pipeline = SiTPipeline

    def encode(self, rows: Sequence[Row]) -> Cond:
        return (torch.tensor([row["label"] for row in rows], device=self.pipe.device),)

    def call(self, network: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        answer: Tensor = network(x_t, t, *cond).sample
        return answer


class SDXL(Stock):
    """`StableDiffusionXLPipeline`."""

    name, eps = "unet", True

    def encode(self, rows: Sequence[Row]) -> Cond:
        prompts = [row["prompt"] for row in rows]
        sequence, _, pooled, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        width, height = self.size
        ids = torch.tensor([[height, width, 0, 0, height, width]] * len(rows)).to(pooled)
        return sequence, pooled, ids

    def empty(self, count: int) -> Cond:
        sequence, pooled, ids = super().empty(count)
        return torch.zeros_like(sequence), torch.zeros_like(pooled), ids

    def call(self, network: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        added = {"text_embeds": cond[1], "time_ids": cond[2]}
        answer: Tensor = network(x_t, self.path.timestep(t), cond[0], added_cond_kwargs=added).sample
        return answer


class Flux(Stock):
    """`FluxPipeline`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.guided = bool(self.network.config.guidance_embeds)

    def encode(self, rows: Sequence[Row]) -> Cond:
        sequence, pooled, _ = self.pipe.encode_prompt(
            [row["prompt"] for row in rows], None, max_sequence_length=self.text_length
        )
        return sequence, pooled

    def call(self, network: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        count, channels, height, width = x_t.shape
        answer = network(
            hidden_states=self.pipe._pack_latents(x_t, count, channels, height, width),
            timestep=t.to(x_t.dtype),
            guidance=torch.full((count,), guidance, device=x_t.device) if self.guided else None,
            encoder_hidden_states=cond[0],
            pooled_projections=cond[1],
            txt_ids=x_t.new_zeros(cond[0].shape[1], 3),
            img_ids=self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, x_t.device, x_t.dtype),
        ).sample
        unpacked: Tensor = self.pipe._unpack_latents(answer, height, width, 1)
        return unpacked


STOCK: dict[str, type[Stock]] = {
    "StableDiffusion3Pipeline": SD3,
    "SiTPipeline": SiT,
    "StableDiffusionXLPipeline": SDXL,
    "FluxPipeline": Flux,
}
