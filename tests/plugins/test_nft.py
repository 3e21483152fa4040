"""DiffusionNFT: its closed forms, the old policy and its exact resume, and where it moves the student."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr.backends.toy import ToyBackend
from dmdr.errors import ConfigError
from dmdr.matching import renoised_to_grid
from dmdr.paths import Prediction
from dmdr.testing import check_objective
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Term
from dmdr_grpo import GRPO
from dmdr_nft import DiffusionNFT, mixtures, optimality
from toy_trainer import (
    Constant,
    DoubleToy,
    EpsToy,
    Plain,
    adam,
    at_rest,
    flat,
    prepared,
    state,
    steadily,
    step_of,
    trainer,
)

ROLES = ("student", "fake_score", "reference")
ON_POLICY: dict[str, Any] = {"old_decay": 0.0}


class Watched(DoubleToy):
    """Adds `nudge` to what the student is asked with a graph."""

    nudge: Tensor | float = 0.0

    def student(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        prediction = super().student(x_t, t, cond)
        if torch.is_grad_enabled():
            return replace(prediction, value=prediction.x0 + self.nudge, kind="x0")
        return prediction


def running(objective: DiffusionNFT, backend: Any = None, **settings: Any) -> Trainer:
    settings = {"batch": 16, "group_size": 4, "rewards": Plain(), "dmd_weight": 0.0} | settings
    return trainer(backend or prepared(DoubleToy), objectives=[objective], **settings)


def ask(objective: DiffusionNFT, toy: Trainer) -> tuple[Term, Draw, Any]:
    """The objective's answer to the first draw of four groups of four."""
    ctx = toy.context(0)
    draw = toy.rollouts.pick(toy.rollouts.whole(ctx), ctx)
    objective.setup(ctx)
    return objective(draw, ctx), draw, ctx


# --- Closed forms -----------------------------------------------------------------------------------------------------


def test_optimality() -> None:
    found = optimality(torch.tensor([-9.0, -5.0, -1.0, 0.0, 1.0, 5.0, 9.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.4, 0.5, 0.6, 1.0, 1.0], abs=1e-15)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_both_policies_are_the_old_one_where_the_student_is(beta: float) -> None:
    old = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for policy in mixtures(old, old, beta):
        torch.testing.assert_close(policy, old, rtol=0, atol=1e-15)
    positive, negative = mixtures(old + 1, old, beta)
    torch.testing.assert_close(positive - old, torch.full_like(old, beta))
    torch.testing.assert_close(negative - old, torch.full_like(old, -beta))


@pytest.mark.parametrize("kind", ["velocity", "v", "eps"])
def test_mixtures_of_clean_images_are_those_of_outputs(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x_t, student, old = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    path, t = EpsToy("", prepared().options).path, torch.linspace(0.1, 0.9, 6, dtype=torch.float64)

    def clean(value: Tensor) -> Tensor:
        return Prediction(value, kind, x_t, t, path).x0

    for of_clean, of_outputs in zip(
        mixtures(clean(student), clean(old), 0.3), mixtures(student, old, 0.3), strict=True
    ):
        torch.testing.assert_close(of_clean, clean(of_outputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nudge", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_and_gradient_by_hand(beta: float, nudge: float) -> None:
    """At the old policy A / 5 times the normalised denoising error; else that of the two branches."""
    backend, objective = prepared(Watched), DiffusionNFT(beta=beta)
    offset = nudge * torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    backend.nudge = offset.requires_grad_()
    term, draw, ctx = ask(objective, running(objective, backend))
    (grad,) = torch.autograd.grad(term.loss.sum(), backend.nudge)

    score = ctx.scores(draw.rollout)["toy"].double().view(4, 4)
    deviation = (score - score.mean(1, keepdim=True)).flatten()
    advantage = deviation / ((score - score.mean()).square().mean().sqrt() + 1e-4)
    advantage = advantage / (advantage.square().mean().sqrt() + 1e-4)
    r, x = advantage[:, None] / 10 + 0.5, draw.rollout.final
    at = renoised_to_grid(x, "nft", draw, ctx, start=draw.rollout.x_t[0])
    with torch.no_grad():
        old = backend.student(at.x_t, at.t, draw.cond).x0
    up, down = old + beta * offset - x, old - beta * offset - x
    sizes = [error.abs().mean(1, keepdim=True) for error in (up, down)]
    expected = r * up / sizes[0] - (1 - r) * down / sizes[1]  # 2 / D is one
    torch.testing.assert_close(grad, expected.detach(), rtol=1e-6, atol=1e-7)
    if not nudge:
        torch.testing.assert_close(grad, (advantage[:, None] / 5 * (old - x) / sizes[0]).detach(), rtol=1e-5, atol=1e-6)
    loss = (r * (up**2).mean(1, True) / sizes[0] + (1 - r) * (down**2).mean(1, True) / sizes[1]) / beta
    torch.testing.assert_close(term.loss, loss.flatten(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(term.metrics["optimality"], r.flatten(), rtol=1e-6, atol=1e-7)


def test_images_are_noised_to_the_students_own_times() -> None:
    toy = running(DiffusionNFT(), batch=64)
    _, draw, ctx = ask(DiffusionNFT(), toy)
    at = renoised_to_grid(draw.rollout.final, "nft", draw, ctx, start=draw.rollout.x_t[0])
    assert torch.equal(at.t.unique(), ctx.sampler.t[:-1].flip(0))
    t = at.t[:, None]
    eps = ctx.random.normal("nft/eps", draw.sample, (2,)).double()
    eps = torch.where(t == 1, draw.rollout.x_t[0].double(), eps)  # its own noise
    torch.testing.assert_close(at.x_t, (1 - t) * draw.rollout.final + t * eps, rtol=0, atol=1e-12)


def test_kl_is_the_distance_to_the_stage_1_student() -> None:
    assert DiffusionNFT().needs.roles == ()
    assert DiffusionNFT(kl_beta=0.5).needs.roles == ("reference",)
    backend = prepared(DoubleToy, roles=ROLES)
    with_kl, without = DiffusionNFT(kl_beta=0.5), DiffusionNFT()
    term, draw, ctx = ask(with_kl, running(with_kl, backend))
    at = renoised_to_grid(draw.rollout.final, "nft", draw, ctx, start=draw.rollout.x_t[0])
    with torch.no_grad():
        student, reference = (of(at.x_t, at.t, draw.cond).x0 for of in (backend.student, backend.reference))
    kl = (student - reference).square().mean(1)
    torch.testing.assert_close(term.metrics["kl"], kl)
    term.loss.sum().backward()
    assert all(p.grad is None for p in backend.parameters("reference").values())
    without.setup(ctx)
    torch.testing.assert_close(term.loss - without(draw, ctx).loss, 0.5 * kl)


# --- What does not count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, ON_POLICY])
def test_equal_rewards_move_nothing(options: dict[str, Any]) -> None:
    """r = 1/2 in every group: what is learnt is unlearnt, to the last bit but rounding."""
    toy = running(DiffusionNFT(**options), rewards=Constant())
    assert step_of(toy).norm() < 1e-12


def test_what_is_not_finite_is_dropped_and_counted() -> None:
    toy = running(DiffusionNFT(), rewards=Plain({"mode 1": math.nan, "mode 2": math.inf}))
    line = toy.train_step()
    assert line["diffusionnft/coverage"] == 0.5
    assert line["diffusionnft/invalid"] == 8
    assert 0 < line["grad_norm/student"] < math.inf


@pytest.mark.parametrize("options", [{"kl_beta": 0.3}, {"kl_beta": 0.3, **ON_POLICY}])
def test_a_step_does_not_depend_on_the_micro_batches(options: dict[str, Any]) -> None:
    whole, parts = (
        step_of(
            running(
                DiffusionNFT(**options),
                prepared(DoubleToy, roles=ROLES),
                rewards=Plain({"mode 1": math.nan}),
                micro_batch=size,
                optimize=adam,
            ),
            count=3,
        )
        for size in (16, 4)
    )
    assert whole.norm() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, ON_POLICY, {"kl_beta": 0.1}])
def test_keeps_the_contract_of_objectives(options: dict[str, Any]) -> None:
    check_objective(lambda: DiffusionNFT(**options))


# --- The old policy ---------------------------------------------------------------------------------------------------


def test_the_old_policy_is_the_published_average() -> None:
    objective = DiffusionNFT(old_decay=0.5, old_decay_ramp=0.2)
    toy = running(objective, optimize=adam)
    expected = flat(state(toy))
    for decay in (0.0, 0.2, 0.4, 0.5, 0.5):
        toy.train_step()
        expected = decay * expected + (1 - decay) * flat(state(toy))
        torch.testing.assert_close(flat(objective.state_dict()), expected, rtol=0, atol=1e-12)
    assert not torch.equal(expected, flat(state(toy)))


def test_the_old_policy_answers_and_leaves_no_trace() -> None:
    objective = DiffusionNFT()
    toy = running(objective)
    _, draw, ctx = ask(objective, toy)
    other = prepared(DoubleToy)
    with torch.no_grad():
        for parameter in toy.student.parameters.values():
            parameter.mul_(1.1)
    before = state(toy)
    at = renoised_to_grid(draw.rollout.final, "nft", draw, ctx, start=draw.rollout.x_t[0])
    found = objective.old(at.x_t, at.t, draw, ctx)
    assert found is not None and not found.requires_grad
    assert torch.equal(found, other.student(at.x_t, at.t, draw.cond).x0)
    assert all(torch.equal(p, before[name]) for name, p in state(toy).items())
    assert objective(draw, ctx).metrics["moved"].min() > 0  # type: ignore[union-attr]


def test_on_policy_keeps_no_copy_and_asks_once() -> None:
    asked = []

    class Counting(DoubleToy):
        def student(self, *args: Any) -> Prediction:
            asked.append(torch.is_grad_enabled())
            return super().student(*args)

    for options, passes in ((ON_POLICY, [True]), ({}, [False, True])):
        objective = DiffusionNFT(**options)
        toy = running(objective, prepared(Counting))
        _, draw, ctx = ask(objective, toy)
        asked.clear()
        objective(draw, ctx)
        assert asked == passes
    assert DiffusionNFT(**ON_POLICY).state_dict() == {}


def test_until_it_lags_the_old_policy_is_the_student_to_the_bit() -> None:
    on, average = (step_of(running(DiffusionNFT(**options))) for options in (ON_POLICY, {}))
    assert torch.equal(on, average)


def test_a_checkpoint_brings_the_old_policy_back() -> None:
    objective, other = (DiffusionNFT(old_decay_ramp=0.5) for _ in range(2))
    toy = running(objective, optimize=adam)
    for _ in range(3):
        toy.train_step()
    kept = objective.state_dict()
    assert not torch.equal(flat(kept), flat(state(toy)))
    other.setup(toy.context(0))
    other.load_state_dict({name: average.clone() for name, average in kept.items()})
    assert torch.equal(flat(other.state_dict()), flat(kept))
    with pytest.raises(ConfigError, match="nft: the old policy of the checkpoint does not fit"):
        other.load_state_dict({"other": torch.zeros(1)})


def test_without_its_share_of_the_loss_it_saves_nothing() -> None:
    toy = running(DiffusionNFT(), rl_weight=0.0, dmd_weight=1.0)
    toy.train_step()
    assert toy.objectives.state_dict() == {}


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dmd_weight", [0.0, 1.0])
@pytest.mark.parametrize(
    ("cls", "options"), [(ToyBackend, {"old_decay_ramp": 0.1}), (ToyBackend, ON_POLICY), (EpsToy, {"beta": 0.3})]
)
def test_climbs_a_reward_without_gradient(cls: type[ToyBackend], options: dict[str, Any], dmd_weight: float) -> None:
    """Above its start, and above what matching alone makes of it."""

    def rewards(rl_weight: float) -> Tensor:
        toy = running(
            DiffusionNFT(**options),
            at_rest(cls),
            batch=32,
            group_size=8,
            optimize=steadily,
            rl_weight=rl_weight,
            dmd_weight=dmd_weight,
        )
        return torch.tensor([(toy.train_step(noted=True), toy.reward_metrics()["reward/total"])[1] for _ in range(30)])

    found = rewards(10.0)
    assert found[-8:].mean() > found[:3].mean() + 0.015
    if dmd_weight:
        assert found[-8:].mean() > rewards(0.0)[-8:].mean() + 0.015


def test_stands_beside_another_objective() -> None:
    toy = trainer(
        prepared(),
        batch=16,
        group_size=4,
        rewards=Plain(),
        objectives=[GRPO(num_iterations=2), (0.5, DiffusionNFT())],
        optimize=adam,
    )
    line = toy.train_step() | toy.train_step()
    assert line["grpo/weight"] == 1.0 and line["diffusionnft/weight"] == 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": 0.0}, "nft: beta must be above 0, not 0.0"),
        ({"beta": math.nan}, "beta must be above 0"),
        ({"kl_beta": -0.1}, "kl_beta must be at least 0, not -0.1"),
        ({"old_decay": 1.0}, r"old_decay must be in \[0, 1\), not 1.0"),
        ({"old_decay_ramp": 0.0}, "old_decay_ramp must be above 0, not 0.0"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DiffusionNFT(**options)
