"""ReFL's KL divergence against its closed form, and DRaFT-K against finite differences of the last K steps."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr.backends.toy import ToyBackend
from dmdr.errors import ConfigError
from dmdr.protocols import Needs
from dmdr.types import Draw
from dmdr_grpo import GRPO
from dmdr_refl import ReFL
from dmdr_refl.draft import DRaFT
from toy_trainer import DoubleToy, EpsToy, Meter, Plain, adam, flat, prepared, state, step_of, trainer

ROLES = ("student", "fake_score", "reference")


def drawn(running: Any) -> tuple[Any, Draw]:
    ((ctx, draw),) = running.draws(noted=True)
    return ctx, draw


# --- ReFL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eta", "sde_type"), [(1.0, "cps"), (0.5, "cps"), (0.5, "ddim"), (0.3, "flow_sde"), (0.0, "cps")]
)
def test_the_kl_is_that_of_the_drawn_steps(eta: float, sde_type: str) -> None:
    """(mu - mu_ref)^2 / (2 std^2) by hand; at steps without noise half the squared distance of the states after."""
    backend = prepared(DoubleToy, roles=ROLES)
    running = trainer(backend, batch=32, rewards=Plain(), eta=eta, sde_type=sde_type)
    ctx, draw = drawn(running)
    draw = replace(draw, leaf=draw.x0.detach().requires_grad_())
    plain, term = ReFL()(draw, ctx), ReFL(kl_beta=0.5)(draw, ctx)
    student, reference = (network(draw.x_t, draw.t, draw.cond) for network in (backend.student, backend.reference))
    kl = torch.zeros(32, dtype=torch.float64)
    assert set(draw.index.tolist()) == {0, 1, 2, 3}
    for row, i in enumerate(draw.index.tolist()):
        (mean, std), (other, _) = (ctx.sampler.moments(i, found) for found in (student, reference))
        std = std.expand(32, 1)[row].item()
        assert (std == 0) == (eta == 0 or i == 3)
        kl[row] = ((mean - other)[row].square() / (2 * (std or 1.0) ** 2)).mean().detach()
    assert kl.min() > 1e-6
    torch.testing.assert_close(term.metrics["kl"], kl, rtol=1e-8, atol=0)
    torch.testing.assert_close(term.loss - plain.loss, 0.5 * kl, rtol=0, atol=1e-6)  # the reward is float32
    (grad,) = torch.autograd.grad((term.loss - plain.loss).sum(), draw.leaf)
    last = draw.index == 3
    torch.testing.assert_close(grad[last], 0.5 * (student.x0 - reference.x0)[last].detach() / 2, rtol=0, atol=1e-7)


def test_the_kl_holds_the_student_back() -> None:
    alone: dict[str, Any] = {"batch": 32, "dmd_weight": 0.0, "optimize": adam}

    def distance(kl_beta: float) -> float:
        backend = prepared(DoubleToy, roles=ROLES)
        backend.snapshot()
        running = trainer(backend, objectives=[ReFL(kl_beta=kl_beta)], rewards=Plain(), **alone)
        before = flat(state(running))
        for _ in range(20):
            line = running.train_step()
        assert ("refl/kl" in line) == (kl_beta > 0)
        return (flat(state(running)) - before).norm().item()

    assert distance(30.0) < 0.5 * distance(0.0)


def test_the_reference_is_needed_for_the_kl_alone() -> None:
    assert ReFL(kl_beta=0.1).needs == Needs(reward_grad=True, finished=False, roles=("reference",))
    assert ReFL().needs.roles == ()
    for wrong in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="refl: kl_beta must be at least 0"):
            ReFL(kl_beta=wrong)


# --- DRaFT ------------------------------------------------------------------------------------------------------------


class SmoothToy(DoubleToy):
    """Its images are float64, and have no clamp."""

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        shown = (latents.double() / 4).sigmoid()
        return torch.cat([shown, shown[:, :1]], 1)[:, :, None, None]


def reward_of(images: Tensor) -> Tensor:
    """Of images [B, 3, 1, 1], [B] float64."""
    return images[:, 0].mean((1, 2)) + images[:, 1].square().mean((1, 2))


class Smooth(Plain):
    def __call__(self, images: Tensor, prompts: Any, **columns: Any) -> Tensor:
        return reward_of(images).float()


def gradient(running: Any, term: Any) -> Tensor:
    grads = torch.autograd.grad(term.loss.sum(), list(running.student.parameters.values()))
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize(("eta", "sde_type"), [(1.0, "cps"), (0.5, "ddim"), (0.0, "cps")])
@pytest.mark.parametrize("last_steps", [1, 2, 4])
def test_the_gradient_is_that_of_the_last_steps(last_steps: int, eta: float, sde_type: str) -> None:
    """Central differences of the mean reward, of the sampler run again from the stored state with the same noises."""
    backend = prepared(SmoothToy)
    running = trainer(backend, rewards=Smooth(), eta=eta, sde_type=sde_type, batch=6)
    ctx, draw = drawn(running)
    found = gradient(running, DRaFT(last_steps)(draw, ctx))
    start, sampler, rollout = 4 - last_steps, ctx.sampler, draw.rollout
    noises = [ctx.random.normal("noise", draw.sample, (4, 2))[:, i + 1].double() for i in range(3)]

    def rewards() -> float:
        x = rollout.x_t[start]
        with torch.no_grad():
            for i in range(start, 4):
                x = sampler.step(i, backend.student(x, rollout.t[i].expand(6), draw.cond), noises[i] if i < 3 else None)
        return reward_of(backend.decode(x)).sum().item()

    assert rewards() == pytest.approx(reward_of(backend.decode(rollout.final)).sum().item(), rel=1e-6)
    for seed in range(3):
        way = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).double() for p in parameters(backend)
        ]
        slopes = []
        for size in (1e-5, -1e-5):
            for parameter, part in zip(parameters(backend), way, strict=True):
                parameter.data += size * part
            slopes.append(rewards())
            for parameter, part in zip(parameters(backend), way, strict=True):
                parameter.data -= size * part
        slope = (slopes[0] - slopes[1]) / 2e-5
        along = (found * torch.cat([part.flatten() for part in way])).sum().item()
        assert abs(slope) > 1e-3
        assert -along == pytest.approx(slope, rel=1e-5)  # the scores are float32


def parameters(backend: ToyBackend) -> list[Any]:
    return list(backend.parameters("student").values())


@pytest.mark.parametrize("cls", [DoubleToy, EpsToy])
def test_one_step_is_refl_of_the_last(cls: type[ToyBackend]) -> None:
    running = trainer(prepared(cls), rewards=Plain(), batch=6)
    ctx, draw = drawn(running)
    term = DRaFT(1)(draw, ctx)
    last = draw.rollout.pick(torch.full((6,), 3))
    student = running.backend.student(last.x_t, last.t, last.cond)
    wanted = ReFL(steps="last")(replace(last, leaf=student.x0), ctx)
    torch.testing.assert_close(term.loss, wanted.loss, rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(gradient(running, term), gradient(running, wanted), rtol=1e-4, atol=1e-6)


def test_more_steps_are_another_gradient() -> None:
    found = []
    for last_steps in (1, 2, 3, 4):
        running = trainer(prepared(DoubleToy), rewards=Plain())
        ctx, draw = drawn(running)
        found.append(gradient(running, DRaFT(last_steps)(draw, ctx)))
    for less, more in pairwise(found):
        assert (more - less).norm() > 1e-4 * less.norm()  # fresh noise hides the earlier steps


def test_a_rollout_that_is_used_again_is_walked_by_the_student_as_it_is() -> None:
    """After an update the images are others, with the noises of the rollout."""
    running = trainer(prepared(SmoothToy), rewards=Smooth(), batch=6)
    ctx, draw = drawn(running)
    first = DRaFT(2)(draw, ctx)
    with torch.no_grad():
        for parameter in parameters(running.backend):
            parameter += 0.05
    again = DRaFT(2)(replace(draw, iteration=1), ctx)
    anew = running.sampler.rollout(
        running.backend.student, ctx.random.normal("noise", draw.sample, (4, 2)).transpose(0, 1), draw.cond
    )
    assert (first.loss - again.loss).abs().min() > 1e-6
    walked = DRaFT(4).walked(draw, ctx)
    torch.testing.assert_close(walked, anew.final, rtol=0, atol=1e-6)
    expected = -reward_of(running.backend.decode(DRaFT(2).walked(draw, ctx)))
    torch.testing.assert_close(again.loss, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=2.0**16)])
def test_a_step_does_not_depend_on_the_micro_batches_nor_on_a_loss_scaler(scaler: Any) -> None:
    settings: dict[str, Any] = {"objectives": [DRaFT()], "rewards": Plain({"mode 1": math.nan}), "batch": 16}
    whole = step_of(trainer(prepared(DoubleToy), **settings))
    parts = step_of(trainer(prepared(DoubleToy), **settings, micro_batch=4, scaler=scaler))
    assert whole.isfinite().all() and whole.norm() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-8)


def test_the_graphs_of_the_steps_are_the_memory() -> None:
    """As many student graphs as steps are alive together, and never the reward's beside them."""
    peaks = []
    for last_steps in (1, 2, 4):
        running = trainer(prepared(), rewards=Plain(), batch=64)
        ctx, draw = drawn(running)
        with Meter(running.backend) as meter:
            DRaFT(last_steps)(draw, ctx)
        peaks.append(meter.peak)
    assert peaks[1] / peaks[0] == pytest.approx(2, rel=0.1) and peaks[2] / peaks[0] == pytest.approx(4, rel=0.1)


def test_beside_another_use_of_the_rollout() -> None:
    running = trainer(
        prepared(roles=ROLES), objectives=[GRPO(num_iterations=2), DRaFT()], rewards=Plain(), batch=8, group_size=4
    )
    line = running.train_step()
    assert line["draft/coverage"] == 1 and math.isfinite(line["loss/draft"])


def test_draft_settings() -> None:
    assert DRaFT(3).needs == Needs(reward_grad=True, student_steps=3)
    with pytest.raises(ConfigError, match="draft: last_steps must be at least 1, not 0"):
        DRaFT(0)
