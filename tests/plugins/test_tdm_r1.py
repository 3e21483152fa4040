"""TDM-R1: the losses of surrogate and student in closed form, what stops a sample, and where it moves the student."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr.backends.toy import ToyBackend
from dmdr.errors import ConfigError
from dmdr.groups import advantages
from dmdr.testing import check_objective
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Term
from dmdr_tdm_r1 import TDMR1, noised, preference, towards
from toy_trainer import Constant, DoubleToy, EpsToy, Plain, adam, at_rest, flat, prepared, state, trainer


def running(objective: TDMR1, backend: Any = None, **settings: Any) -> Trainer:
    settings = {"batch": 16, "group_size": 4, "rewards": Plain(), "dmd_weight": 0.0} | settings
    return trainer(backend or prepared(DoubleToy), objectives=[objective], **settings)


def moved(toy: Trainer, size: float = 0.1) -> Trainer:
    """With a surrogate that differs from the teacher."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in toy.learners["surrogate"].parameters.values():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return toy


def ask(objective: TDMR1, toy: Trainer) -> tuple[Term, Term, Draw, Any]:
    """Both terms of the first draw of four groups of four."""
    ctx = toy.context(0)
    draw = toy.rollouts.pick(toy.rollouts.whole(ctx), ctx)
    surrogate, student = objective(draw, ctx)
    return surrogate, student, draw, ctx


def error(prediction: Any, at: Any) -> Tensor:
    """Of the velocity eps - x0, by hand, [B]."""
    return (prediction.value - (at.eps - at.x0)).square().flatten(1).mean(1)


# --- The surrogate ----------------------------------------------------------------------------------------------------


def test_preference_by_hand() -> None:
    """ln(1 + exp(beta m)) / beta of the mean m over a group's valid samples."""
    gap = torch.tensor([0.1, -0.3, math.nan, 0.5, 0.2], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    valid, group = torch.tensor([True, True, False, True, True]), torch.tensor([3, 3, 3, 8, 8])
    found = preference(gap, advantage, group, valid, 10.0)
    first, second = (math.log1p(math.exp(10 * m)) / 10 for m in ((0.1 + 0.3) / 2, (1.0 + 0.0) / 2))
    assert found.tolist() == pytest.approx([first, first, first, second, second], rel=1e-12)


@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_gradient_of_the_surrogate_is_the_published_one(beta: float) -> None:
    """mean(sigmoid(sum(A beta (e - e_R) / k)) A e) with the weight held fixed, and the pull to the teacher."""
    objective = TDMR1(beta=beta, reference_weight=0.3, limit=1e9)
    toy = moved(running(objective))
    term, _, draw, ctx = ask(objective, toy)
    at = noised("tdm_r1/image", replace(draw, x0=draw.rollout.final), ctx)
    assert torch.equal(at.x0, draw.rollout.final) and len(at.t.unique()) == 16
    e = error(toy.backend.ask_role(at.x_t, at.t, draw.cond, role="surrogate"), at)
    r = error(toy.backend.teacher(at.x_t, at.t, draw.cond), at)
    a, valid = advantages(*ctx.global_scores()[:1], {"toy": 1.0}, draw.group)
    assert valid.all() and term.valid is not None and term.valid.all() and term.trains == "surrogate"
    logit = (a * beta * (e - r).detach() / 4).view(4, 4).sum(1).repeat_interleave(4)
    by_hand = (logit.sigmoid() * a * e).mean() + 0.3 * ((e - r) ** 2).mean()
    parameters = list(toy.learners["surrogate"].parameters.values())
    expected = torch.autograd.grad(by_hand, parameters)
    found = torch.autograd.grad(term.loss.mean(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(term.loss.detach(), (F.softplus(logit) / beta + 0.3 * (e - r) ** 2).detach())


@pytest.mark.parametrize(
    ("advantage", "moved_by", "stops"),
    [(1.0, -0.3, 1), (1.0, -0.2, 0), (1.0, 0.3, 0), (-1.0, 0.3, 1), (-1.0, -0.3, 0), (0.0, -0.3, 0)],
)
def test_what_stops_a_sample(monkeypatch: pytest.MonkeyPatch, advantage: float, moved_by: float, stops: int) -> None:
    """An error further from the teacher's than the root of 0.05, where the advantage wants it."""
    answers = iter([torch.full((16,), 1.0 + moved_by, requires_grad=True), torch.ones(16)])
    monkeypatch.setattr("dmdr_tdm_r1.denoising_error", lambda prediction, at: next(answers))
    found = torch.full((16,), advantage), torch.ones(16, dtype=torch.bool)
    monkeypatch.setattr("dmdr_tdm_r1.advantages", lambda *given: found)
    objective = TDMR1(limit=0.05)
    term, _, _, _ = ask(objective, running(objective))
    assert torch.equal(term.metrics["stopped"], torch.full((16,), float(stops)))


def test_a_stopped_sample_keeps_its_say_and_gives_no_gradient() -> None:
    losses, grads = [], []
    for limit in (1e9, 1e-9):
        objective = TDMR1(limit=limit, reference_weight=0.0)
        toy = moved(running(objective), 0.3)
        term, _, draw, ctx = ask(objective, toy)
        stops = term.metrics["stopped"]
        losses.append(term.loss)
        grads.append(torch.autograd.grad(term.loss.sum(), list(toy.learners["surrogate"].parameters.values())))
    assert isinstance(stops, Tensor) and 0 < stops.sum() < len(stops)
    torch.testing.assert_close(*losses)
    at = noised("tdm_r1/image", replace(draw, x0=draw.rollout.final), ctx)
    e = error(toy.backend.ask_role(at.x_t, at.t, draw.cond, role="surrogate"), at)
    a, _ = advantages(*ctx.global_scores()[:1], {"toy": 1.0}, draw.group)
    sharpness = 1 - (-10.0 * losses[0].detach()).exp()  # sigmoid(z) of softplus(z)
    left_out = (stops * sharpness * a * e).sum()
    missing = torch.autograd.grad(left_out, list(toy.learners["surrogate"].parameters.values()))
    for whole, part, other in zip(*grads, missing, strict=True):
        torch.testing.assert_close(whole - part, other, rtol=1e-8, atol=1e-12)


# --- The student ------------------------------------------------------------------------------------------------------


def test_direction_by_hand() -> None:
    x0, teacher, surrogate = (torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 3.0]]))
    torch.testing.assert_close(towards(x0, teacher, surrogate), torch.tensor([[-3.0, -1.0]]) / 1.5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_gradient_of_the_student_by_hand(guidance: float) -> None:
    """Both answers are guided; nothing but draw.leaf is reached."""
    objective = TDMR1(limit=1e9)
    toy = moved(running(objective, guidance=(guidance, guidance)))
    _, term, draw, ctx = ask(objective, toy)
    at = noised("tdm_r1/answer", draw, ctx)
    exact = toy.backend._exact(at.x_t, at.t, draw.cond, guidance)
    residual = toy.backend.residuals["surrogate"](at.x_t, at.t, draw.cond.tensors["label"]).detach()
    teacher = at.x_t - exact * at.t[:, None]
    surrogate = teacher - residual * at.t[:, None]
    expected = (teacher - surrogate) / (draw.x0 - surrogate).abs().mean(1, keepdim=True) / 2
    assert term.grad is not None and term.trains is None and not term.loss.requires_grad
    torch.testing.assert_close(term.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cls", [ToyBackend, EpsToy])
def test_a_surrogate_that_is_the_teacher_moves_nothing(cls: type[ToyBackend]) -> None:
    objective = TDMR1()
    _, term, _, _ = ask(objective, running(objective, at_rest(cls)))
    assert term.grad is not None and not term.grad.any()


def test_equal_rewards_teach_nothing() -> None:
    objective = TDMR1()
    toy = running(objective, at_rest(), rewards=Constant(), optimize=adam)
    before = flat(state(toy)).clone()
    for _ in range(2):
        toy.train_step()
    assert torch.equal(flat(state(toy)), before)


def test_it_moves_the_student_to_better_images() -> None:
    """Beside DMD, which pulls to the teacher; the reward has no gradient."""
    objective = TDMR1()
    toy = running(objective, at_rest(), batch=32, dmd_weight=1.0, optimize=adam)
    lines = [toy.train_step(noted=True) for _ in range(60)]
    first, last = (sum(line["reward/total"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert last > first + 0.02, (first, last)


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_contract() -> None:
    check_objective(TDMR1)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("beta", 0.0, "above 0"),
        ("limit", math.inf, "above 0"),
        ("surrogate_learning_rate", -1.0, "above 0"),
        ("surrogate_alpha", math.nan, "above 0"),
        ("reference_weight", -1.0, "at least 0"),
        ("surrogate_rank", 0, "at least 1"),
    ],
)
def test_a_value_that_cannot_be_meant(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^tdm_r1: {name} must be {said}, not"):
        TDMR1(**{name: value})


def test_a_family_that_adds_no_roles_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rl tdm_r1: object cannot train a further role, the surrogate"):
        TDMR1().learners(object(), torch.device("cpu"))  # type: ignore[arg-type]
