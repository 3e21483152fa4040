"""A model family whose latents are pictures of any size, with the exact score of smooth Gaussian data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dmdr.backends.images import to_unit_range
from dmdr.backends.toy import PROMPTS, ToyBackend, ToyOptions

WIDTH = 8


class Residual(nn.Module):
    """What a trained role adds to the teacher's velocity; small at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.label = nn.Embedding(len(PROMPTS), WIDTH)
        self.first, self.last = nn.Conv2d(channels + 1, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, channels, 3, padding=1)
        nn.init.normal_(self.last.weight, std=0.01)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        time = t.to(x_t.dtype).view(-1, 1, 1, 1).expand(-1, 1, *x_t.shape[2:])
        hidden = self.first(torch.cat([x_t, time], 1)) + self.label(label)[:, :, None, None]
        return self.last(nn.functional.silu(hidden))


class Pictures(ToyBackend):
    """The toy with latents [C, H, W]: each prompt's data are a smooth picture with independent noise on it."""

    shape: tuple[int, ...] = (4, 8, 8)

    def __init__(self, folder: str, options: ToyOptions) -> None:
        super().__init__(folder, options)
        self.latent_shape = self.shape

    def prepare(self, accelerator: Any, *, roles: Sequence[Any]) -> None:
        super().prepare(accelerator, roles=roles)
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            coarse = torch.randn(len(PROMPTS), self.shape[0], 4, 4)
            self.residuals = {role: Residual(self.shape[0]) for role in roles}  # type: ignore[misc]
        self.centres = interpolate(coarse, self.shape[1:], mode="bilinear")
        if "reference" in roles:
            self.residuals["reference"].requires_grad_(False)
            self.snapshot()

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        return to_unit_range(nn.functional.adaptive_avg_pool2d(latents[:, :3], 8) / 2)
