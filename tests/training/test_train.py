"""The training step on the analytic mixture, against the same step done by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dmdr.training.scorer
from dmdr.backends.toy import CENTRES, PROMPTS, STD, Redness, Residual, ToyBackend, ToyOptions
from dmdr.errors import TrainingError
from dmdr.matching import DMD
from dmdr.protocols import Needs
from dmdr.randomness import Random
from dmdr.rewards import RewardError, Rewards
from dmdr.sampling import FewStepSampler, time_grid
from dmdr.testing import toy_trainer
from dmdr.times import Beta
from dmdr.training.context import StepContext
from dmdr.training.objectives import WeightedObjective, combined_needs
from dmdr.training.schedules import DynaDG, DynaRS
from dmdr.training.scorer import PATIENCE
from dmdr.training.tilt import RewardTilt, standardised
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Term
from dmdr_refl import ReFL
from toy_trainer import (
    Constant,
    DoubleToy,
    Meter,
    Plain,
    Policy,
    adam,
    cpu,
    flat,
    prepared,
    state,
    step_of,
    tilt_weights,
    trainer,
)


def assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative error in the 2-norm."""
    assert expected.norm() > 1e-3
    assert (found - expected).norm() <= tolerance * expected.norm()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def train(trainer: Trainer, steps: int) -> dict[str, Tensor]:
    """Student and fake score after some steps."""
    for _ in range(steps):
        trainer.train_step()
    return {f"{role}.{n}": p for role in ("student", "fake_score") for n, p in state(trainer, role).items()}


def prepare_step(trainer: Trainer) -> tuple[StepContext, Draw]:
    """The first half of a step: rollout, draw, direction."""
    ((ctx, draw),) = trainer.draws(noted=True)
    return ctx, replace(draw, direction=trainer.direction(draw, ctx))


def gradient(trainer: Trainer, loss: Callable[[Tensor, Draw], Tensor]) -> Tensor:
    """Gradient of a loss of x0 at the student's parameters, in one graph, after the first half of a step."""
    _, draw = prepare_step(trainer)
    x0 = trainer.backend.student(draw.x_t, draw.t, draw.cond).x0
    grads = torch.autograd.grad(loss(x0, draw), list(trainer.student.parameters.values()))
    return torch.cat([grad.flatten() for grad in grads])


def matching_loss(x0: Tensor, draw: Draw) -> Tensor:
    """DMD's loss as it was published: 0.5 mean((x0 - sg(x0 - g))^2)."""
    assert draw.direction is not None
    return 0.5 * (x0 - (x0 - draw.direction.total).detach()).square().mean()


@dataclass
class Spy:
    """An objective that notes what it is given; its loss pulls the leaf towards the origin."""

    needs: Needs = field(default_factory=Needs)
    draws: list[Draw] = field(default_factory=list)
    updates: int = 0

    def __call__(self, draw: Draw, ctx: Any) -> Term:
        self.draws.append(draw)
        assert draw.leaf is not None
        return Term(draw.leaf.square().flatten(1).sum(1), metrics={"index": draw.index.float(), "constant": 2.0})

    def after_update(self, ctx: Any) -> None:
        self.updates += 1


# --- Distribution matching alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (3.0, 5.0)])
def test_step_takes_the_gradient_of_the_published_loss(guidance: tuple[float, float]) -> None:
    by_hand = gradient(trainer(prepared(DoubleToy), guidance=guidance), matching_loss)
    assert_same(-step_of(trainer(prepared(DoubleToy), guidance=guidance)), by_hand, 1e-10)


def test_dmd_weight_scales_the_gradient() -> None:
    once, thrice = (step_of(trainer(prepared(DoubleToy), dmd_weight=weight)) for weight in (1.0, 3.0))
    assert_same(thrice, 3 * once, 1e-12)


def test_fake_score_takes_the_gradient_of_its_denoising_loss() -> None:
    by_hand = trainer(prepared(DoubleToy))
    ctx = by_hand.context(0)
    draw = by_hand.rollouts.pick(by_hand.rollouts.whole(ctx), ctx)
    loss = DMD().fake_loss(draw, by_hand.backend.fake_score, ctx).loss.mean()
    grads = torch.autograd.grad(loss, list(by_hand.fake_learners[0].parameters.values()))
    found = -step_of(trainer(prepared(DoubleToy)), "fake_score")
    assert_same(found, torch.cat([grad.flatten() for grad in grads]), 1e-6)  # its error is taken in float32


def test_fake_score_equal_to_the_teacher_moves_nothing() -> None:
    running = trainer(prepared(), fake_mix=lambda step: 1.0, optimize=adam)
    before = state(running)
    line = running.train_step()
    assert line["loss/dmd"] == line["grad_norm/student"] == 0.0
    assert line["loss/fake"] > 0
    assert_equal(state(running), before)


@pytest.mark.parametrize("updates", [1, 3])
def test_fake_score_learns_several_times_a_step_each_time_from_new_prompts(updates: int) -> None:
    asked: list[Tensor] = []

    class Recording(DMD):
        def fake_loss(self, draw: Draw, fake: Any, ctx: Any) -> Term:
            asked.append(draw.x_t)
            return super().fake_loss(draw, fake, ctx)

        def direction(self, draw: Draw, *args: Any) -> Any:
            seen.append(len(asked))
            return super().direction(draw, *args)

    seen: list[int] = []
    running = trainer(fake_updates=updates, matching=Recording())
    running.train_step()
    assert len(asked) == len(torch.stack(asked).unique(dim=0)) == updates
    assert seen == [updates - 1]  # it is asked for a direction before it learns the images that this is for
    assert running.prompts.consumed == updates


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"valid": torch.ones(8, dtype=torch.bool)}, "Term.valid is for objectives; leave it out"),
        ({"trains": "head"}, "Term.trains is for objectives; leave it out"),
        ({"loss": torch.zeros(3)}, r"Term.loss must be one loss per sample, \[8\]"),
        (None, "must return a Term, not Tensor"),
    ],
)
def test_a_fake_loss_of_another_form_stops_the_run(more: dict[str, Any] | None, said: str) -> None:
    class Odd(DMD):
        def fake_loss(self, *args: Any) -> Any:
            term = super().fake_loss(*args)
            return term.loss if more is None else replace(term, **more)

    with pytest.raises(TrainingError, match=f"the matching's fake_loss:? {said}"):
        trainer(matching=Odd()).train_step()


def test_only_student_and_fake_score_move() -> None:
    backend = prepared(roles=("student", "fake_score", "reference"))
    running = trainer(backend, optimize=adam, objectives=[ReFL()], rewards=Redness(), guidance=(2.0, 3.0))
    before = {role: state(running, role) for role in ("student", "fake_score", "reference")}
    cond, x_t, t = backend.encode(PROMPTS), torch.randn(4, 2), torch.full((4,), 0.4)
    teacher = backend.teacher(x_t, t, cond, guidance=2.0).value
    running.train_step()
    assert torch.equal(backend.teacher(x_t, t, cond, guidance=2.0).value, teacher)
    assert_equal(state(running, "reference"), before["reference"])
    for role in ("student", "fake_score"):
        assert not any(torch.equal(value, before[role][name]) for name, value in state(running, role).items())
    assert all(p.grad is None for p in backend.parameters("reference").values())


def test_schedules_follow_the_stage_and_random_numbers_the_run() -> None:
    running = trainer(fake_mix=DynaDG(0.5, 10), renoise=DynaRS(4, 1.5, 10), guidance=(2.0, 3.0), first_step=100)
    running.step = 5
    ctx = running.context(2)
    assert (ctx.step, ctx.fake_mix, ctx.renoise, ctx.guidance) == (5, 0.25, Beta(2.5, 1.25), (2.0, 3.0))
    assert ctx.random == Random(0, 105, "rollout/2")


def test_a_trainer_goes_on_where_another_stopped() -> None:
    whole = trainer()
    expected = train(whole, 3)
    first = trainer()
    train(first, 1)
    second = trainer(first.backend, step=1)
    second.prompts.skip_to(first.prompts.consumed)
    assert_equal(train(second, 2), expected)


def test_training_stops_before_a_gradient_that_is_not_finite() -> None:
    class Broken(DMD):
        def direction(self, draw: Draw, *args: Any) -> Any:
            found = super().direction(draw, *args)
            return replace(found, total=found.total * math.nan)

    running = trainer(matching=Broken())
    before = state(running)
    with pytest.raises(TrainingError, match="step 1: the student was not updated: its gradient is not finite"):
        running.train_step()
    assert_equal(state(running), before)
    assert running.step == 0


def stand(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def test_gradients_are_clipped_after_they_are_logged() -> None:
    free = trainer(prepared(DoubleToy), fake_optimize=stand)
    clipped = trainer(prepared(DoubleToy), fake_optimize=stand, max_grad_norm=0.01)
    moved = step_of(free)
    before = flat(state(clipped))
    line = clipped.train_step()
    assert line["grad_norm/student"] == pytest.approx(moved.norm().item(), rel=1e-12)
    assert line["grad_norm/student"] > 0.1
    assert (flat(state(clipped)) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


# --- Rollouts ---------------------------------------------------------------------------------------------------------


def test_training_sees_the_states_of_inference() -> None:
    running = trainer(batch=6, micro_batch=4, group_size=2, eta=0.6)
    ctx = running.context(0)
    rollout = running.rollouts.whole(ctx)
    assert rollout.sample.tolist() == [0, 1, 2, 3, 4, 5]
    assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert rollout.cond.prompts[::2] == rollout.cond.prompts[1::2]
    sampler, backend = FewStepSampler(running.backend.path, time_grid(4), 0.6), running.backend
    for part in (slice(0, 4), slice(4, 6)):
        noise = Random(0, 0, "rollout/0").normal("noise", torch.arange(6)[part], (4, 2)).transpose(0, 1)
        inference = sampler.rollout(backend.student, noise, backend.encode(rollout.cond.prompts[part]))
        assert torch.equal(rollout.x_t[:, part], inference.x_t)
        assert torch.equal(rollout.x0[:, part], inference.x0)
    draw = running.rollouts.pick(rollout, ctx)
    assert set(running.rollouts.pick(running.rollouts.whole(running.context(1)), ctx).index.tolist()) <= {0, 1, 2, 3}
    for row, index in enumerate(draw.index.tolist()):
        assert torch.equal(draw.x_t[row], rollout.x_t[index, row])


def test_every_student_step_is_drawn_equally_often() -> None:
    running = trainer(batch=64)
    counts = torch.zeros(4)
    for k in range(20):
        ctx = running.context(k)
        counts += running.rollouts.pick(running.rollouts.whole(ctx), ctx).index.bincount(minlength=4)
    assert (counts - 320).abs().max() < 4 * (1280 * 3 / 16) ** 0.5


def test_log_probs_are_kept_where_an_objective_needs_them() -> None:
    assert trainer().draws(noted=True)[-1][1].rollout.log_prob is None
    running = trainer(micro_batch=3, objectives=[Spy(Needs(log_prob=True))], rewards=Redness())
    rollout = running.draws(noted=False)[-1][1].rollout
    assert rollout.log_prob is not None
    assert rollout.log_prob.shape == (3, 8)
    prediction = running.backend.student(rollout.x_t[1], rollout.t[1].expand(8), rollout.cond)
    expected = running.sampler.log_prob(1, prediction, rollout.x_t[2])
    torch.testing.assert_close(rollout.log_prob[1], expected, rtol=0, atol=1e-6)


def test_rollouts_are_not_scored_for_an_inactive_objective() -> None:
    spy = Spy(Needs(log_prob=True, updates_per_rollout=3))
    running = trainer(objectives=[spy], rewards=Redness(), rl_weight=0.0)
    assert running.draws(noted=False)[-1][1].rollout.log_prob is None
    assert running.objectives.needs.updates_per_rollout == 1
    assert not running.objectives.terms


# --- Reward-tilted matching -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.3, 22.3, 0.0])
def test_equal_rewards_train_as_without_any(value: float) -> None:
    reward = Constant(value)
    tilted = train(trainer(optimize=adam, rewards=reward, sample_weight=RewardTilt(1.5)), 3)
    assert reward.calls == 3
    assert_equal(tilted, train(trainer(optimize=adam), 3))


@pytest.mark.parametrize("broken", [{}, {"mode 1": math.nan, "mode 2": math.inf}])
def test_tilt_weighs_each_samples_direction(broken: dict[str, float]) -> None:
    settings: dict[str, Any] = {"rewards": Plain(broken), "sample_weight": RewardTilt(1.5)}
    by_hand = trainer(prepared(DoubleToy), rewards=Plain(broken))
    ctx, draw = prepare_step(by_hand)
    scores = ctx.scores(draw.rollout)
    total, valid = standardised(scores, {"toy": 1.0})
    weight = tilt_weights(total, 1.5 * total[valid].std(correction=0).item(), valid=valid).double()
    assert weight.unique().numel() > 2
    assert set(weight[~valid].tolist()) <= {1.0}
    x0 = by_hand.backend.student(draw.x_t, draw.t, draw.cond).x0
    assert draw.direction is not None
    loss = (0.5 * weight[:, None] * (x0 - (x0 - draw.direction.total).detach()).square()).mean()
    grads = torch.autograd.grad(loss, list(by_hand.student.parameters.values()))
    found = -step_of(trainer(prepared(DoubleToy), **settings))
    assert_same(found, torch.cat([grad.flatten() for grad in grads]), 1e-10)


def test_the_parts_of_the_direction_are_weighed_and_kept_for_those_who_read_them() -> None:
    reader = Spy(Needs(matching=True, parts=("dm", "ca")))
    settings: dict[str, Any] = {"rewards": Plain(), "guidance": (2.0, 3.0), "objectives": [reader]}
    _, plain = prepare_step(trainer(prepared(DoubleToy), **settings))
    _, draw = prepare_step(trainer(prepared(DoubleToy), **settings, sample_weight=RewardTilt(1.5)))
    found, weighted = plain.direction, draw.direction
    assert found is not None and weighted is not None
    weight = weighted.total / found.total
    assert weight.std() > 0.1
    assert set(weighted.parts) == {"dm", "ca"}
    for name, part in weighted.parts.items():
        torch.testing.assert_close(part, weight * found.parts[name], rtol=1e-9, atol=0)
    _, unread = prepare_step(trainer(prepared(DoubleToy), **settings | {"objectives": [Spy()]}))
    assert unread.direction is not None and unread.direction.parts == {}
    assert torch.equal(unread.direction.total, found.total)


def test_tilt_does_not_touch_what_the_fake_score_learns() -> None:
    plain, tilted = trainer(), trainer(rewards=Plain(), sample_weight=RewardTilt(1.0))
    for running in (plain, tilted):
        running.train_step()
    assert_equal(state(tilted, "fake_score"), state(plain, "fake_score"))
    assert not torch.equal(flat(state(tilted)), flat(state(plain)))


def test_finished_images_are_scored_once_a_step() -> None:
    reward = Constant()
    running = trainer(micro_batch=4, fake_updates=3, rewards=reward, sample_weight=RewardTilt(1.5))
    running.train_step()
    assert reward.calls == 2  # two micro-batches of the last rollout
    running.reward_metrics()
    assert reward.calls == 2


# --- Reinforcement learning -------------------------------------------------------------------------------------------


def refl_loss(weight: float = 1.0) -> Callable[[Tensor, Draw], Tensor]:
    """Published matching loss plus the negative mean reward of the same prediction, in one graph."""

    def loss(x0: Tensor, draw: Draw) -> Tensor:
        score = Plain()(prepared().decode(x0), draw.cond.prompts)
        return matching_loss(x0, draw) - weight * score.mean()

    return loss


@pytest.mark.parametrize(("cls", "tolerance"), [(ToyBackend, 1e-6), (DoubleToy, 1e-10)])
@pytest.mark.parametrize("rl_weight", [0.5, 20.0])
def test_gradient_through_the_leaf_is_that_of_one_graph(
    cls: type[ToyBackend], tolerance: float, rl_weight: float
) -> None:
    expected = gradient(trainer(prepared(cls)), refl_loss(rl_weight))
    found = step_of(trainer(prepared(cls), objectives=[ReFL()], rewards=Plain(), rl_weight=rl_weight))
    assert_same(-found, expected, tolerance)
    assert (expected - gradient(trainer(prepared(cls)), matching_loss)).norm() > 0.02 * expected.norm()


def test_weights_of_run_and_term_multiply() -> None:
    expected = gradient(trainer(prepared(DoubleToy)), refl_loss(6.0))
    objectives = [(0.5, ReFL()), (1.0, ReFL())]
    found = step_of(trainer(prepared(DoubleToy), objectives=objectives, rewards=Plain(), rl_weight=4.0))
    assert_same(-found, expected, 1e-7)  # images and rewards are in float32


def test_no_reward_weight_is_plain_matching_and_asks_no_reward() -> None:
    reward = Redness()
    joint = trainer(optimize=adam, objectives=[ReFL()], rewards=reward, rl_weight=0.0)
    assert_equal(train(joint, 3), train(trainer(optimize=adam), 3))
    assert reward.calls == 0
    line = joint.train_step()
    assert not [name for name in line if "refl" in name or "reward" in name]


def test_no_matching_weight_leaves_the_fake_score_alone() -> None:
    class Forbidden(DMD):
        def renoise(self, *args: Any) -> Any:
            raise AssertionError("asked")

    running = trainer(prepared(DoubleToy), objectives=[ReFL()], rewards=Plain(), dmd_weight=0.0, matching=Forbidden())
    fake, student = state(running, "fake_score"), flat(state(running))
    line = running.train_step()
    assert_equal(state(running, "fake_score"), fake)
    assert "loss/fake" not in line
    assert running.prompts.consumed == 1

    by_hand = trainer(prepared(DoubleToy), dmd_weight=0.0)
    expected = gradient(by_hand, lambda x0, draw: -Plain()(prepared().decode(x0), draw.cond.prompts).mean())
    assert_same(student - flat(state(running)), expected, 1e-10)


CASES: dict[str, dict[str, Any]] = {
    "dmd": {"guidance": (2.0, 4.0)},
    "tilt": {"rewards": Plain(), "sample_weight": RewardTilt(1.5)},
    "refl": {"rewards": Plain(), "objectives": [ReFL()], "rl_weight": 5.0},
    "last": {"rewards": Plain(), "objectives": [ReFL(steps="last")], "rl_weight": 5.0},
    "invalid": {"rewards": Plain({"mode 1": math.nan}), "objectives": [ReFL()], "rl_weight": 5.0},
    "balanced": {"rewards": Plain(), "objectives": [ReFL()], "rl_weight": 5.0, "balances": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch", [4, 3])
def test_micro_batches_accumulate_to_the_whole(case: str, micro_batch: int) -> None:
    whole, split = trainer(**CASES[case]), trainer(**CASES[case], micro_batch=micro_batch)
    before = {role: flat(state(whole, role)) for role in ("student", "fake_score")}
    for running in (whole, split):
        running.train_step()
    for role in ("student", "fake_score"):
        moved = [flat(state(running, role)) - before[role] for running in (whole, split)]
        assert_same(moved[1], moved[0], 3e-6)  # rollouts are made in other batches, too


@pytest.mark.parametrize("case", CASES)
def test_log_lines_do_not_depend_on_the_micro_batches(case: str) -> None:
    whole, split = (trainer(**CASES[case], micro_batch=size).train_step() for size in (8, 3))
    assert split == pytest.approx(whole, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch", [8, 4])
def test_a_loss_scaler_changes_nothing(case: str, micro_batch: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    scaled = trainer(**CASES[case], micro_batch=micro_batch, scaler=scaler)
    plain = trainer(**CASES[case], micro_batch=micro_batch)
    for role in ("student", "fake_score"):
        before = flat(state(plain, role))
        assert torch.equal(flat(state(scaled, role)), before)
    lines = [running.train_step() for running in (plain, scaled)]
    for role in ("student", "fake_score"):
        assert_same(flat(state(scaled, role)), flat(state(plain, role)), 1e-7)
        assert not torch.equal(flat(state(plain, role)), flat(state(trainer(), role)))
    assert lines[1].pop("loss_scale") == 1024.0
    assert lines[1] == pytest.approx(lines[0], rel=1e-5, nan_ok=True)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_a_loss_scaler_that_never_recovers_stops_the_training() -> None:
    """A scale that grows back at once stands for networks whose activations overflow at any scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6, backoff_factor=0.999)
    running = trainer(objectives=[ReFL()], rewards=Plain(), scaler=scaler, rl_weight=1e30, fake_optimize=adam)
    before = flat(state(running))
    lines = [running.train_step() for _ in range(50)]
    assert lines[0]["loss_scale"] < 2.0**127
    with pytest.raises(TrainingError, match="the student have overflowed float16 in 51 updates in a row"):
        running.train_step()
    assert torch.equal(flat(state(running)), before)


def test_a_loss_scaler_skips_what_overflows_and_recovers() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    running = trainer(objectives=[ReFL()], rewards=Plain(), scaler=scaler, rl_weight=100.0, optimize=adam)
    before = state(running)
    running.train_step()
    assert_equal(state(running), before)
    assert scaler.get_scale() < 2.0**127
    for _ in range(12):
        running.train_step()
    assert flat(state(running)).isfinite().all()
    assert not torch.equal(flat(state(running)), flat(before))
    assert scaler.get_scale() > 2.0**110


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_a_reward_cannot_score_are_left_out_and_counted(value: float) -> None:
    broken = {"mode 1": value, "mode 2": value}
    reward = Plain(broken)
    running = trainer(prepared(DoubleToy), objectives=[ReFL()], rewards=reward, rl_weight=5.0)
    before = flat(state(running))
    line = running.train_step()
    found = before - flat(state(running))
    assert (line["refl/invalid"], line["refl/coverage"]) == (4, 0.5)
    assert math.isfinite(line["loss/refl"])
    assert math.isfinite(line["refl/score"])

    def loss(x0: Tensor, draw: Draw) -> Tensor:
        scored = torch.tensor([prompt not in broken for prompt in draw.cond.prompts])
        score = Plain()(prepared().decode(x0), draw.cond.prompts)
        return matching_loss(x0, draw) - 5 * score[scored].mean()

    assert_same(found, gradient(trainer(prepared(DoubleToy)), loss), 1e-10)
    assert train(running, 2)["student.net.0.weight"].isfinite().all()


def test_a_reward_that_judges_nothing_stops_the_training_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmdr.training.scorer, "PATIENCE", 1)
    running = trainer(objectives=[ReFL()], rewards=Plain(dict.fromkeys(PROMPTS, math.nan)))
    before = state(running)
    with pytest.raises(RewardError, match="reward 'toy' has scored none of 8 images: no score is finite"):
        running.train_step()
    assert_equal(state(running), before)


def test_a_batch_without_a_scored_sample_is_plain_matching_but_many_in_a_row_stop_the_training() -> None:
    """A small batch of few prompts may hold none that a reward is made for."""
    running = trainer(objectives=[ReFL()], rewards=Plain(dict.fromkeys(PROMPTS, math.nan)), optimize=adam)
    line = running.train_step()
    plain = trainer(optimize=adam)
    plain.train_step()
    assert_equal(state(running), state(plain))
    assert (line["refl/invalid"], line["refl/coverage"]) == (8, 0.0)
    for _ in range(PATIENCE - 2):
        running.train_step()
    with pytest.raises(RewardError, match="reward 'toy' has scored none of 8 images"):
        running.train_step()


def test_rewards_that_never_judge_the_same_sample_stop_the_training() -> None:
    halves = {
        name: Plain(dict.fromkeys(PROMPTS[part], math.nan)) for name, part in (("one", slice(2)), ("two", slice(2, 4)))
    }
    rewards = Rewards({name: (1.0, half) for name, half in halves.items()})
    running = trainer(objectives=[ReFL()], rewards=rewards, optimize=adam)
    for _ in range(PATIENCE - 1):
        running.train_step()
    with pytest.raises(RewardError, match="no image has a finite score of every reward: one, two"):
        running.train_step()


def test_an_objective_alone_that_left_nothing_at_x0_costs_no_pass_of_the_student() -> None:
    running = trainer(objectives=[Policy()], rewards=Plain(), dmd_weight=0.0)
    calls = []
    student = running.backend.student
    running.backend.student = lambda *args: calls.append(torch.is_grad_enabled()) or student(*args)  # type: ignore[method-assign,func-returns-value]
    running.train_step()
    assert calls[-1] and not any(calls[:-1])


def test_a_reward_that_judges_finished_images_only_leaves_plain_matching() -> None:
    class Late(Plain):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            score = super().__call__(*args, **kwargs)
            return score if self.calls > 1 else score * math.nan

    running = trainer(objectives=[ReFL()], rewards=Late())
    line = running.train_step()
    assert_equal(state(running), state(trainer_after_one_step()))
    assert (line["refl/invalid"], line["refl/coverage"], line["loss/refl"]) == (8, 0.0, 0.0)


def trainer_after_one_step() -> Trainer:
    running = trainer()
    running.train_step()
    return running


@pytest.mark.parametrize(("steps", "declared"), [("any", {0, 1, 2, 3}), ("last", {3}), ("stochastic", {0, 1, 2})])
@pytest.mark.parametrize("explicit", [False, True])
def test_objective_acts_on_the_steps_it_declares(steps: Any, declared: set[int], explicit: bool) -> None:
    spy = Spy(Needs(steps=tuple(sorted(declared)) if explicit else steps))
    running = trainer(prepared(DoubleToy), batch=16, objectives=[spy], rewards=Redness(), dmd_weight=0.0)
    before = flat(state(running))
    line = running.train_step()
    (draw,) = spy.draws
    mask = torch.tensor([index in declared for index in draw.index.tolist()])
    assert torch.equal(draw.mask, mask)
    assert 0 < mask.sum() <= 16
    assert line["spy/coverage"] == mask.float().mean().item()
    assert line["spy/invalid"] == 0
    assert line["spy/index"] == pytest.approx(draw.index[mask].float().mean().item())
    assert (line["spy/constant"], line["spy/weight"]) == (2.0, 1.0)
    assert line["loss/spy"] == pytest.approx(draw.x0[mask].square().sum(1).mean().item())

    by_hand = trainer(prepared(DoubleToy), batch=16, dmd_weight=0.0)
    expected = gradient(by_hand, lambda x0, _: x0[mask].square().sum(1).mean())
    assert_same(before - flat(state(running)), expected, 1e-7)


def test_a_batch_without_a_declared_step_is_plain_matching() -> None:
    running = trainer(batch=1, objectives=[ReFL(steps="last")], rewards=Plain(), steps=4)
    plain = trainer(batch=1, steps=4)
    assert running.rollouts.pick(running.rollouts.whole(running.context(0)), running.context(0)).index.tolist() != [3]
    running = trainer(batch=1, objectives=[ReFL(steps="last")], rewards=Plain(), steps=4)
    line = running.train_step()
    plain.train_step()
    assert_equal(state(running), state(plain))
    assert (line["refl/coverage"], line["loss/refl"]) == (0, 0)


def test_log_lines_hold_numbers_only() -> None:
    """JSON knows no NaN: a metric without a sample is better left out."""
    running = trainer(batch=1, objectives=[ReFL(steps="last")], rewards=Plain(), steps=4)
    line = running.train_step()
    assert [name for name, value in line.items() if math.isnan(value)] == []


def test_several_updates_of_one_rollout_answer_anew() -> None:
    spy = Spy(Needs(updates_per_rollout=3))
    running = trainer(prepared(DoubleToy), micro_batch=5, objectives=[spy], rewards=Redness(), optimize=descend_slowly)
    answers: list[Tensor] = []
    student = running.backend.student

    class Recording(DMD):
        def direction(self, draw: Draw, *args: Any) -> Any:
            answers.append(student(draw.x_t, draw.t, draw.cond).x0.detach())
            torch.testing.assert_close(answers[-1], draw.x0, rtol=0, atol=1e-7)
            return super().direction(draw, *args)

    running.matching = Recording()
    running.train_step()
    assert [draw.iteration for draw in spy.draws] == [0, 0, 1, 1, 2, 2]
    assert (spy.updates, running.step, running.prompts.consumed) == (1, 1, 1)
    assert not torch.equal(answers[0], answers[2])
    first, second = spy.draws[0], spy.draws[4]
    assert torch.equal(first.x_t, second.x_t)
    assert torch.equal(first.rollout.x0, second.rollout.x0)
    assert not torch.equal(first.x0, second.x0)


def descend_slowly(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize("all_valid", [True, False])
def test_objective_may_reach_the_students_parameters(all_valid: bool) -> None:
    """The loss is the mean over the samples that count, whichever way its gradient takes."""
    policy = Policy(all_valid=all_valid)
    found = step_of(trainer(prepared(DoubleToy), micro_batch=3, objectives=[policy], rewards=Redness(), dmd_weight=0.0))
    by_hand = trainer(prepared(DoubleToy), dmd_weight=0.0)
    _, draw = prepare_step(by_hand)
    value = by_hand.backend.student(draw.x_t, draw.t, draw.cond).value.square().sum(1)
    loss = value.mean() if all_valid else value[1::2].mean()
    grads = torch.autograd.grad(loss, list(by_hand.student.parameters.values()))
    assert_same(-found, torch.cat([grad.flatten() for grad in grads]), 1e-10)


def test_objective_is_set_up_once_before_it_is_asked() -> None:
    @dataclass
    class Prepared(Spy):
        asked_when_set_up: list[int] = field(default_factory=list)

        def setup(self, ctx: Any) -> None:
            self.asked_when_set_up.append(len(self.draws))

    objective = Prepared()
    running = trainer(objectives=[objective], rewards=Redness())
    for _ in range(2):
        running.train_step()
    assert objective.asked_when_set_up == [0]
    assert len(objective.draws) == 2


def test_an_objective_that_only_watches_is_plain_matching() -> None:
    """It says so by a gradient of zero; a loss without a graph is refused, as one that was detached by mistake."""

    @dataclass
    class Monitor:
        needs: Needs = field(default_factory=Needs)

        def __call__(self, draw: Draw, ctx: Any) -> Term:
            return Term(torch.ones(len(draw)), grad=torch.zeros_like(draw.leaf))

    running = trainer(objectives=[Monitor()], rewards=Redness())
    assert running.train_step()["loss/monitor"] == 1.0
    assert_equal(state(running), state(trainer_after_one_step()))


def test_a_reward_that_is_missing_is_named() -> None:
    running = trainer(sample_weight=RewardTilt(1.5))
    with pytest.raises(TrainingError, match="a reward was asked for, but the run has none; pass --reward"):
        running.train_step()
    assert running.reward_metrics() == {}


def test_reward_metrics_are_those_of_the_finished_images() -> None:
    rewards = Rewards({"plain": (0.5, Plain({"mode 3": math.nan})), "constant": (-2.0, Constant(0.25))})
    running = trainer(prepared(), objectives=[ReFL()], rewards=rewards, micro_batch=3)
    assert running.reward_metrics() == {}
    running.train_step(noted=True)
    assert running.last_context is not None
    assert running.last_context.rollout is not None
    final, prompts = running.last_context.rollout.final, running.last_context.rollout.cond.prompts
    kept = torch.tensor([prompt != "mode 3" for prompt in prompts])
    plain = Plain()(prepared().decode(final), prompts)[kept].mean().item()
    assert running.reward_metrics() == pytest.approx(
        {
            "reward/plain": plain,
            "reward/constant": 0.25,
            "reward_weighted/plain": 0.5 * plain,
            "reward_weighted/constant": -0.5,
            "reward/total": 0.5 * plain - 0.5,
            "unscored/plain": 4,  # by ReFL, and now
            "unscored/constant": 0,
        },
        rel=1e-5,
    )


def test_needs_of_a_sum_are_their_union() -> None:
    terms = [
        WeightedObjective("a", 1.0, Spy(Needs(log_prob=True, roles=("reference",)))),
        WeightedObjective("b", 1.0, Spy(Needs(updates_per_rollout=2))),
        WeightedObjective("c", 1.0, Spy(Needs(roles=("reference",)))),
    ]
    assert combined_needs(terms) == Needs(log_prob=True, roles=("reference",), updates_per_rollout=2)
    assert combined_needs([]) == Needs(finished=False)


# --- ReFL -------------------------------------------------------------------------------------------------------------


def answer(objective: ReFL, rewards: Any = None) -> tuple[Term, Draw]:
    running = trainer(batch=16, objectives=[objective], rewards=rewards or Plain())
    ctx, draw = prepare_step(running)
    draw = replace(draw, leaf=draw.x0.detach().requires_grad_())
    return objective(draw, ctx), draw


def test_refl_is_the_negative_weighted_reward() -> None:
    rewards = Rewards({"plain": (0.5, Plain()), "redness": (3.0, Redness())})
    term, draw = answer(ReFL(), rewards)
    images = prepared().decode(draw.x0)
    expected = 0.5 * Plain()(images, draw.cond.prompts) + 3 * Redness()(images, draw.cond.prompts)
    torch.testing.assert_close(term.loss, -expected)
    torch.testing.assert_close(term.metrics["score"], expected)
    assert term.valid is not None
    assert term.valid.all()
    assert term.grad is None


def test_refl_hinge_silences_what_is_good_enough() -> None:
    rewards = Rewards({"plain": (0.5, Plain())})
    term, draw = answer(ReFL(hinge=0.8), rewards)
    score = Plain()(prepared().decode(draw.x0), draw.cond.prompts)
    active = score < 0.8
    assert 0 < active.sum() < 16
    torch.testing.assert_close(term.loss, 0.5 * (0.8 - score).relu())
    torch.testing.assert_close(term.metrics["hinge_active"], active.float())
    torch.testing.assert_close(term.metrics["score"], 0.5 * score)
    assert draw.leaf is not None
    (grad,) = torch.autograd.grad(term.loss.sum(), draw.leaf)
    (plain,) = torch.autograd.grad(answer(ReFL(), rewards)[0].loss.sum(), draw.leaf, allow_unused=True)
    assert torch.equal(grad[~active], torch.zeros_like(grad[~active]))
    assert (grad[active].abs().sum(1) > 0).all()
    assert plain is None


def test_refl_steps() -> None:
    assert ReFL().needs == Needs(reward_grad=True, finished=False)
    assert ReFL(steps="last").needs.steps == "last"
    assert ReFL(steps="2").needs.steps == (2,)
    for wrong in ("first", "-1", "", "1.5"):
        with pytest.raises(ValueError, match=f"refl: steps must be 'any', 'last' or a step index, not '{wrong}'"):
            ReFL(steps=wrong)


def test_refl_climbs() -> None:
    """Redness alone drives every mode to the right."""
    running = trainer(prepared(), objectives=[ReFL()], rewards=Redness(), dmd_weight=0.0, optimize=adam, steps=1)
    before = running.train_step()["refl/score"]
    for _ in range(30):
        line = running.train_step()
    assert line["refl/score"] > before + 0.05


# --- Memory -----------------------------------------------------------------------------------------------------------


class Bulky(ToyBackend):
    """A decoder about as large as the student."""

    def prepare(self, accelerator: Any, *, roles: Any) -> None:
        super().prepare(accelerator, roles=roles)
        self.residuals = {role: Residual(512) for role in self.residuals}
        wide = [nn.Linear(2, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 2)]
        self.decoder = nn.Sequential(*wide).requires_grad_(False)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(self.decoder(latents))


@pytest.mark.parametrize("balances", [False, True])
@pytest.mark.parametrize("micro_batch", [32, 8])
def test_graphs_of_reward_and_student_are_never_alive_together(balances: bool, micro_batch: int) -> None:
    backend = prepared(Bulky)
    settings: dict[str, Any] = {"objectives": [ReFL()], "rewards": Plain(), "balances": balances}
    running = trainer(backend, batch=32, micro_batch=micro_batch, **settings)
    _, draw = prepare_step(running)
    part = next(draw.split(micro_batch))
    with Meter(backend) as decode:
        leaf = part.x0.detach().requires_grad_()
        score = Plain()(backend.decode(leaf), part.cond.prompts)
    with Meter(backend) as student:
        prediction = backend.student(part.x_t, part.t, part.cond)
    assert score.requires_grad
    assert prediction.x0.requires_grad
    larger, smaller = sorted([decode.peak, student.peak], reverse=True)
    assert smaller > larger / 2 > 0  # together they would be at least 1.5 times the larger
    with Meter(backend) as whole:
        running.train_step()
    assert larger <= whole.peak <= 1.1 * larger
    assert whole.alive == 0


# --- Learning ---------------------------------------------------------------------------------------------------------


def spread(backend: ToyBackend, sampler: FewStepSampler) -> tuple[float, Tensor]:
    """Largest error of a mode's mean, and the standard deviations of the modes, [8], over the answers of all steps."""
    cond = backend.encode([PROMPTS[k % 4] for k in range(2000)])
    noise = torch.randn(sampler.num_inference_steps, 2000, 2, generator=torch.Generator().manual_seed(7))
    answers = sampler.rollout(backend.student, noise, cond).x0.unflatten(1, (500, 4)).flatten(0, 1)
    return (answers.mean(0) - CENTRES).abs().max().item(), answers.std(0).flatten()


@pytest.mark.parametrize(("steps", "before"), [(1, 0.0), (4, 0.09)])
def test_the_student_learns_the_teachers_distribution(steps: int, before: float) -> None:
    """Undistilled, a few steps end at the modes' centres, their spread lost; 250 updates bring it back.

    What is matched are the student's answers, drawn evenly from its steps.
    """

    def quick(rate: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.AdamW(parameters, lr=rate, betas=(0.5, 0.99), weight_decay=0.0)

    backend = ToyBackend("", ToyOptions(seed=0))
    backend.prepare(cpu(), roles=("student", "fake_score"))
    running = trainer(
        backend,
        batch=64,
        steps=steps,
        fake_updates=2,
        optimize=quick(2e-3),
        fake_optimize=quick(1e-2),
        fake_mix=DynaDG(0.25, 50),
        renoise=DynaRS(4, 1.5, 50),
    )
    _, std = spread(backend, running.sampler)
    assert std.mean().item() == pytest.approx(before, abs=0.01)
    train(running, 250)
    error, std = spread(backend, running.sampler)
    assert error < 0.15
    assert std.mean().item() == pytest.approx(STD, abs=0.08)
    assert (std - STD).abs().max() < 0.2


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (lambda d: Term(d.leaf.sum()), r"Term.loss must be one loss per sample, \[8\] float32 or float64, not \[\] "),
        (lambda d: Term(d.leaf.sum(1).bfloat16()), r"Term.loss .*, not \[8\] torch.bfloat16"),
        (lambda d: Term(d.leaf), r"Term.loss .*, not \[8, 2\]"),
        (lambda d: Term(d.leaf.sum(1), valid=torch.ones(16)), r"Term.valid must be \[8\] bool, or None for all, not"),
        (lambda d: Term(d.leaf.sum(1), metrics={"a": "b"}), r"the metric 'a' must be a number or \[8\], not str"),
        (
            lambda d: Term(d.leaf.sum(1).detach()),
            "objective 'odd' trains nothing: its loss has no graph; is there a detach?",
        ),
        (
            lambda d: Term(d.leaf.sum(1), metrics={"weight": 1.0}),
            "objective 'odd': the run logs 'weight' of every objective",
        ),
        (lambda d: None, "objective 'odd': it must return a Term, or yield several, but returned None"),
        (
            lambda d: iter(()),
            "objective 'odd': it yielded no Term; if nothing can be learned, yield one Term without valid samples",
        ),
        (
            lambda d: Term(d.leaf.sum(1), metrics={"margin": 1.0} if d.sample[0] else {}),
            "objective 'odd': the metric 'margin' is missing in a micro-batch: return it in every one",
        ),
    ],
)
def test_a_term_of_another_form_stops_the_run(term: Any, said: str) -> None:
    """And is not broadcast, cast or lost."""

    class Odd:
        needs = Needs()

        def __call__(self, draw: Draw, ctx: Any) -> Any:
            return term(draw)

    trainer = toy_trainer(WeightedObjective("odd", 1.0, Odd()), batch_size=16, micro_batch_size=8)
    with pytest.raises(TrainingError, match=said):
        trainer.train_step()


@pytest.mark.parametrize("quiet", [[0], [0, 1]])
def test_a_part_of_the_batch_may_have_nothing_to_learn(quiet: list[int]) -> None:
    """Where all images of a prompt are equally good, say, an objective may leave out its passes."""

    class Quiet:
        needs = Needs()

        def __call__(self, draw: Draw, ctx: Any) -> Term:
            assert draw.leaf is not None
            return Term(torch.zeros(8) if draw.sample[0].item() // 8 in quiet else draw.leaf.sum(1))

    objective = WeightedObjective("quiet", 1.0, Quiet())
    trainer = toy_trainer(objective, batch_size=16, micro_batch_size=8, dmd_weight=0.0)
    assert (trainer.train_step()["grad_norm/student"] > 0) == (quiet == [0])


def test_an_objective_does_not_train_the_fake_score() -> None:
    """Its gradient would be added to the fake score's own, in the next step."""

    class Odd:
        needs = Needs()

        def __call__(self, draw: Draw, ctx: Any) -> Term:
            answer = ctx.backend.fake_score(draw.x_t, draw.t, draw.cond)
            return Term(((answer.x0 - draw.leaf) ** 2).sum(1))

    trainer = toy_trainer(WeightedObjective("odd", 1.0, Odd()), batch_size=16)
    with pytest.raises(TrainingError, match="objective 'odd' reaches the fake score's parameters"):
        trainer.train_step()
