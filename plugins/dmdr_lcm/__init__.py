"""Latent consistency distillation: a baseline without distribution matching or reward, on real images.

Luo et al. 2023 (LCM, arXiv 2310.04378), after consistency models (Song et al. 2023, arXiv 2303.01469).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from dmdr.errors import ConfigError
from dmdr.matching import teach
from dmdr.paths import Prediction, add_noise, expand
from dmdr.protocols import Context, Needs, grid_of_teacher, require
from dmdr.types import Draw, Term


@dataclass
class LCM:
    """The student's answers at two neighbouring points of the teacher's guided ODE agree (LCM, eq. 18):

        L = d(f(x_t, t), sg f(x_s, s)),   x_t = alpha_t x0 + sigma_t eps of a real x0,   f(x_0, 0) = x_0

    f is the student's x0. At t = 0 it is x_t whatever the network says, which is the boundary condition of consistency
    models (eq. 3 of 2303.01469). x_s is one DDIM step of the guided teacher from x_t; a neighbour is the next time of a
    grid of so many steps, LCM's skipping step. The target is the student itself without gradient, as in LCM's LoRA
    training in diffusers, and not an average of it.

    A run with `--dmd_weight 0 --stage1_steps 0` is plain LCM, and one without these adds it to distribution matching.
    The student is sampled at eta 1, which is LCM's multistep sampling.

    Attributes:
        num_ddim_timesteps: Steps of the grid of the teacher's times; the answers that are compared are one step apart.
        loss_type: How two answers are compared, "huber" by sqrt(e^2 + c^2) - c, "l2" by e^2, with e their difference;
            the mean over the elements.
        huber_c: The c of huber.
    """

    num_ddim_timesteps: int = 50
    loss_type: Literal["huber", "l2"] = "huber"
    huber_c: float = 0.001

    def __post_init__(self) -> None:
        require(self, "num_ddim_timesteps", 2 <= self.num_ddim_timesteps <= 1000, "from 2 to 1000")
        require(self, "huber_c", self.huber_c > 0, "above 0")
        if self.loss_type == "l2" and self.huber_c != type(self).huber_c:
            raise ConfigError("lcm: huber_c is not read with loss_type l2; leave it out")

    @property
    def needs(self) -> Needs:
        return Needs(reward=False, real_images=True, guided=True, finished=False)

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        backend, real = ctx.backend, ctx.real(draw)
        grid = grid_of_teacher(backend, self.num_ddim_timesteps).to(real.x0.device, non_blocking=True)
        i = ctx.random.integers("lcm/index", draw.sample, self.num_ddim_timesteps)
        t, s = grid[i], grid[i + 1]
        eps = ctx.random.normal("lcm/eps", draw.sample, tuple(real.x0.shape[1:])).to(real.x0.dtype)
        x_t = add_noise(backend.path, real.x0, eps, t)
        with torch.no_grad():
            at = replace(draw, x_t=x_t, t=t, cond=real.cond)
            c, ca = teach(backend.teacher, at, at, ctx)
            guided = Prediction(c - ca, "x0", x_t, t, backend.path)
            x_s = add_noise(backend.path, guided.x0, guided.eps, s)
            target = torch.where(expand(s, x_s) > 0, backend.student(x_s, s, real.cond).x0, x_s)
        error = backend.student(x_t, t, real.cond).x0 - target
        each = error**2 if self.loss_type == "l2" else (error**2 + self.huber_c**2).sqrt() - self.huber_c
        return Term(each.flatten(1).mean(1))
