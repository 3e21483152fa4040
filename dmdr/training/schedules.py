"""What changes with the step: DynaDG and DynaRS (DMDR, arXiv 2511.13649, section 2.5)."""

import math
from dataclasses import dataclass


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
    """

    alpha: float
    beta: float
    steps: int

    def __call__(self, step: int) -> tuple[float, float]:
        c = cosine_decay(step, self.steps)
        return 1 + (self.alpha - 1) * c, 1 + (self.beta - 1) * c


def learning_rate_factor(name: str, step: int, steps: int, warmup_steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then constant, linear or half-cosine decay to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if name == "constant":
        return 1.0
    done = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return cosine_decay(step - warmup_steps, max(steps - warmup_steps, 1)) if name == "cosine" else max(1 - done, 0.0)
