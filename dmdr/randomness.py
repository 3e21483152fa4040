"""Keyed random numbers: every number of a sample comes from (seed, step, phase, purpose, global sample index).

One process with 2B samples therefore draws what two with B draw, and a resumed run what an uninterrupted one would,
on any device. Nothing here reads or moves a global generator.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

MANY = 2**18  # numbers that several threads draw; for fewer their start would take longer


@dataclass(frozen=True)
class Random:
    """The random numbers of one phase of one step.

    In each method `purpose` says what the numbers are for, and `samples` [B] holds the key of each sample, its index in
    the global batch. Two draws of one kind with the same purpose and key are the same.

    Attributes:
        seed: The run's seed.
        step: Student update of the whole run.
        phase: What goes on, e.g. "rollout/2".
        iteration: How often the rollout has been used before; each use has numbers of its own.
    """

    seed: int
    step: int
    phase: str
    iteration: int = 0

    @property
    def of_rollout(self) -> "Random":
        """Numbers that are the same in every use of the rollout, for what is decided once for all of them."""
        return replace(self, iteration=0)

    def name(self, purpose: str, key: int) -> str:
        """What the numbers of a sample are a function of: seed, step, phase, use of the rollout, purpose and key."""
        phase = f"{self.phase}/again/{self.iteration}" if self.iteration else self.phase
        return f"{self.seed}/{self.step}/{phase}/{purpose}/{key}"

    def _generator(self, purpose: str, key: int) -> np.random.Generator:
        digest = blake2b(self.name(purpose, key).encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def normal(self, purpose: str, samples: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Unit Gaussian, [B, *shape] float32, one independent draw of this purpose per key in `samples` [B]."""
        numbers = torch.empty(len(samples), *shape, pin_memory=samples.is_cuda)

        def draw(key: int, row: np.ndarray[Any, Any]) -> None:
            self._generator(purpose, key).standard_normal(dtype=np.float32, out=row)

        rows = [numbers.numpy()[i, ...] for i in range(len(samples))]  # of a single number, too, an array
        if numbers.numel() < MANY:
            for key, row in zip(samples.tolist(), rows, strict=True):
                draw(key, row)
        else:  # numpy draws without Python's lock
            with ThreadPoolExecutor() as pool:
                list(pool.map(draw, samples.tolist(), rows))
        return numbers.to(samples.device, non_blocking=True)

    def uniform(self, purpose: str, samples: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high), [B] float64, one draw of this purpose per key in `samples` [B]."""
        draws = [self._generator(purpose, key).uniform(low, high) for key in samples.tolist()]
        return torch.tensor(draws, dtype=torch.float64).to(samples.device, non_blocking=True)

    def integers(self, purpose: str, samples: Tensor, high: int) -> Tensor:
        """Uniform integers in [0, high), [B] int64, one of this purpose per key in `samples` [B]."""
        draws = [int(self._generator(purpose, key).integers(high)) for key in samples.tolist()]
        return torch.tensor(draws, dtype=torch.int64).to(samples.device, non_blocking=True)

    def beta(self, purpose: str, samples: Tensor, a: float, b: float) -> Tensor:
        """Beta(a, b), [B] float64 in [0, 1], one draw of this purpose per key in `samples` [B]."""
        draws = [self._generator(purpose, key).beta(a, b) for key in samples.tolist()]
        return torch.tensor(draws, dtype=torch.float64).to(samples.device, non_blocking=True)
