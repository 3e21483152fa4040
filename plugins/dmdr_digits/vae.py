"""A tiny AutoencoderKL: 8x8 images with three channels to 4x4 latents with four."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from dmdr_digits.cache import scaled
from dmdr_digits.data import train_scans
from dmdr_digits.fit import fit


def build_vae() -> Any:
    """Trained on the scans; shift and scale bring its latents to zero mean and unit variance."""
    images = train_scans().images * 2 - 1
    vae: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )

    def loss(rows: Tensor) -> Tensor:
        posterior = vae.encode(images[rows]).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        return F.mse_loss(reconstruction, images[rows]) + 1e-3 * posterior.kl().mean() / 64

    fit(vae, loss, "digits: vae", examples=len(images), steps=scaled(900), average=0.99)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae
