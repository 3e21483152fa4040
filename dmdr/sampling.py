"""The few-step sampler: one family from the ODE step to DMD2's renoise step, with the log-probability of its steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr.paths import NoisePath, Prediction
from dmdr.protocols import Denoiser
from dmdr.types import Condition, Rollout


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Timestep shift of SD3 (Esser et al. 2024, arXiv 2403.03206, eq. 23): s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_times(t: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_times`."""
    return t / (shift - (shift - 1) * t)


def time_grid(num_inference_steps: int, shift: float = 1.0) -> Tensor:
    """The student's grid, [K + 1] float64 from 1 to exactly 0: a straight line, shifted."""
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
    """

    path: NoisePath
    t: Tensor
    eta: float

    @property
    def num_inference_steps(self) -> int:
        return len(self.t) - 1

    def moments(self, i: int, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Mean [B, *latent] and standard deviation (scalar tensor) of the state after step i."""
        t_next = self.t[i + 1].to(prediction.x_t.device)
        alpha, sigma = self.path.alpha(t_next), self.path.sigma(t_next)
        dtype = torch.promote_types(prediction.x_t.dtype, torch.float32)
        mean = alpha.to(dtype) * prediction.x0
        kept = (sigma * math.cos(self.eta * math.pi / 2)).to(dtype)
        if self.eta < 1 and i + 1 < self.num_inference_steps:
            mean = mean + kept * prediction.eps
        return mean, (sigma * math.sin(self.eta * math.pi / 2)).to(dtype)

    def step(self, i: int, prediction: Prediction, noise: Tensor | None) -> Tensor:
        """State after step i, [B, *latent]; `noise` is unit Gaussian and unused where the step is deterministic."""
        mean, std = self.moments(i, prediction)
        return mean if noise is None or std == 0 else mean + std * noise

    def log_prob(self, i: int, prediction: Prediction, x_next: Tensor) -> Tensor:
        """Gaussian log-probability of step i having led to `x_next`, [B], as the mean over the latent's elements.

        Raises:
            ValueError: If the step is deterministic (eta = 0, or the last one).
        """
        mean, std = self.moments(i, prediction)
        if std == 0:
            raise ValueError(f"step {i} of {self.num_inference_steps} at eta {self.eta} is deterministic")
        per_element = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return per_element.flatten(1).mean(1)

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
    ) -> Rollout:
        """Run all K steps without gradient and keep every state.

        Args:
            student: Any denoiser of this path.
            noise: K unit Gaussian tensors [B, *latent]: the initial state, then the fresh noise of steps 0 .. K - 2.
            cond: Condition of the B samples.
            sample, group: Global indices, [B] int64; 0 .. B - 1 by default.
            log_prob: Keep the log-probability of the K - 1 stochastic steps.
        """
        batch, last = len(cond), self.num_inference_steps - 1
        states, answers, log_probs = [noise[0]], [], []
        for i in range(self.num_inference_steps):
            t = self.t[i].to(states[-1].device).expand(batch)
            prediction = student(states[-1], t, cond)
            x_next = self.step(i, prediction, None if i == last else noise[i + 1])
            if log_prob and i < last:
                log_probs.append(self.log_prob(i, prediction, x_next))
            states.append(x_next)
            answers.append(prediction.x0)
        index = torch.arange(batch, device=states[0].device)
        return Rollout(
            cond=cond,
            t=self.t,
            x_t=torch.stack(states),
            x0=torch.stack(answers),
            sample=index if sample is None else sample,
            group=index if group is None else group,
            log_prob=torch.stack(log_probs) if log_probs else None,
        )
