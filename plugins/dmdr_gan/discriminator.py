"""A discriminator: small heads on what a denoising network computes inside."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dmdr.errors import ConfigError
from dmdr.matching import renoised_at
from dmdr.protocols import Backend, Context, FeatureRole, GivesFeatures, OwnLearner, require
from dmdr.types import Condition, Draw

WIDTH = 256  # of a head's hidden layer


class Discriminator:
    """Heads on layers of the teacher or of the fake score; the rest of the discriminator is that network itself.

    Attributes:
        role: Whose features the heads are given.
        layers: Of these features; none before `learner` was called.
    """

    def __init__(self, role: FeatureRole) -> None:
        self.role: FeatureRole = role
        self.layers: Sequence[int] = ()
        self._heads = nn.ModuleList()

    def learner(self, backend: Backend, device: torch.device, rate: float, layers: Sequence[int] | None) -> OwnLearner:
        """Build the heads.

        Args:
            backend: Is prepared.
            rate: Learning rate.
            layers: Those that the user names; None for all.

        Raises:
            ConfigError: If the backend gives no features, or has no such layer.
        """
        if not isinstance(backend, GivesFeatures):
            raise ConfigError(f"--matching: a {type(backend).__name__} gives no features, which a discriminator needs")
        widths = backend.feature_widths
        self.layers = range(len(widths)) if layers is None else sorted(set(layers))
        if self.layers[-1] >= len(widths):
            raise ConfigError(f"--gan_layers {self.layers[-1]}: the layers of this network are 0 to {len(widths) - 1}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._heads = nn.ModuleList([_head(widths[layer]) for layer in self.layers]).to(device)
        return OwnLearner("discriminator", dict(self._heads.named_parameters()), rate)

    def __call__(self, x0: Tensor, t: Tensor, purpose: str, cond: Condition, draw: Draw, ctx: Context) -> Tensor:
        """Logits [B, M] of all places and layers, above 0 where it takes something for real.

        Args:
            x0: Clean latents [B, *latent], which get noise that is keyed by `purpose` and the draw's samples.
            t: Times of that noise, [B].
            cond: What the latents show.
        """
        backend = ctx.backend
        assert isinstance(backend, GivesFeatures)
        x_t = renoised_at(t, purpose, replace(draw, x0=x0), ctx).x_t
        features = backend.features(self.role, x_t, t, cond, self.layers)
        return torch.cat([own(each)[..., 0] for own, each in zip(self._heads, features, strict=True)], 1)


def _head(channels: int) -> nn.Module:
    """[B, N, C] -> [B, N, 1]. The channels of deep layers are of very unequal size, hence the norm."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))


def gradient(loss: Callable[[Tensor], Tensor], draw: Draw, ctx: Context) -> Tensor:
    """The gradient of a loss at the student's answers as a direction, [B, *latent] float32; it reaches nothing else.

    A direction is a gradient times the number of elements: the trainer divides by it.

    Args:
        loss: Of clean latents [B, *latent], one for each sample, [B].
    """
    with torch.enable_grad():
        x0 = draw.x0.detach().requires_grad_()
        return (x0[0].numel() * ctx.grad(loss(x0).sum(), x0)).to(draw.x0.dtype)


def check_layers(options: Any) -> None:
    """Refuse a `gan_layers` that names none, or that no network can have.

    Raises:
        ConfigError: Names the flag.
    """
    layers = options.gan_layers
    require(options, "gan_layers", layers is None or (layers and min(layers) >= 0), "numbers of layers, from 0")
