"""Losses, gradients and rewards that are not finite: what is skipped, counted and said, and when training ends."""

import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import PartialState
from torch import Tensor

import processes
from dmdr.backends.toy import ToyBackend
from dmdr.ema import EMA
from dmdr.errors import TrainingError
from dmdr.matching import DMD
from dmdr.protocols import Needs
from dmdr.training.bad_steps import BadSteps
from dmdr.training.tilt import RewardTilt
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Term
from dmdr_refl import ReFL
from toy_trainer import Critic, Plain, adam, flat, prepared, state, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")


@dataclass(frozen=True)
class FakeLoss(DMD):
    """Its fake loss is not finite at those steps of those processes; the gradient of the loss is."""

    steps: tuple[int, ...] = (0,)
    ranks: tuple[int, ...] = (0,)
    value: float = math.nan

    def fake_loss(self, draw: Draw, fake: Any, ctx: Any) -> Term:
        term = super().fake_loss(draw, fake, ctx)
        broken = ctx.step in self.steps and PartialState().process_index in self.ranks
        return replace(term, loss=term.loss + self.value) if broken else term


@dataclass
class Gradient:
    """An objective with a finite loss; its gradient in the student's parameters is NaN."""

    ranks: tuple[int, ...] = (0,)
    needs: Needs = field(default_factory=Needs)

    def __call__(self, draw: Draw, ctx: Any) -> Term:
        value = ctx.backend.student(draw.x_t, draw.t, draw.cond).value
        if PartialState().process_index in self.ranks:
            value.register_hook(lambda grad: grad * math.nan)
        return Term(value.square().flatten(1).sum(1))


class BrokenDecoder(ToyBackend):
    """NaN in the first image of a batch."""

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        images = super().decode(latents, exact=exact)
        return torch.cat([images[:1] * math.nan, images[1:]])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dmdr"]


def unchanged(running: Trainer, role: str, before: dict[str, Tensor]) -> bool:
    return torch.equal(flat(state(running, role)), flat(before))


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="dmdr")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fake_loss_that_is_not_finite_skips_the_fake_score_alone(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    running = trainer(matching=FakeLoss(value=value), bad=BadSteps(10), optimize=adam)
    student, fake = state(running), state(running, "fake_score")
    line = running.train_step()
    assert line["bad_steps"] == running.bad_steps == 1
    assert unchanged(running, "fake_score", fake) and not unchanged(running, "student", student)
    assert warnings(caplog) == [
        "step 1: the fake_score was not updated: loss/fake is not finite (bad step 1 of 10 in a row)"
    ]
    assert "bad_steps" not in running.train_step()
    assert running.bad_steps == 0 and not unchanged(running, "fake_score", fake)
    assert len(warnings(caplog)) == 1


def test_a_round_before_the_last_counts(caplog: pytest.LogCaptureFixture) -> None:
    """Its own log line is not kept; all rounds of a step are one warning."""
    running = trainer(matching=FakeLoss(), fake_updates=3, bad=BadSteps(10))
    assert running.train_step()["bad_steps"] == 1
    (said,) = warnings(caplog)
    assert said.count("the fake_score was not updated: loss/fake is not finite") == 1


def test_a_gradient_that_is_not_finite_skips_the_student_alone(caplog: pytest.LogCaptureFixture) -> None:
    running = trainer(objectives=[Gradient()], bad=BadSteps(10), optimize=adam)
    running.objectives.terms[0].objective.ranks = ()  # type: ignore[attr-defined]
    average = running.student.ema = EMA(running.student.parameters, 0.5)
    running.train_step()  # so that the optimizer has a state
    running.objectives.terms[0].objective.ranks = (0,)  # type: ignore[attr-defined]
    student, fake, averaged = state(running), state(running, "fake_score"), flat(average.average).clone()
    optimizer = [{k: v.clone() for k, v in s.items()} for s in running.student.optimizer.state.values()]
    epoch = running.student.scheduler.last_epoch
    line = running.train_step()
    assert math.isnan(line["grad_norm/student"]) and math.isfinite(line["loss/gradient"])
    assert unchanged(running, "student", student) and not unchanged(running, "fake_score", fake)
    assert torch.equal(flat(average.average), averaged)
    for before, after in zip(optimizer, running.student.optimizer.state.values(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert running.student.scheduler.last_epoch == epoch + 1 and running.step == 2
    (said,) = warnings(caplog)
    assert said.startswith("step 2: the student was not updated: its gradient is not finite (first in net.0.weight)")
    assert "loss/" not in said


def test_a_learner_of_an_objective_is_skipped_for_its_own_loss(caplog: pytest.LogCaptureFixture) -> None:
    class Lost(Critic):
        def __call__(self, draw: Draw, ctx: Any) -> Any:
            first, second = super().__call__(draw, ctx)
            yield first
            yield replace(second, loss=second.loss + math.nan)

    lost = Lost()
    running = trainer(objectives=[lost], rewards=Plain(), bad=BadSteps(10))
    before, critic = state(running), lost.head.weight.detach().clone()
    running.train_step()
    assert not unchanged(running, "student", before) and torch.equal(lost.head.weight, critic)
    assert warnings(caplog)[0].startswith("step 1: the critic was not updated: loss/lost/critic is not finite (bad")


@pytest.mark.parametrize("limit", [0, 2])
def test_too_many_in_a_row_end_the_training(limit: int, caplog: pytest.LogCaptureFixture) -> None:
    running = trainer(matching=FakeLoss(steps=(0, 2, 3, 4)), bad=BadSteps(limit))
    steps = 4 if limit else 0
    assert [running.train_step().get("bad_steps", 0) for _ in range(steps)] == [1, 0, 1, 2][:steps]
    row = r" \(3 steps in a row\)" if limit else ""
    with pytest.raises(TrainingError, match=f"^step {steps + 1}: the fake_score was not .* not finite{row}$"):
        running.train_step()
    assert running.bad_steps == limit + 1 and running.step == steps
    assert flat(state(running, "fake_score")).isfinite().all()


def test_a_loss_scaler_skips_as_ever() -> None:
    """What overflows in float16 is no bad step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    running = trainer(objectives=[ReFL()], rewards=Plain(), scaler=scaler, rl_weight=100.0, optimize=adam)
    before = state(running)
    assert "bad_steps" not in running.train_step()
    assert unchanged(running, "student", before) and running.student.skipped == 1


# --- Rewards and the decoder ------------------------------------------------------------------------------------------


PARTS: dict[str, dict[str, Any]] = {
    "sample weight": {"sample_weight": RewardTilt(1.5)},
    "refl": {"objectives": [ReFL()]},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_without_a_score_are_counted(part: str, value: float, caplog: pytest.LogCaptureFixture) -> None:
    """Two of eight, in each step; the first is warned of."""
    running = trainer(rewards=Plain({"mode 1": value}), **PARTS[part])
    lines = [running.train_step(noted=step == 2) for step in range(3)]
    assert [line["unscored/toy"] for line in lines] == [2, 2, 2]
    assert running.bad_steps == 0
    assert warnings(caplog) == [
        "the reward 'toy' left 2 images of step 1 without a finite score; the log counts such images as unscored/toy"
    ]
    assert math.isfinite(running.reward_metrics()["reward/toy"])


@pytest.mark.parametrize("part", PARTS)
def test_what_the_decoder_breaks_is_counted(part: str, caplog: pytest.LogCaptureFixture) -> None:
    running = trainer(prepared(BrokenDecoder), rewards=Plain(), **PARTS[part])
    before = state(running)
    assert running.train_step()["unscored/toy"] == 1
    assert "the reward 'toy' left 1 images of step 1 without a finite score" in warnings(caplog)[0]
    assert not unchanged(running, "student", before) and flat(state(running)).isfinite().all()


def test_a_reward_that_an_objective_trusts_makes_a_bad_step(caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class Trusting:
        needs: ClassVar[Needs] = Needs(reward_grad=True)

        def __call__(self, draw: Draw, ctx: Any) -> Term:
            return Term(-ctx.rewards(ctx.backend.decode(draw.leaf), draw.cond.prompts))

    running = trainer(rewards=Plain({"mode 1": math.nan}), objectives=[Trusting()], bad=BadSteps(1))
    before = state(running)
    running.train_step()
    assert unchanged(running, "student", before)
    bad = next(said for said in warnings(caplog) if "bad step" in said)
    assert "loss/trusting is not finite, the reward 'toy' left 2 images without a score (bad step 1 of 1" in bad


# --- Two processes ----------------------------------------------------------------------------------------------------


SECOND: dict[str, dict[str, Any]] = {
    "fake loss": {"matching": FakeLoss(steps=(0, 1), ranks=(1,))},
    "gradient": {"objectives": [Gradient(ranks=(1,))]},
}


def work(rank: int, folder: str) -> None:
    found = {}
    for case, settings in SECOND.items():
        running = trainer(batch=4, bad=BadSteps(1), **settings)
        before = {role: state(running, role) for role in ("student", "fake_score")}
        line = running.train_step()
        same = {role: unchanged(running, role, before[role]) for role in before}
        try:
            running.train_step(noted=True)  # which averages the gradient before the update does
        except TrainingError as error:
            found[case] = (line["bad_steps"], same, str(error))
    torch.save(found, Path(folder) / f"{rank}.pt")
    PartialState().destroy_process_group()


def test_the_process_that_brought_it_is_named(tmp_path: Path) -> None:
    processes.start(work, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first == second and set(first) == set(SECOND)
    count, same, said = first["fake loss"]
    assert (count, same) == (1, {"student": False, "fake_score": True})
    assert said == ("step 2: the fake_score was not updated: loss/fake is not finite (process 1) (2 steps in a row)")
    count, same, said = first["gradient"]
    assert (count, same) == (1, {"student": True, "fake_score": False})
    assert "the student was not updated: its gradient is not finite (process 1, first in net.0.weight)" in said
