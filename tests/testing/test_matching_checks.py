"""The checks of matchings catch what they name, and let pass what is sound."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmdr.matching import DMD, TimeWeight, renoised_to_grid
from dmdr.protocols import OwnLearner
from dmdr.testing import check_matching
from dmdr.types import Direction, Draw, Term


def flawed(method: str, instead: Callable[..., Any]) -> type[DMD]:
    """DMD with one method that calls `instead(own method, *arguments)`."""

    def called(self: DMD, *args: Any) -> Any:
        return instead(partial(getattr(DMD, method), self), *args)

    return type("Flawed", (DMD,), {method: called})


def renoised(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """Renoised states with other values."""

    def instead(own: Any, draw: Draw, ctx: Any) -> Any:
        return tuple(replace(r, **{name: change(r) for name, change in changes.items()}) for r in own(draw, ctx))

    return instead


def total(change: Callable[[Tensor], Tensor], *, parts: bool = False) -> Callable[..., Direction]:
    """Another direction, without its parts unless they are asked for."""

    def instead(own: Any, *args: Any) -> Direction:
        found = own(*args)
        return Direction(change(found.total), found.parts if parts else {})

    return instead


def with_the_student(own: Any, draw: Draw, fake: Any, ctx: Any) -> Term:
    student = ctx.backend.student(draw.x_t, draw.t, draw.cond).x0
    return Term(own(draw, fake, ctx).loss + student.square().mean(1))


def under_the_fake_score(own: Any, prediction: Any, draw: Draw, ctx: Any) -> Tensor:
    return own(prediction, draw, ctx) + ctx.backend.fake_score(draw.x_t, draw.t, draw.cond).x0


def with_a_graph(own: Any, draw: Draw, teacher: Any, fake: Any, ctx: Any) -> Direction:
    return Direction(fake(draw.x_t, draw.t, draw.cond).x0 - draw.x0)


def scaled(own: Any, draw: Draw, *args: Any) -> Direction:
    draw.x0.mul_(0.5)
    return own(draw, *args)


def drawing(own: Any, draw: Draw, ctx: Any) -> Any:
    torch.rand(1)
    return own(draw, ctx)


def of_every_use(own: Any, draw: Draw, ctx: Any) -> Any:
    return own(draw, replace(ctx, iteration=0))


def at_exact_answers(own: Any, draw: Draw, teacher: Any, fake: Any, ctx: Any) -> Direction:
    answers = fake(draw.x_t, draw.t, draw.cond).value
    return Direction(torch.where(answers == answers.bfloat16(), torch.nan, own(draw, teacher, fake, ctx).total))


def in_whole_batches(own: Any, draw: Draw, *args: Any) -> Any:
    """By the trainer's own micro-batches of eight."""
    return replace(own(draw, *args), metrics={} if draw.sample[0] else {"loss": 1.0})


@pytest.mark.parametrize(
    ("method", "instead", "message"),
    [
        ("anchor", lambda own, *a: own(*a).mean(1), r"anchor must be \[16, 2\] of floating dtype, not \[16\]"),
        ("anchor", lambda own, prediction, draw, ctx: draw.x0, "the anchor has no graph"),
        ("anchor", lambda own, *a: own(*a) / 0, "the anchor must be finite"),
        ("anchor", under_the_fake_score, "reach the student alone, not student and fake_score"),
        ("renoise", lambda own, *a: own(*a)[0], "renoise returns a tuple of one or more Renoised"),
        ("renoise", renoised(t=lambda r: r.t[:, None]), r"renoise\(...\).t must be \[16\] of floating dtype"),
        ("renoise", renoised(t=lambda r: r.t * 0), "renoise times are above 0"),
        ("renoise", renoised(weight=lambda r: -r.weight), "weights must not be negative"),
        ("renoise", renoised(eps=lambda r: -r.eps), "x_t is what x0 and eps make at t"),
        ("renoise", renoised(x_t=lambda r: r.x_t * torch.nan), "x_t must be finite"),
        ("renoise", drawing, "drew from torch's global random generator"),
        ("renoise", of_every_use, "repeats 32 random numbers of the first"),
        ("fake_loss", lambda own, *a: own(*a).loss, "fake_loss must return a Term, not Tensor"),
        ("fake_loss", lambda own, *a: Term(own(*a).loss.mean()), r"fake_loss: Term.loss must be one loss per sample"),
        ("fake_loss", lambda own, *a: Term(own(*a).loss, a[0].mask), "Term.valid is for objectives; leave it out"),
        ("fake_loss", lambda own, *a: Term(own(*a).loss.detach()), "the fake_loss has no graph"),
        ("fake_loss", lambda own, *a: Term(own(*a).loss / 0), "fake_loss must be finite"),
        ("fake_loss", with_the_student, "must not reach the student"),
        ("fake_loss", lambda own, draw, fake, ctx: Term(own(draw, ctx.backend.student, ctx).loss), "the student"),
        ("fake_loss", lambda own, *a: Term((loss := own(*a).loss) - loss.mean()), "fake_loss of a sample must not"),
        ("fake_loss", in_whole_batches, "the metric 'loss' is missing in a micro-batch"),
        ("direction", lambda own, *a: own(*a).total, "direction returns a Direction, not Tensor"),
        ("direction", total(Tensor.double), r"total must be \[16, 2\] torch.float32, not \[16, 2\] torch.float64"),
        ("direction", total(lambda x: x / 0), "the direction's total must be finite"),
        ("direction", total(lambda x: 2 * x, parts=True), "dm and ca do not"),
        ("direction", with_a_graph, "the direction's total has a graph"),
        ("direction", scaled, "the matching changed draw.x0 in place"),
        ("direction", at_exact_answers, "with networks in bfloat16, direction must still be finite"),
        ("direction", total(torch.zeros_like), "two training steps left the student as it was"),
        ("direction", total(lambda x: x + torch.rand_like(x)), "drew from torch's global"),
        ("direction", total(lambda x: x / x.abs().mean()), "direction of a sample must not depend on which others"),
        ("direction", total(lambda x: x), "as each direction is to have, but this one has no ca and no dm"),
    ],
)
def test_a_broken_matching_is_taught(method: str, instead: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_matching(flawed(method, instead))


def test_a_matching_that_fails_without_guidance_is_caught() -> None:
    def divided(own: Any, draw: Draw, teacher: Any, fake: Any, ctx: Any) -> Direction:
        return Direction(own(draw, teacher, fake, ctx).total / (ctx.guidance[0] - 1))

    with pytest.raises(AssertionError, match="direction's total without guidance must be finite"):
        check_matching(flawed("direction", divided))


@dataclass(frozen=True)
class ToTheGrid(DMD):
    """Matches at the student's own times, the first of which is pure noise."""

    def renoise(self, draw: Draw, ctx: Any) -> Any:
        return (renoised_to_grid(draw.x0, "grid", draw, ctx),)


@dataclass
class WithHeads:
    """A matching with a learner of its own and a state, and what may be wrong with them."""

    anchor, renoise, direction = DMD.anchor, DMD.renoise, DMD.direction
    distance, scaled = DMD.distance, DMD.scaled
    floor: float = 1e-6
    time_weight: TimeWeight = "none"
    flaw: str = ""
    late: bool = field(default=False, init=False)

    def learners(self, backend: Any, device: torch.device) -> Sequence[OwnLearner]:
        with torch.random.fork_rng(enabled=self.flaw != "seedless"):
            if self.flaw != "seedless":
                torch.manual_seed(0)
            self.head = nn.Linear(2, 1)
        return [OwnLearner("head", dict(self.head.named_parameters()), 1e-3)]

    def fake_loss(self, draw: Draw, fake: Any, ctx: Any) -> Term:
        loss, rated = DMD().fake_loss(draw, fake, ctx).loss, self.head(draw.x0)[:, 0]
        if self.flaw == "idle":
            rated = rated.detach()
        self.late |= ctx.step == 1  # whatever the micro-batch is
        return Term(loss + rated.square() * (2 if self.late else 1))

    def state_dict(self) -> Mapping[str, Any]:
        return {} if self.flaw == "forgets" else {"late": self.late}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.late = state.get("late", False) and self.flaw != "loses"


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("idle", "no gradient of the fake_loss arrives at the head"),
        ("seedless", "initial values of learners from a seed of your own"),
        ("loses", "must bring back the state"),
        ("forgets", "keeps something that a checkpoint does not hold"),
    ],
)
def test_a_matching_with_learners_and_a_state_is_taught(flaw: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_matching(partial(WithHeads, flaw=flaw))


def test_sound_matchings_pass() -> None:
    check_matching(WithHeads)
    check_matching(ToTheGrid)
