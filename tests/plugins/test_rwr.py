"""Reward-weighted regression: its weights and gradient in closed form, and where it moves the student."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr.backends.toy import ToyBackend
from dmdr.errors import ConfigError
from dmdr.matching import renoised_to_grid
from dmdr.run.job import assemble
from dmdr.settings.parse import parse
from dmdr.testing import check_objective
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Term
from dmdr_rwr import RWR, regression_weights
from toy_trainer import Constant, DoubleToy, EpsToy, Plain, at_rest, flat, prepared, state, steadily, step_of, trainer

NAN = math.nan


def running(objective: RWR, backend: Any = None, **settings: Any) -> Trainer:
    settings = {"batch": 16, "group_size": 4, "rewards": Plain(), "dmd_weight": 0.0} | settings
    return trainer(backend or prepared(DoubleToy), objectives=[objective], **settings)


def ask(objective: RWR, toy: Trainer) -> tuple[Term, Draw, Any]:
    """The objective's answer to the first draw."""
    ctx = toy.context(0)
    draw = toy.rollouts.pick(toy.rollouts.whole(ctx), ctx)
    return objective(draw, ctx), draw, ctx


# --- Closed forms -----------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    logits = torch.tensor([0.0, math.log(3), 7.0, 1.0, 1.0, 5.0], dtype=torch.float64)
    group, valid = torch.tensor([4, 4, 4, 9, 9, 2]), torch.tensor([True, True, False, True, True, False])
    assert regression_weights(logits, group, valid).tolist() == pytest.approx([0.5, 1.5, 0.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize("group_size", [4, 1])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_loss_and_gradient_by_hand(group_size: int, temperature: float) -> None:
    """Within the groups, or over the batch where every image is of a prompt of its own."""
    backend, objective = prepared(DoubleToy), RWR(temperature)
    term, draw, ctx = ask(objective, running(objective, backend, group_size=group_size))
    assert term.valid is not None and term.valid.all()
    size = group_size if group_size > 1 else 16
    score = ctx.scores(draw.rollout)["toy"].double().view(-1, size)
    deviation = score - score.mean(1, keepdim=True)
    advantage = deviation / ((score - score.mean()).square().mean().sqrt() + 1e-4)
    advantage = advantage / (advantage.square().mean().sqrt() + 1e-4)
    weight = (advantage / temperature).exp()
    weight = (weight / weight.mean(1, keepdim=True)).flatten()
    at = renoised_to_grid(draw.rollout.final, "rwr", draw, ctx, start=draw.rollout.x_t[0])
    assert set(at.t.tolist()) <= set(ctx.sampler.t[:-1].tolist())
    error = (backend.student(at.x_t, at.t, draw.cond).x0 - draw.rollout.final).square().mean(1)
    torch.testing.assert_close(term.loss, weight * error, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(term.metrics["error"], error)
    torch.testing.assert_close(term.metrics["weight_deviation"], (weight - 1).abs(), rtol=1e-6, atol=1e-7)


def test_gradient_against_finite_differences() -> None:
    backend, objective = prepared(DoubleToy), RWR()
    toy = running(objective, backend)
    term, draw, ctx = ask(objective, toy)
    parameters = list(toy.student.parameters.values())
    grads = torch.autograd.grad(term.loss.sum(), parameters)
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    slope = sum((g * a).sum() for g, a in zip(grads, along, strict=True))

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, a in zip(parameters, along, strict=True):
                parameter += step * a
            loss = objective(draw, ctx).loss.sum()
            for parameter, a in zip(parameters, along, strict=True):
                parameter -= step * a
        return loss

    torch.testing.assert_close((moved(1e-5) - moved(-1e-5)) / 2e-5, torch.as_tensor(slope), rtol=1e-6, atol=1e-8)


def test_equal_rewards_are_plain_regression() -> None:
    term, _, _ = ask(RWR(), running(RWR(), rewards=Constant()))
    assert torch.equal(term.loss, term.metrics["error"])


def test_a_high_temperature_is_plain_regression_and_a_low_one_keeps_the_best() -> None:
    (even, draw, ctx), (best, _, _) = (ask(RWR(t), running(RWR(t))) for t in (1e6, 1e-3))
    torch.testing.assert_close(even.loss, even.metrics["error"], rtol=1e-4, atol=0)  # type: ignore[arg-type]
    score = ctx.scores(draw.rollout)["toy"].view(4, 4)
    kept = (best.loss.view(4, 4) > 1e-12).int()
    assert torch.equal(kept.argmax(1), score.argmax(1)) and kept.sum() == 4


# --- What does not count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group_size", "invalid"), [(4, 4), (1, 4)])
def test_what_is_not_finite_is_dropped_and_counted(group_size: int, invalid: int) -> None:
    line = running(RWR(), rewards=Plain({"mode 1": NAN}), group_size=group_size).train_step()
    assert line["rwr/invalid"] == invalid
    assert line["rwr/coverage"] == 1 - invalid / 16
    assert 0 < line["grad_norm/student"] < math.inf


@pytest.mark.parametrize(("group_size", "micro_batch"), [(4, 4), (1, 3), (1, 1)])
def test_a_step_does_not_depend_on_the_micro_batches(group_size: int, micro_batch: int) -> None:
    whole, parts = (
        step_of(running(RWR(), rewards=Plain({"mode 1": NAN}), group_size=group_size, micro_batch=size))
        for size in (16, micro_batch)
    )
    assert whole.norm() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


def test_keeps_the_contract_of_objectives() -> None:
    check_objective(RWR)
    check_objective(lambda: RWR(0.2))


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dmd_weight", [0.0, 1.0])
@pytest.mark.parametrize("cls", [ToyBackend, EpsToy])
def test_climbs_a_reward_without_gradient(cls: type[ToyBackend], dmd_weight: float) -> None:
    """Above its start, and above what regression without weights makes of it."""

    def rewards(temperature: float) -> Tensor:
        toy = running(
            RWR(temperature),
            at_rest(cls),
            batch=32,
            group_size=8,
            optimize=steadily,
            rl_weight=30.0,
            dmd_weight=dmd_weight,
        )
        return torch.tensor([(toy.train_step(), toy.reward_metrics()["reward/total"])[1] for _ in range(40)])

    found = rewards(0.3)
    assert found[-8:].mean() > found[:3].mean() + 0.005
    assert found[-8:].mean() > rewards(1e6)[-8:].mean() + 0.005


def test_a_one_step_student_keeps_its_spread() -> None:
    """On its own noise its images have no error; on other noise it would learn their mean."""
    toy = running(RWR(1e6), prepared(), steps=1, dmd_weight=0.0, optimize=steadily, rl_weight=30.0)
    before = flat(state(toy))
    for _ in range(3):
        toy.train_step()
    assert torch.allclose(flat(state(toy)), before)
    settings = {"model": "toy", "rl": "rwr", "reward": "toy", "num_inference_steps": 1}
    with pytest.raises(ConfigError, match="--rl rwr needs --num_inference_steps of at least 2"):
        assemble(parse(settings=settings))


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, math.inf])
def test_refuses(temperature: float) -> None:
    with pytest.raises(ConfigError, match=f"rwr: temperature must be above 0, not {temperature}"):
        RWR(temperature)


def test_refuses_a_batch_of_one() -> None:
    """In which nothing could be compared, so that nothing would be trained; of several processes one each will do."""
    settings = {"model": "toy", "rl": "rwr", "reward": "toy", "per_device_train_batch_size": 1}
    with pytest.raises(ConfigError, match=r"--rl rwr compares the images of a batch: it needs .* of at least 2 in all"):
        assemble(parse(settings=settings))
    assemble(parse(settings=settings | {"gradient_accumulation_steps": 2}))
    assemble(parse(settings=settings), processes=2)
