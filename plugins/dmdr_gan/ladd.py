"""LADD: no distribution matching, but a discriminator on the teacher, which has seen real images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from dmdr.matching import DMD, renoised_at
from dmdr.protocols import Backend, Context, Denoiser, GuidedDenoiser, Needs, OwnLearner, require
from dmdr.types import Direction, Draw, Renoised, Term
from dmdr_gan.discriminator import Discriminator, check_layers, gradient


@dataclass(frozen=True)
class LADD:
    """Latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015), D being heads on the teacher:

        L_D = relu(1 + D(x_t)) + relu(1 - D(real_t)),    L_student = -D(x_t)

    x_t and real_t are answers and real images after noise at times sigmoid(mean + std n), n unit Gaussian. The teacher
    stays frozen, there is no fake score, and the teacher is not guided: the paper's real images are its own guided
    samples, which `dmdr-sample` draws. The paper's heads are also told noise level and text, and are convolutions;
    ours look at each place alone, as the teacher's features know all three.

    Attributes:
        gan_learning_rate: Of the heads.
        gan_layers: Layers of the teacher whose features the heads are given, from 0; all by default, as published. Each
            takes the memory of its features, in float32. A UNet shows its middle block alone.
        noise_mean: Mean of the times before the sigmoid; published is 1.
        noise_std: Standard deviation of the times before the sigmoid; published is 1.
    """

    needs: ClassVar[Needs] = Needs(reward=False, finished=False, real_images=True)
    compares_scores: ClassVar[bool] = False
    gan_learning_rate: float = 1e-4
    gan_layers: list[int] | None = None
    noise_mean: float = 1.0
    noise_std: float = 1.0
    _discriminator: Discriminator = field(
        default_factory=partial(Discriminator, "teacher"), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        require(self, "gan_learning_rate", self.gan_learning_rate > 0, "above 0")
        require(self, "noise_std", self.noise_std >= 0, "at least 0")
        check_layers(self)

    anchor = DMD.anchor

    def learners(self, backend: Backend, device: torch.device) -> Sequence[OwnLearner]:
        return [self._discriminator.learner(backend, device, self.gan_learning_rate, self.gan_layers)]

    def time(self, purpose: str, draw: Draw, ctx: Context) -> Tensor:
        """Of the noise that the discriminator sees through, [B]."""
        numbers = ctx.random.normal(f"{purpose}/t", draw.sample, ()).double()
        return (self.noise_mean + self.noise_std * numbers).sigmoid()

    def renoise(self, draw: Draw, ctx: Context) -> tuple[Renoised, ...]:
        """The answers as the discriminator sees them."""
        return (renoised_at(self.time("gan/fake", draw, ctx), "gan/fake", draw, ctx),)

    def fake_loss(self, draw: Draw, fake: Denoiser, ctx: Context) -> Term:
        """The discriminator's loss, per sample."""
        real = ctx.real(draw)
        t, t_real = (self.time(f"gan/{name}", draw, ctx) for name in ("fake", "real"))
        on_fake = self._discriminator(draw.x0, t, "gan/fake", draw.cond, draw, ctx)
        on_real = self._discriminator(real.x0, t_real, "gan/real", real.cond, draw, ctx)
        loss = (1 + on_fake).relu().mean(1) + (1 - on_real).relu().mean(1)
        return Term(loss, metrics={"logit_fake": on_fake.detach().mean(1), "logit_real": on_real.detach().mean(1)})

    @torch.no_grad()
    def direction(self, draw: Draw, teacher: GuidedDenoiser, fake: Denoiser, ctx: Context) -> Direction:
        """Away from what the discriminator tells from real images, [B, *latent]."""
        t = self.time("gan/student", draw, ctx)
        return Direction(
            gradient(lambda x0: -self._discriminator(x0, t, "gan/student", draw.cond, draw, ctx).mean(1), draw, ctx)
        )
