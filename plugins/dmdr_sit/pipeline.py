"""SiT in one file that needs torch and diffusers only: its network, and the pipeline that samples it.

A pipeline folder carries this file with it, so that diffusers loads it anywhere:

    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
"""

import math
import re
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import CogVideoXLoraLoaderMixin, PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256  # width of the timestep's embedding before its MLP


class SiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The class-conditional transformer of SiT; its weights have the names of the published checkpoints.

    `forward` speaks rectified flow with t = 1 as noise, whichever way round the network was trained.

    Args:
        sample_size: Side of the latents; position embeddings are made for it.
        patch_size: Side of the squares of latents that are one token.
        in_channels: Channels of the latents.
        num_layers, num_attention_heads, attention_head_dim: Depth and width; the hidden size is heads x dim.
        num_classes: Classes; the label of this number is the null label of classifier-free guidance.
        learn_sigma: The output has as many channels again, which are ignored (as in the authors' own release).
        noise_at_zero: The network was trained with t = 0 as noise and the velocity x0 - eps (the authors' own release)
            instead of t = 1 and eps - x0 (REPA).

    Source: Ma et al. 2024, arXiv 2401.08740; blocks with adaLN-Zero of Peebles & Xie 2022, arXiv 2212.09748, section
        3.2; Yu et al. 2024 (REPA), arXiv 2410.06940.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("SiTBlock",)
    pos_embed: Tensor

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        noise_at_zero: bool = False,
    ) -> None:
        super().__init__()
        width, channels = num_attention_heads * attention_head_dim, in_channels * (2 if learn_sigma else 1)
        self.x_embedder = named(proj=nn.Conv2d(in_channels, width, patch_size, stride=patch_size))
        self.t_embedder = named(mlp=nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)))
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + 1, width))
        self.blocks = nn.ModuleList(SiTBlock(width, num_attention_heads) for _ in range(num_layers))
        self.final_layer = FinalLayer(width, patch_size**2 * channels)
        # A buffer, since it is not trained; in the state dict, since it is in the published checkpoints.
        self.register_buffer("pos_embed", sincos_2d(sample_size // patch_size, width)[None])
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity eps - x0.

        Args:
            hidden_states: x_t = (1 - t) x0 + t eps, [B, C, H, W].
            timestep: t in [0, 1], [B].
            class_labels: [B] int64 in [0, num_classes]; the last is the null label.

        Returns:
            [B, C, H, W].
        """
        config: Any = self.config
        x = self.x_embedder(hidden_states).flatten(2).transpose(1, 2) + self.pos_embed
        t = 1 - timestep if config.noise_at_zero else timestep
        c = self.t_embedder(fourier(t).to(hidden_states.dtype)) + self.y_embedder(class_labels)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c)
            else:
                x = block(x, c)
        side, patch = config.sample_size // config.patch_size, config.patch_size
        x = self.final_layer(x, c).reshape(len(x), side, side, patch, patch, -1)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, side * patch, side * patch)[:, : config.in_channels]
        velocity = -x if config.noise_at_zero else x
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


class SiTBlock(nn.Module):
    """x + gate attn(modulated norm(x)), then the same with an MLP; shifts, scales and gates are read off c."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = named(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(approximate="tanh"), fc2=nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x [B, N, D] under the condition c [B, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values, in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, dim]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FinalLayer(nn.Module):
    """Tokens to patches."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(norm(x) * (1 + scale) + shift)


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules one after the other, under these names."""
    return nn.Sequential(OrderedDict(modules))


def norm(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def fourier(t: Tensor) -> Tensor:
    """cos, then sin, of times [B] at geometric frequencies from 1 to 1/10000; [B, 256], in float32 or better."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    half = FREQUENCIES // 2
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    return torch.cat([angle.cos(), angle.sin()], 1)


def sincos_2d(side: int, width: int) -> Tensor:
    """Position embeddings of a square, row by row: sin, then cos, of the column; the same of the row. [side^2, D]."""
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    column, row = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([column, row], -1).flatten(0, 1).float()


def class_index(label: int | str, num_classes: int) -> int:
    """The class that is meant: its index, or a text such as "class 207".

    Raises:
        ValueError: If there is no such class.
    """
    match = re.fullmatch(r"(?:class )?(\d+)", str(label))
    if match is None or int(match[1]) >= num_classes:
        raise ValueError(f"{label!r} is no class; give one of 0 .. {num_classes - 1}, or a text such as 'class 207'")
    return int(match[1])


# Of diffusers' LoRA loaders, CogVideoX's is that of any pipeline whose one adapted part is its `transformer`.
class SiTPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):
    """Samples images of ImageNet's classes.

    Args:
        transformer: A `SiTTransformer2DModel`.
        vae: Decoder of the latents.
        scheduler: Takes the steps of rectified flow.
    """

    transformer: Any
    vae: Any
    scheduler: Any
    model_cpu_offload_seq: Any = "transformer->vae"

    def __init__(self, transformer: ModelMixin, vae: AutoencoderKL, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As every pipeline's, and with this file, once for the pipeline and once for its network."""
        self.register_to_config(transformer=("pipeline", type(self.transformer).__name__))
        super().save_pretrained(save_directory, *args, **kwargs)
        for folder in (Path(save_directory), Path(save_directory) / "transformer"):
            shutil.copyfile(__file__, folder / "pipeline.py")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw an image of each class.

        Args:
            class_labels: Indices, or texts such as "class 207".
            num_inference_steps: Steps where no `sigmas` are given: those of a straight line from 1 to 0.
            sigmas: Times of the steps, decreasing from 1, before the scheduler's shift.
            guidance_scale: w of u + w (c - u); 1 is none.
            generator: Of the noise.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Return an `ImagePipelineOutput` instead of a tuple.
        """
        config, device = self.transformer.config, self._execution_device
        labels = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        y = torch.tensor([class_index(label, config.num_classes) for label in labels], device=device)
        null = torch.full_like(y, config.num_classes)
        shape = (len(y), config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        grid = sigmas or [1 - i / num_inference_steps for i in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=list(grid), device=device)

        for timestep in self.progress_bar(self.scheduler.timesteps):
            t = (timestep / self.scheduler.config.num_train_timesteps).expand(len(y))

            def velocity(y: Tensor, t: Tensor = t, x: Tensor = latents) -> Tensor:
                return self.transformer(x.to(self.transformer.dtype), t, y, return_dict=False)[0].float()

            v = velocity(y)
            if guidance_scale != 1:
                u = velocity(null)
                v = u + guidance_scale * (v - u)
            latents = self.scheduler.step(v, timestep, latents, generator=generator, return_dict=False)[0]

        images: Any = latents
        if output_type != "latent":
            decoded = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype))[0]
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
