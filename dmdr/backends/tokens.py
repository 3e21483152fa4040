"""Flow-matching families whose network is given latents as a sequence of tokens."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dmdr.backends.flow import FlowBackend
from dmdr.backends.pipeline import Network
from dmdr.backends.texts import cut, in_groups


class TokenBackend(FlowBackend):
    """A pipeline that packs squares of latent pixels into tokens, row by row (FLUX, Qwen-Image).

    Attributes:
        patch_size: Side of a square in latent pixels.
    """

    patch_size: ClassVar[int] = 2  # of the pipeline; the network's configuration does not know of it

    @property
    def packing(self) -> int:
        return self.patch_size**2

    def pack(self, states: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H W / patch_size^2, C patch_size^2]; the place in the square counts fastest."""
        return pixel_unshuffle(states, self.patch_size).flatten(2).mT

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Back to [B, C, H, W], of so many latent pixels."""
        squares = tokens.mT.unflatten(2, (height // self.patch_size, width // self.patch_size))
        return pixel_shuffle(squares, self.patch_size)

    def draw_noise(self, step: int, count: int) -> Tensor:
        """The scheduler draws in packed layout."""
        if step == 0:
            return super().draw_noise(step, count)
        channels, height, width = self.latent_shape
        shape = (count, height * width // self.packing, channels * self.packing)
        return self.unpack(self._randn(shape, torch.float32), height, width)


class MaskedTextBackend(TokenBackend):
    """One whose texts have unequal lengths, `texts.stacked`, and whose network is given a mask (Qwen-Image, Krea 2)."""

    padded = ("sequence",)
    text_unit = 1

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return in_groups(partial(self._ask, network), self.together(cond), x_t, t, cond)

    def _ask(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        height, width = x_t.shape[2:]
        return self.unpack(self.answer(network, x_t, t, *cut(cond)), height, width)

    def answer(self, network: Network, x_t: Tensor, t: Tensor, sequence: Tensor, mask: Tensor | None) -> Tensor:
        """Raw output in packed layout, [B, tokens, C].

        Args:
            network, x_t, t: As of `call`.
            sequence: Texts [B, L, ...].
            mask: Which of their rows are no padding, [B, L] bool; None if all.
        """
        raise NotImplementedError
