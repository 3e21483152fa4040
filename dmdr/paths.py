"""Noise paths x_t = alpha(t) x0 + sigma(t) eps, and network outputs in every parameterisation."""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["x0", "eps", "velocity", "v"]


def expand(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] with the rank of `like`, in float32 or better."""
    values = values.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


class NoisePath(Protocol):
    """x_t = alpha(t) x0 + sigma(t) eps, for times t in [0, 1]: 1 is noise, 0 is data."""

    def alpha(self, t: Tensor) -> Tensor:
        """Share of the clean sample at times of any shape, of the same shape, in [0, 1]."""

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at times of any shape, of the same shape, in [0, 1]."""

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is conditioned on at times of any shape, of the same shape, in its own unit (0 to 1000)."""


def add_noise(path: NoisePath, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t on a path, of samples x0 with noise eps, each [B, *latent], at times t [B]."""
    return expand(path.alpha(t), x0) * x0 + expand(path.sigma(t), x0) * eps


def add_noise_from(path: NoisePath, x: Tensor, s: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = a x_s + sigma_ts eps on a path, of samples that have the noise of times s already.

    With a = alpha_t / alpha_s and sigma_ts^2 = sigma_t^2 - a^2 sigma_s^2, x_t is what it would be had clean data been
    noised.

    Args:
        x: States at times s [B], [B, *latent].
        eps: Unit noise, [B, *latent].
        t: Later times, [B].

    Returns:
        x_t [B, *latent] and sigma_ts^2 [B], which is at least 1e-12.
    """
    a = path.alpha(t) / path.alpha(s)
    variance = (path.sigma(t) ** 2 - (a * path.sigma(s)) ** 2).clamp_min(1e-12)
    return expand(a, x) * x + expand(variance.sqrt(), x) * eps, variance


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path of flow matching: alpha = 1 - t, sigma = t (SD3, FLUX, SiT)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def timestep(self, t: Tensor) -> Tensor:
        return 1000 * t


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """The DDPM path: alpha^2 + sigma^2 = 1 on a table of 1000 cumulative alphas (SDXL, SD1.5).

    t snaps to index clamp(round(1000 t), 0, 999); exactly t = 0 is clean data, so that a sampler ends there.

    Attributes:
        alphas_cumprod: [1000] float64, decreasing.
    """

    alphas_cumprod: Tensor

    def timestep(self, t: Tensor) -> Tensor:
        return (1000 * t).round().clamp(0, len(self.alphas_cumprod) - 1).long()

    def _alpha_bar(self, t: Tensor) -> Tensor:
        table = self.alphas_cumprod.to(t.device, torch.float64, non_blocking=True)
        # `take`, because indexing with a single time would wait for its value.
        return torch.where(t == 0, torch.ones((), dtype=table.dtype, device=t.device), table.take(self.timestep(t)))

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha_bar(t)).sqrt()


@dataclass(frozen=True)
class Prediction:
    """A network output, and what it means in every other parameterisation, in float32 or better.

    Every kind is linear, value = a x0 + b eps: x0 (1, 0), eps (0, 1), velocity (-1, 1) of rectified flow, and
    v (-sigma, alpha) of progressive distillation (Salimans & Ho 2022, arXiv 2202.00512, appendix D). Together
    with x_t = alpha x0 + sigma eps it is solved for x0 and eps.

    Attributes:
        value: The raw output, [B, *latent].
        kind: What the output means.
        x_t, t: The network's input [B, *latent] and time [B].
        path: Noise path of x_t.
    """

    value: Tensor
    kind: Kind
    x_t: Tensor
    t: Tensor
    path: NoisePath

    def _coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = expand(self.path.alpha(self.t), self.x_t), expand(self.path.sigma(self.t), self.x_t)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        a, b = {"x0": (one, zero), "eps": (zero, one), "velocity": (-one, one), "v": (-sigma, alpha)}[self.kind]
        return alpha, sigma, a, b

    @property
    def x0(self) -> Tensor:
        """Clean sample, [B, *latent]."""
        if self.kind == "x0":
            return self.value.to(torch.promote_types(self.x_t.dtype, torch.float32))
        alpha, sigma, a, b = self._coefficients()
        return (b * self.x_t - sigma * self.value) / (alpha * b - sigma * a)

    @property
    def eps(self) -> Tensor:
        """Unit noise, [B, *latent]; sigma(t) must not be 0 for kind x0."""
        alpha, sigma, a, b = self._coefficients()
        return (alpha * self.value - a * self.x_t) / (alpha * b - sigma * a)

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The regression target of `value`, [B, *latent], if x_t was made of x0 and eps, each [B, *latent]."""
        _, _, a, b = self._coefficients()
        return a * x0 + b * eps


def guided(c: Prediction, other: Prediction, w: Tensor, scale: float = 0.0) -> Prediction:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): u + w (c - u), a line through two answers.

    Args:
        c: The conditional answer, that of guidance 1.
        other: The answer of another guidance at the same x_t and t; the unconditional one, u, by default.
        w: Guidance of each sample, [B].
        scale: That of `other`.
    """
    share = (expand(w, c.value) - scale) / (1 - scale)
    return replace(c, value=other.value + share * (c.value - other.value))
