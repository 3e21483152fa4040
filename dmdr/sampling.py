"""The few-step sampler: one family from the ODE step to DMD2's renoise step, with the log-probability of its steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmdr.errors import ConfigError, TrainingError
from dmdr.paths import NoisePath, Prediction, RectifiedFlow, expand
from dmdr.protocols import Denoiser
from dmdr.types import Condition, Rollout

SdeType = Literal["cps", "ddim", "flow_sde", "dance_sde"]


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Timestep shift s t / (1 + (s - 1) t), t of any shape (SD3, Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_times(t: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_times`, for t of any shape."""
    return t / (shift - (shift - 1) * t)


def time_grid(num_inference_steps: int, shift: float = 1.0) -> Tensor:
    """The student's time grid, [K + 1] float64 from 1 to exactly 0: a straight line, shifted."""
    return shift_times(torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64), shift)


@dataclass(frozen=True)
class FewStepSampler:
    """Steps from t[0] to t[K] = 0 along

        x' = alpha(t') x0_hat + sigma(t') (cos(eta pi/2) eps_hat + sin(eta pi/2) z),    z ~ N(0, 1).

    eta = 0 is the ODE (Euler / DDIM) step, eta = 1 the renoise step of DMD2 (arXiv 2405.14867), in between the
    coefficients-preserving SDE of arXiv 2509.05952. The last step ends at sigma = 0 and is deterministic.

    Attributes:
        path: Noise path of the model.
        t: Grid, [K + 1] float64, decreasing, t[K] = 0.
        eta: Share of fresh noise, in [0, 1].
        sde_type: How the noise enters. "cps" is the family above. "ddim" is DDIM's (Song et al. 2020, arXiv
            2010.02502, eq. 16). "flow_sde" (Flow-GRPO, arXiv 2505.05470) and "dance_sde" (DanceGRPO, arXiv 2505.07818)
            are Euler-Maruyama steps of rectified flow: made for many small steps, noisy with a few large ones.

    Raises:
        ConfigError: If a step of rectified flow is asked for on another path.
    """

    path: NoisePath
    t: Tensor
    eta: float
    sde_type: SdeType = "cps"

    def __post_init__(self) -> None:
        if self.sde_type in ("flow_sde", "dance_sde") and not isinstance(self.path, RectifiedFlow):
            raise ConfigError(
                f"--sde_type {self.sde_type} works only with rectified flow; for this model use cps or ddim"
            )

    @classmethod
    def stock(cls, path: NoisePath, t: Tensor, eta: float) -> "FewStepSampler":
        """A sampler whose steps diffusers' schedulers know: the ODE's at eta 0, renoising at 1, DDIM's between.

        Args:
            path: Noise path of the model.
            t: Grid, [K + 1] float64, decreasing to 0.
            eta: Share of fresh noise, in [0, 1].
        """
        return cls(path, t, eta, "ddim" if 0 < eta < 1 else "cps")

    @property
    def num_inference_steps(self) -> int:
        return len(self.t) - 1

    def moments(self, i: int | Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Mean [B, *latent] and standard deviation [1 or B, 1, ...] of the state after step i, one or [B] of them."""
        return self.transition(prediction, self.t.to(prediction.x_t.device, non_blocking=True)[i + 1])

    def transition(self, prediction: Prediction, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, *latent] and standard deviation [1 or B, 1, ...] of the state at a time t_next, a scalar or [B].

        At 0 the state is x0_hat.
        """
        if self.sde_type in ("flow_sde", "dance_sde"):
            return self._euler_maruyama(prediction, t_next)
        x_t, sigma_next = prediction.x_t, self.path.sigma(t_next)
        alpha = expand(self.path.alpha(t_next), x_t)
        if self.sde_type == "ddim":
            t = prediction.t.double()
            decay = self.path.alpha(t) / self.path.alpha(t_next)
            ratio = sigma_next / self.path.sigma(t)
            std = self.eta * ratio * (self.path.sigma(t) ** 2 - (decay * sigma_next) ** 2).clamp_min(0).sqrt()
            kept = (sigma_next**2 - std**2).sqrt()
            return alpha * prediction.x0 + expand(kept, x_t) * prediction.eps, expand(std, x_t)
        mean = alpha * prediction.x0
        if self.eta < 1 and (t_next > 0).any():
            mean = mean + expand(sigma_next * math.cos(self.eta * math.pi / 2), x_t) * prediction.eps
        return mean, expand(sigma_next * math.sin(self.eta * math.pi / 2), x_t)

    def _euler_maruyama(self, prediction: Prediction, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """dx = (v + s^2 / (2 t) (x + (1 - t) v)) dt + s dw, with s = eta or, in Flow-GRPO, eta sqrt(t / (1 - t))."""
        x, t = prediction.x_t, prediction.t.double()
        v, dt = prediction.eps - prediction.x0, t_next - t
        s2 = torch.full_like(t, self.eta**2)
        if self.sde_type == "flow_sde":
            s2 = s2 * t / (1 - torch.where(t == 1, self.t.to(t.device)[1], t))
        s2 = torch.where(t_next > 0, s2, 0.0)  # the last step is the ODE's
        mean = expand(1 + s2 * dt / (2 * t), x) * x + expand((1 + s2 * (1 - t) / (2 * t)) * dt, x) * v
        return mean, expand((-s2 * dt).sqrt(), x)

    def step(self, i: int, prediction: Prediction, noise: Tensor | None) -> Tensor:
        """State after step i, [B, *latent]; `noise` is unit Gaussian, None for the mean."""
        mean, std = self.moments(i, prediction)
        return mean if noise is None else mean + std * noise

    def log_prob(
        self, i: int | Tensor, prediction: Prediction, x_next: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Gaussian log-probability of step i having led to `x_next`, [B] float64, as the mean over the elements.

        In float64: summed over a large latent, a mean in float32 is off by a fifth of PPO's clip range.

        Args:
            i: The step, one or [B] of them.
            prediction: The student's, at the state before the step.
            x_next: The state after it, [B, *latent].
            mask: The samples to compute it of, [B] bool, as `draw.mask`: the others have 0, without a gradient.

        Raises:
            TrainingError: If the step of a sample is deterministic (eta = 0, or the last one).
        """
        mean, std = self.moments(i, prediction)
        if mask is not None:
            std = torch.where(mask.view(-1, *[1] * (std.ndim - 1)), std, 1.0)
        if (std == 0).any():
            raise TrainingError(
                f"log_prob: a sample is at a step without noise (the last of {self.num_inference_steps}, or any at eta "
                '0); declare Needs(steps="stochastic"), and pass mask=draw.mask'
            )
        per_element = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        log_prob = per_element.flatten(1).double().mean(1)
        return log_prob if mask is None else torch.where(mask, log_prob, 0.0)

    def kl(self, i: int | Tensor, prediction: Prediction, reference: Prediction) -> Tensor:
        """KL divergence of step i by a prediction from that by a reference, [B], as the mean over the elements.

            (mu - mu_ref)^2 / (2 std^2)        as in Flow-GRPO (arXiv 2505.05470)

        which is exact for Gaussians of one deviation. A step without noise has no density: there std = 1 stands in, so
        that it is half the squared distance of the two states after the step.

        Args:
            i: The step, one or [B] of them.
            prediction: The student's, at the state before the step.
            reference: Another network's at the same state.
        """
        mean, std = self.moments(i, prediction)
        other, _ = self.moments(i, reference)
        return ((mean - other) ** 2 / (2 * torch.where(std == 0, 1.0, std) ** 2)).flatten(1).mean(1)

    @torch.no_grad()
    def rollout(
        self,
        student: Denoiser,
        noise: Sequence[Tensor] | Tensor,
        cond: Condition,
        *,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        log_prob: bool = False,
        until: Sequence[int] | None = None,
        finish: bool = False,
    ) -> Rollout:
        """Run the K steps without gradient and keep every state.

        Args:
            student: Any denoiser of this path.
            noise: K unit Gaussian tensors [B, *latent]: the initial state, then the fresh noise of steps 0 .. K - 2.
            cond: Condition of the B samples.
            sample, group: Global indices, [B] int64; 0 .. B - 1 by default.
            log_prob: Keep the log-probability of the K - 1 stochastic steps.
            until: Last step that each sample is wanted for, [B], falling; all K by default. What comes later is NaN.
            finish: Take the later steps, too, in passes of their own: no bit of what is wanted changes by that.
        """
        batch, last = len(cond), self.num_inference_steps - 1
        until = [last] * batch if until is None else until
        states: list[Tensor] = [noise[0]]
        answers: list[Tensor] = []
        log_probs: list[Tensor] = []
        for i in range(last + 1 if finish else until[0] + 1):
            wanted = sum(step >= i for step in until)  # samples: the first ones
            parts = [slice(0, wanted), slice(wanted, batch)] if finish else [slice(0, wanted)]
            parts = [part for part in parts if part.stop > part.start]
            taken = [self._taken(i, student, states[-1], noise, cond, part, log_prob) for part in parts]
            for kept, found in zip((states, answers, log_probs), zip(*taken, strict=True), strict=True):
                kept.append(found[0] if len(found) == 1 else torch.cat(found))
        index = torch.arange(batch, device=states[0].device)
        return Rollout(
            cond=cond,
            t=self.t,
            x_t=filled_up(states, batch, last + 2),
            x0=filled_up(answers, batch, last + 1),
            sample=index if sample is None else sample,
            group=index if group is None else group,
            log_prob=filled_up(log_probs[:last], batch, last) if log_prob and last else None,
            finished=finish or until[-1] == last,
        )

    def _taken(
        self,
        i: int,
        student: Denoiser,
        x_t: Tensor,
        noise: Sequence[Tensor] | Tensor,
        cond: Condition,
        part: slice,
        log_prob: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step i of a part of the samples: the next state and the answer, [n, *latent], and log-probabilities [n]."""
        x, cond = (x_t, cond) if part == slice(0, len(cond)) else (x_t[part], cond[part])
        t = self.t[i].to(x.device, non_blocking=True).expand(len(x))
        prediction, stochastic = student(x, t, cond), i + 1 < self.num_inference_steps
        x_next = self.step(i, prediction, noise[i + 1][part] if stochastic else None)
        if log_prob and stochastic:
            return x_next, prediction.x0, self.log_prob(i, prediction, x_next)
        return x_next, prediction.x0, x_next.new_zeros(len(x), dtype=torch.float64)


def filled_up(parts: Sequence[Tensor], batch: int, steps: int) -> Tensor:
    """Tensors [at most B, ...] of the first steps as one [steps, B, ...], with NaN for what is not there."""
    if len(parts) == steps and len(parts[-1]) == batch:
        return torch.stack(list(parts))
    whole = parts[-1].new_full((steps, batch, *parts[0].shape[1:]), math.nan)  # the noise may be less precise
    for row, part in zip(whole, parts, strict=False):
        row[: len(part)] = part
    return whole
