"""Latents and the decoders that they are for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dmdr.backends.latents import Latents, refuse_other_latents
from dmdr.errors import ConfigError


class Shuffled(Latents):
    """Pixels as channels, in an order of its own: a VAE that loses nothing."""

    channels, scale = 12, 2

    def __init__(self, order: Tensor, strength: float = 1.0) -> None:
        self.order, self.strength = order, strength

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        return pixel_unshuffle(pixels, 2)[:, self.order]

    def decode(self, vae: Any, states: Tensor) -> Tensor:
        return self.strength * pixel_shuffle(states[:, self.order.argsort()], 2)


def test_a_decoder_of_other_latents_of_the_same_shape_is_refused() -> None:
    module = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    own, other = torch.randperm(12, generator=torch.manual_seed(0)), torch.randperm(12, generator=torch.manual_seed(1))
    same = Shuffled(own, strength=0.9)  # not quite the same images
    refuse_other_latents((Shuffled(own), module), (same, module), "tiny")
    with pytest.raises(ConfigError, match=r"--reward_vae tiny decodes other latents .* correlates by -?0\.\d\d with"):
        refuse_other_latents((Shuffled(own), module), (Shuffled(other), module), "tiny")
    # A VAE that gives no picture back says nothing of another.
    blurred = Shuffled(own)
    blurred.decode = lambda vae, states: torch.rand(len(states), 3, 32, 32)  # type: ignore[method-assign]
    refuse_other_latents((blurred, module), (Shuffled(other), module), "tiny")
