"""The checks of sample weights catch what they name, and let pass what is sound."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dmdr.protocols import Needs
from dmdr.testing import check_sample_weight
from dmdr.training.tilt import RewardTilt
from dmdr.types import Direction, Draw

Answer = Callable[[Draw, Direction, Any], Tensor]


def weighing(answer: Answer, needs: Needs | None = None) -> Callable[[], Any]:
    """Makes a sample weight out of its answer and, if there are any, its needs."""

    @dataclass
    class Tried:
        def __call__(self, draw: Draw, direction: Direction, ctx: Any) -> Tensor:
            return answer(draw, direction, ctx)

    if needs:
        Tried.needs = needs  # type: ignore[attr-defined]
    return Tried


def rewards(ctx: Any) -> Tensor:
    """Of the global batch, [N] float32; the mean where a reward could not score."""
    total = ctx.rewards.total(ctx.global_scores()[0])
    return total.nan_to_num(total.nanmean().nan_to_num().item())


def proportional(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    """Sound: one plus the reward's distance from its mean."""
    total = rewards(ctx)
    return (1 + total - total.mean())[draw.sample]


def short_first(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    """Sound, without a reward."""
    weights = 1 / (1 + direction.total.flatten(1).norm(dim=1))
    return weights / ctx.gather(weights).mean()


def by_its_own_share(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    weights = 1 / (1 + direction.total.flatten(1).norm(dim=1))
    return weights / weights.mean()


def gathering_what_is_compared(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    weights = by_its_own_share(draw, direction, ctx)
    return weights / ctx.gather(weights).mean()


def gathering_twice_if_large(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    return short_first(draw, direction, ctx) if len(draw) < 16 or ctx.gather(direction.total[:, 0]).any() else direction


def of_the_first_rows(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    total = rewards(ctx)
    return (1 + total - total.mean())[: len(draw)]


def shuffled(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    random.random()
    return proportional(draw, direction, ctx)


def shortened(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    direction.total.clamp_(-1, 1)
    return proportional(draw, direction, ctx)


def rescoring(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    for scores in ctx.global_scores()[0].values():
        scores.sub_(scores.nanmean())
    return proportional(draw, direction, ctx)


def standardised(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    total = rewards(ctx)
    return (1 + 0.1 * (total - total.mean()) / total.std(correction=0))[draw.sample]


def unscored_weigh_nothing(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    scored = ctx.rewards.total(ctx.global_scores()[0]).isfinite().float()
    return (scored / scored.mean())[draw.sample]


def in_their_own_reward(draw: Draw, direction: Direction, ctx: Any) -> Tensor:
    total = ctx.rewards.total(ctx.global_scores()[0])
    return (1 + total - total.nanmean())[draw.sample]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda d, g, c: rewards(c).mean(), r"returns \[1\] float32; this one torch.float32 \[\]"),
        (lambda d, g, c: proportional(d, g, c).double(), r"this one torch.float64 \[1\]"),
        (in_their_own_reward, "weights must be finite with a reward that is NaN for some images"),
        (unscored_weigh_nothing, "weights must be finite with a reward that is NaN for"),
        (standardised, "weights must be finite"),
        (lambda d, g, c: 9 * proportional(d, g, c) - 8, "weights must not be negative, as -"),
        (lambda d, g, c: proportional(d, g, c) + 0.1, "mean one over the global batch, not 1.1 to 1.1"),
        (lambda d, g, c: rewards(c)[d.sample], "divide by the mean over"),
        (of_the_first_rows, "with two processes, a sample has another weight than with one"),
        (shuffled, "sample weight drew from Python's global"),
        (shortened, "the sample weight changed the direction"),
        (rescoring, r"the sample weight changed ctx.global_scores\(\)\[0\]\['toy'\] in place"),
        (lambda d, g, c: torch.ones(len(d)), "needs.reward is declared, but no score was asked for"),
    ],
)
def test_a_broken_sample_weight_is_taught(answer: Answer, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_sample_weight(weighing(answer, Needs()))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (proportional, r"it asks for a reward, which a run may not have: declare needs = Needs\(reward=True\)"),
        (by_its_own_share, "with two processes, a sample has another weight than with one"),
        (gathering_what_is_compared, "ctx.gather joins what each process says of its own samples"),
        (gathering_twice_if_large, "ctx.gather joins what each process says of its own samples"),
    ],
)
def test_one_without_a_reward_is_taught(answer: Answer, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_sample_weight(weighing(answer))


@dataclass
class OverTime:
    """Mean one over time: weighs by the reward over its average so far; and what may be wrong with it."""

    needs: ClassVar[Needs] = Needs()
    flaw: str = ""
    sum: float = field(default=0.0, init=False)
    count: int = field(default=0, init=False)

    def __call__(self, draw: Draw, direction: Direction, ctx: Any) -> Tensor:
        total = 1 + rewards(ctx)
        self.sum, self.count = self.sum + total.mean().item(), self.count + 1
        return (total / (self.sum / self.count))[draw.sample] * (1.2 if self.flaw == "large" else 1)

    def state_dict(self) -> Mapping[str, float]:
        return {"count": self.count} if self.flaw == "forgets" else {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.sum = state["count"] * (self.flaw != "loses"), state.get("sum", 0.0)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("large", "weights have mean one over time, not 1.2 over 10 steps"),
        ("loses", "must bring back the state"),
        ("forgets", "keeps something that a checkpoint does not hold"),
    ],
)
def test_one_with_a_state_is_taught(flaw: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_sample_weight(partial(OverTime, flaw))


def test_an_idle_one_cannot_be_checked() -> None:
    with pytest.raises(AssertionError, match="it does nothing with these values of its fields: a run leaves it out"):
        check_sample_weight(partial(RewardTilt, reward_tilt=0.0))


@pytest.mark.parametrize(
    "build",
    [
        OverTime,
        weighing(short_first),
        partial(RewardTilt, tilt_baseline="ema", tilt_weight="linear"),
    ],
)
def test_sound_sample_weights_pass(build: Callable[[], Any]) -> None:
    check_sample_weight(build)
