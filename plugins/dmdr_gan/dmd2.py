"""DMD2: distribution matching, and a discriminator on the fake score, which has seen real images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dmdr.matching import DMD
from dmdr.protocols import Backend, Context, Denoiser, GuidedDenoiser, Needs, OwnLearner, require
from dmdr.sampling import shift_times
from dmdr.types import Direction, Draw, Term
from dmdr_gan.discriminator import Discriminator, check_layers, gradient

NEARBY = 0.1  # standard deviation of what R1 adds to real latents


@dataclass(frozen=True)
class DMD2(DMD):
    """DMD and a GAN (Yin et al. 2024, arXiv 2405.14867, section 4.3), with D heads on features of the fake score:

        L_fake = L_denoising + gan_cls_weight (softplus(D(x_t)) + softplus(-D(real_t)))
        L_student = L_DMD + gan_weight softplus(-D(x_t))

    x_t and real_t are answers and real images after noise, at times of their own that are uniform before the timestep
    shift. The discriminator's loss trains the heads and the fake score. The student's loss reaches x0 alone; it is the
    part `gan` of the direction. DMD2 takes two more passes of the fake score in each of its updates, whose graphs are
    alive together with that of the denoising loss, and one in the student's.

    The published head makes one logit of SDXL's middle block; ours makes one for each place of it, and the mean is over
    their losses, so that all networks and sizes will do. The paper's other part, several updates of the fake score for
    each of the student, is --fake_updates.

    Attributes:
        floor: Lower bound of the normaliser, in latent units.
        gan_weight: Of the student's loss; published are 5e-3 for SDXL and 3e-3 for ImageNet.
        gan_cls_weight: Of the discriminator's loss beside the denoising loss; published is 1e-2.
        gan_learning_rate: Of the heads.
        gan_layers: Layers of the network whose features the heads are given, from 0; the middle one by default. A UNet
            shows its middle block alone.
        gan_r1_weight: Of approximate R1 (Lin et al. 2025, arXiv 2501.08316), the squared change of the logits when real
            latents get a little noise, beside the discriminator's loss; 100 is usual. 0 leaves out its pass.
    """

    needs: ClassVar[Needs] = Needs(reward=False, finished=False, real_images=True)
    gan_weight: float = 5e-3
    gan_cls_weight: float = 1e-2
    gan_learning_rate: float = 1e-4
    gan_layers: list[int] | None = None
    gan_r1_weight: float = 0.0
    _discriminator: Discriminator = field(
        default_factory=partial(Discriminator, "fake_score"), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gan_weight", "gan_cls_weight", "gan_learning_rate"):
            require(self, name, getattr(self, name) > 0, "above 0")
        require(self, "gan_r1_weight", self.gan_r1_weight >= 0, "at least 0")
        check_layers(self)

    def learners(self, backend: Backend, device: torch.device) -> Sequence[OwnLearner]:
        middle = [len(getattr(backend, "feature_widths", ())) // 2]
        layers = middle if self.gan_layers is None else self.gan_layers
        return [self._discriminator.learner(backend, device, self.gan_learning_rate, layers)]

    def time(self, purpose: str, draw: Draw, ctx: Context) -> Tensor:
        """Of the noise that the discriminator sees through, [B]."""
        return shift_times(ctx.random.uniform(f"{purpose}/t", draw.sample), ctx.backend.shift)

    def fake_loss(self, draw: Draw, fake: Denoiser, ctx: Context) -> Term:
        """DMD's denoising loss and the discriminator's, per sample."""
        denoising, real = super().fake_loss(draw, fake, ctx).loss, ctx.real(draw)
        t, t_real = (self.time(f"gan/{name}", draw, ctx) for name in ("fake", "real"))
        on_fake = self._discriminator(draw.x0, t, "gan/fake", draw.cond, draw, ctx)
        on_real = self._discriminator(real.x0, t_real, "gan/real", real.cond, draw, ctx)
        loss = softplus(on_fake).mean(1) + softplus(-on_real).mean(1)
        metrics = {"gan": loss.detach(), "logit_fake": on_fake.detach().mean(1), "logit_real": on_real.detach().mean(1)}
        if self.gan_r1_weight:
            nearby = real.x0 + NEARBY * ctx.random.normal("gan/r1", draw.sample, tuple(real.x0.shape[1:]))
            r1 = (on_real - self._discriminator(nearby, t_real, "gan/real", real.cond, draw, ctx)).square().mean(1)
            loss, metrics = loss + self.gan_r1_weight * r1, metrics | {"r1": r1.detach()}
        return Term(denoising + self.gan_cls_weight * loss, metrics=metrics)

    @torch.no_grad()
    def direction(self, draw: Draw, teacher: GuidedDenoiser, fake: Denoiser, ctx: Context) -> Direction:
        """DMD's direction, and away from what the discriminator tells from real images, [B, *latent]."""
        matched, t = super().direction(draw, teacher, fake, ctx), self.time("gan/student", draw, ctx)

        def loss(x0: Tensor) -> Tensor:
            return softplus(-self._discriminator(x0, t, "gan/student", draw.cond, draw, ctx)).mean(1)

        gan = self.gan_weight * gradient(loss, draw, ctx)
        return Direction(matched.total + gan, {**matched.parts, "gan": gan})
