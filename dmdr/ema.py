"""Exponential moving average of the student: what is sampled, evaluated and exported where it is on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average <- decay average + (1 - decay) parameter, once per optimizer step; each of the parameter's own shape.

    Every process holds the whole average, and a checkpoint all of it.

    Args:
        parameters: Followed from their present values on.
        decay: In [0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, seen: int | None = None) -> None:
        """Move the average towards the parameters as they are now.

        Args:
            seen: Updates so far. The decay is then (1 + seen) / (10 + seen) at most, as in diffusers' `EMAModel`, so
                that the values at the start do not weigh on a short run's average. None for no such warm-up.
        """
        decay = self.decay if seen is None else min(self.decay, (1 + seen) / (10 + seen))
        followed: list[Tensor] = [self.parameters[name] for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), followed, 1 - decay)  # as torch's own averages do

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap parameters and average."""
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name] = kept

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the student is its average; afterwards it is itself again."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def settle(self) -> None:
        """Make the student its average, for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])
