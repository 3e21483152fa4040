"""The VAE of a pipeline: images to the states that a network denoises, and back."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny
from torch import Tensor

from dmdr.backends.component import read_component
from dmdr.backends.images import recomputed
from dmdr.backends.loading import Source
from dmdr.errors import ConfigError

ALIKE = 0.8  # correlation of images from which on a decoder is taken for one of the same latents


class Latents:
    """Those of an `AutoencoderKL`, brought to unit variance by the numbers of its configuration.

    A family with another VAE has a subclass. Its module is not kept here: it is loaded later, and moves.

    Attributes:
        vae_class: Class of the VAE.
        blocks: What its configuration calls the widths of its blocks, each of which halves the size but one.
        reads: What the pipeline reads of its scaling_factor, shift_factor, latents_mean and latents_std.
        channels: Of a state.
        scale: Pixels along a side for one of a state.
    """

    vae_class: ClassVar[Any] = AutoencoderKL
    blocks: ClassVar[str] = "block_out_channels"
    reads: ClassVar[Sequence[str]] = ("scaling_factor",)
    channels: int
    scale: int

    def __init__(self, source: Source, subfolder: str, reader: str) -> None:
        """Read the configuration; loads no weights.

        Args:
            source, subfolder: Where the VAE is.
            reader: What the pipeline is called, for messages.

        Raises:
            ConfigError: If it is of another class, or its pipeline scales latents otherwise than we do.
        """
        self.config = read_component(self.vae_class, source, subfolder)
        self.config.require("_class_name", self.vae_class.__name__)
        self._known: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.measure(reader)

    def measure(self, reader: str) -> None:
        """Set `channels` and `scale` by the configuration, and check the rest of it.

        Raises:
            ConfigError: If a value is not what it must be.
        """
        config = self.config
        self.channels = config.whole("latent_channels")
        self.scale = 2 ** (len(config.wholes(self.blocks)) - 1)
        for name in ("shift_factor", "latents_mean", "latents_std"):
            if name not in self.reads and config.get(name):
                raise config.refused(name, f"null, because a {reader} does not read it")
        config.number("scaling_factor", positive=True)
        if "shift_factor" in self.reads:
            config.number("shift_factor")
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            config.numbers("latents_mean", self.channels)
            config.numbers("latents_std", self.channels, positive=True)

    def adjust(self, vae: Any) -> None:
        """What has to be changed in a VAE that was just loaded."""

    def checkpoint(self, vae: Any) -> None:
        """Let the decoder recompute its blocks for a gradient, which takes less memory."""
        vae.enable_gradient_checkpointing(recomputed)

    def decode(self, vae: Any, states: Tensor) -> Tensor:
        """What the VAE makes of states [B, *state]: [B, 3, H, W], in [-1, 1] but for what it overshoots."""
        scale, shift = self._statistics(states)
        decoded: Tensor = vae.decode((states * scale + shift).to(vae.dtype), return_dict=False)[0]
        return decoded

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """The states [B, *state] float32 of images [B, 3, H, W] in [-1, 1], in the VAE's dtype."""
        latents = self.encoded(vae, pixels)
        scale, shift = self._statistics(latents)
        states: Tensor = (latents - shift) / scale
        return states

    def encoded(self, vae: Any, pixels: Tensor) -> Tensor:
        """The VAE's own latents [B, C, h, w] float32 of images, the most likely ones."""
        latents: Tensor = vae.encode(pixels).latent_dist.mode().float()
        return latents

    def _statistics(self, latents: Tensor) -> tuple[Any, Any]:
        """Scale and shift with VAE latents = states * scale + shift: numbers, or [1, C, 1, 1] each."""
        config = self.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return 1 / config["scaling_factor"], config.get("shift_factor") or 0.0
        place = latents.device, latents.dtype
        if place not in self._known:  # a copy to the device waits for it
            scale, shift = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (std, mean))
            self._known[place] = scale / config.get("scaling_factor", 1.0), shift
        return self._known[place]


class ShiftedLatents(Latents):
    """Those whose pipeline also reads the shift_factor."""

    reads = ("scaling_factor", "shift_factor")


class TinyLatents(ShiftedLatents):
    """Those that an `AutoencoderTiny` decodes."""

    vae_class = AutoencoderTiny
    blocks = "decoder_block_out_channels"


class QwenImageLatents(Latents):
    """Those of an `AutoencoderKLQwenImage`, which is Wan's VAE of videos: of one frame."""

    vae_class = AutoencoderKLQwenImage

    def measure(self, reader: str) -> None:
        config = self.config
        self.channels = config.whole("z_dim")
        if not isinstance(config.get("temperal_downsample"), list | tuple) or not config["temperal_downsample"]:
            raise config.refused("temperal_downsample", "a list with an entry for each block that halves the size")
        self.scale = 2 ** len(config["temperal_downsample"])
        config.numbers("latents_mean", self.channels)
        config.numbers("latents_std", self.channels, positive=True)

    def adjust(self, vae: Any) -> None:
        """A frame is decoded without caches of those before it: there are none, and with them none is recomputed."""
        decode = vae.decoder.forward
        vae.decoder.forward = lambda frame, **caches: decode(frame)

    def checkpoint(self, vae: Any) -> None:
        for block in (vae.decoder.mid_block, *vae.decoder.up_blocks):  # of which diffusers knows no checkpoints
            block.forward = partial(recomputed, block.forward)

    def decode(self, vae: Any, states: Tensor) -> Tensor:
        scale, shift = self._statistics(states)
        frame = (states * scale + shift).to(vae.dtype).unsqueeze(2)
        # As `vae.decode`, but for its clamp, which has no gradient.
        tile = vae.tile_sample_min_height // self.scale, vae.tile_sample_min_width // self.scale
        if vae.use_tiling and (frame.shape[3] > tile[0] or frame.shape[4] > tile[1]):
            decoded = vae.tiled_decode(frame, return_dict=False)[0]
        else:
            decoded = vae.decoder(vae.post_quant_conv(frame))
        only: Tensor = decoded[:, :, 0]
        return only

    def encoded(self, vae: Any, pixels: Tensor) -> Tensor:
        return super().encoded(vae, pixels.unsqueeze(2))[:, :, 0]


@torch.no_grad()
def refuse_other_latents(vae: tuple[Latents, Any], decoder: tuple[Latents, Any], name: str) -> None:
    """Refuse a decoder that makes other images of a VAE's latents than the VAE does.

    SD3 and FLUX.1 have latents of one shape, which mean different images; no configuration says so. Where the VAE does
    not give a picture back, as with random weights, nothing is known.

    Args:
        vae, decoder: Each with its module, on one device.
        name: What the user calls the decoder.

    Raises:
        ConfigError: If their images of a coloured picture correlate by less than 0.8.
    """
    latents, module = vae
    picture = _picture(16 * latents.scale)[None] * 2 - 1
    states = latents.encode(module, picture.to(module.device, module.dtype))
    own, other = latents.decode(module, states), decoder[0].decode(decoder[1], states)
    if _correlation(own, picture) > ALIKE > (found := _correlation(other, own)):
        raise ConfigError(
            f"--reward_vae {name} decodes other latents than this model's: of one picture its image correlates by "
            f"{found:.2f} with that of the model's own VAE; give the decoder that was made for this model"
        )


def _picture(size: int) -> Tensor:
    """Coloured waves, [3, size, size] in [0, 1]."""
    x = torch.linspace(0, 1, size)
    waves = [torch.sin(6 * (a * x[:, None] + b * x[None]) + c) for a, b, c in ((1, 0.3, 0), (-0.4, 1, 1), (0.8, -1, 2))]
    return torch.stack(waves) / 2 + 0.5


def _correlation(a: Tensor, b: Tensor) -> float:
    flat = torch.stack([a.cpu().double().flatten(), b.cpu().double().flatten()])
    return torch.corrcoef(flat)[0, 1].item()
