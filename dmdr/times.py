"""Laws of renoise times: at which noise levels student and teacher are compared, and the fake score learns.

`dmdr.matching.renoise_times` draws from the law of the running step, `ctx.renoise`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmdr.randomness import Random

# Renoise times stay clear of both ends: towards t = 0 the direction is a difference of nearly equal numbers
# (DMD2 keeps to 2 % .. 98 % of the schedule for the same reason).
T_MIN, T_MAX = 0.02, 0.98


class TimeLaw(Protocol):
    """A law of renoise times."""

    @property
    def shifted(self) -> bool:
        """Whether the times are shifted as the model's grid is (`backend.shift`)."""

    def shares(self, random: Random, purpose: str, samples: Tensor) -> Tensor:
        """Where in its interval each time lies, [B] float64 in [0, 1]: 0 is the cleanest, 1 the noisiest.

        Args:
            random: The numbers of the running step.
            purpose: Names the random numbers; two calls with the same one draw the same.
            samples: Keys of the samples, [B] int64.
        """


@dataclass(frozen=True)
class Beta:
    """Beta(alpha, beta), as DynaRS (DMDR, arXiv 2511.13649, section 2.5) has it in one step.

    Attributes:
        alpha, beta: At least 1; 1 and 1 is uniform.
        shifted: Whether the times are shifted as the model's grid is.
    """

    alpha: float
    beta: float
    shifted: bool = False

    def shares(self, random: Random, purpose: str, samples: Tensor) -> Tensor:
        return random.beta(purpose, samples, self.alpha, self.beta)


@dataclass(frozen=True)
class Uniform:
    """Uniform from 2 % to 98 % (DMD2, arXiv 2405.14867), with nothing heaped up at the two ends."""

    shifted = False

    def __str__(self) -> str:
        return "uniform"

    def shares(self, random: Random, purpose: str, samples: Tensor) -> Tensor:
        return random.uniform(purpose, samples, T_MIN, T_MAX)


@dataclass(frozen=True)
class LogitNormal:
    """The sigmoid of a Gaussian (SD3, Esser et al. 2024, arXiv 2403.03206, eq. 19).

    Attributes:
        mean: Above 0 towards noise, below 0 towards data.
        std: Above 0; the smaller, the more times lie around the sigmoid of the mean.
    """

    mean: float
    std: float
    shifted = False

    def __str__(self) -> str:
        return f"logit-normal ({self.mean:g}, {self.std:g})"

    def shares(self, random: Random, purpose: str, samples: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * random.normal(purpose, samples, ()).double())
