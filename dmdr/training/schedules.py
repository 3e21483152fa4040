"""What changes with the step: learning rates, loss weights, DynaDG and DynaRS (DMDR, arXiv 2511.13649, section 2.5)."""

import math
from dataclasses import dataclass
from typing import Literal

from dmdr.times import Beta, TimeLaw


def cosine_decay(step: int, steps: int) -> float:
    """1 at step 0, 0 from `steps` on: (1 + cos(pi step / steps)) / 2. 0 everywhere if `steps` is 0."""
    return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))) if steps else 0.0


@dataclass(frozen=True)
class DynaDG:
    """Dynamic distribution guidance: the fake score's adapter in the teacher, annealed to nothing.

    Early on the student's samples are foreign to the teacher; mixing in the adapter that has learnt them moves the
    teacher's distribution towards the student's, so that the two overlap.

    Attributes:
        start: Share of the fake score's adapter at step 0, in [0, 1]; 1 would make the teacher the fake score.
        steps: Student updates until it has vanished; 0 switches DynaDG off.
    """

    start: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start * cosine_decay(step, self.steps)


@dataclass(frozen=True)
class DynaRS:
    """Dynamic renoise sampling: renoise times t ~ Beta(a, b), high at first, annealed to uniform.

    Attributes:
        alpha, beta: Parameters at step 0, at least 1; published: (4, 1.5).
        steps: Student updates until the times are uniform; 0 switches DynaRS off.
        shifted: Whether the times are shifted as the model's grid is, after they are drawn.
    """

    alpha: float
    beta: float
    steps: int
    shifted: bool = False

    def __call__(self, step: int) -> Beta:
        c = cosine_decay(step, self.steps)
        return Beta(1 + (self.alpha - 1) * c, 1 + (self.beta - 1) * c, self.shifted)

    def __str__(self) -> str:
        anneals = self.steps and (self.alpha, self.beta) != (1, 1)
        parts = [f"DynaRS for {self.steps}"] if anneals else []
        return ", ".join(parts + ["shifted renoise times"] * self.shifted)


@dataclass(frozen=True)
class Steady:
    """A law of renoise times that stays the same.

    Attributes:
        law: Which.
    """

    law: TimeLaw

    def __call__(self, step: int) -> TimeLaw:
        return self.law

    def __str__(self) -> str:
        return f"{self.law} renoise times"


@dataclass(frozen=True)
class Schedule:
    """A number that changes with the step: a linear warm-up, then constant, or a linear or half-cosine decay to 0.

    Attributes:
        value: After the warm-up.
        shape: "constant", "linear" or "cosine".
        steps: Of the stage, at whose end a decay arrives at 0.
        warmup_steps: Steps of the warm-up; step s of it has the share (s + 1) / (warmup_steps + 1).
    """

    value: float
    shape: Literal["constant", "linear", "cosine"] = "constant"
    steps: int = 0
    warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        return self.value * self._share(step)

    def __str__(self) -> str:
        warmup = f", warm-up of {self.warmup_steps}" if self.warmup_steps else ""
        decay = f", {self.shape} to 0" if self.shape != "constant" else ""
        return f"{self.value:g}{warmup}{decay}"

    def _share(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return 1.0
        done, whole = step - self.warmup_steps, max(self.steps - self.warmup_steps, 1)
        return cosine_decay(done, whole) if self.shape == "cosine" else max(1 - done / whole, 0.0)
