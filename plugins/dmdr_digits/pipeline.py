"""A genuine StableDiffusion3Pipeline made small, and the training of its transformer: the teacher."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from dmdr_digits.cache import scaled
from dmdr_digits.data import PROMPTS, train_scans
from dmdr_digits.fit import fit
from dmdr_digits.quiet import quiet
from dmdr_digits.text import WIDTH, build_text_encoder, build_tokenizer
from dmdr_digits.vae import build_vae

TEXT_LENGTH = 1  # there is no T5: one zero token in its place instead of the pipeline's default 256


def build_pipeline(folder: Path) -> None:
    """Train VAE and teacher; write, in half precision, what `StableDiffusion3Pipeline.from_pretrained` loads."""
    vae = build_vae()
    tokenizer = build_tokenizer()
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    train_teacher(pipeline)
    with quiet():
        pipeline.to(torch.float16)
        pipeline.save_pretrained(folder)


def build_transformer() -> Any:
    """About 436k parameters, initialised as DiT does: every block starts as the identity, the output at zero."""
    transformer: Any = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=4,
    )
    gates = [layer.linear for block in transformer.transformer_blocks for layer in (block.norm1, block.norm1_context)]
    for layer in (*gates, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def train_teacher(pipeline: Any) -> None:
    """Rectified flow: the transformer, told 1000 t, regresses the velocity eps - x0 at x_t = (1 - t) x0 + t eps.

    Half of the times are uniform, for the ends; half are logit-normal as in SD3, which is better than uniform alone.
    One prompt in ten is replaced by the empty one, whose encoding classifier-free guidance takes as unconditional.
    """
    train = train_scans()
    vae, transformer = pipeline.vae, pipeline.transformer
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [*PROMPTS, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
        )
        posterior = vae.encode(train.images * 2 - 1).latent_dist

    def loss(rows: Tensor) -> Tensor:
        latents = posterior.mean[rows] + posterior.std[rows] * torch.randn_like(posterior.mean[rows])
        x0 = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        prompt = torch.where(torch.rand(len(rows)) < 0.1, len(PROMPTS), train.labels[rows])
        u = (torch.randperm(len(rows)) + torch.rand(len(rows))) / len(rows)  # uniform, one in each stratum
        t = torch.where(torch.rand(len(rows)) < 0.5, u, torch.special.ndtri(u).sigmoid())
        eps = torch.randn_like(x0)
        t_ = t[:, None, None, None]
        velocity = transformer((1 - t_) * x0 + t_ * eps, embeds[prompt], pooled[prompt], 1000 * t).sample
        return (velocity - (eps - x0)).square().mean()

    fit(transformer, loss, "digits: teacher", examples=len(train), steps=scaled(3000), batch=128, average=0.995)
