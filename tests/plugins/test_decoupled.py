"""Decoupled DMD: its renoise times, its one normaliser, and the over-guidance that it avoids."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmdr.backends.toy import CENTRES, PROMPTS, ToyBackend, ToyOptions
from dmdr.matching import DMD
from dmdr.paths import NoisePath
from dmdr.protocols import Context, Matching
from dmdr.sampling import time_grid, unshift_times
from dmdr.settings.parse import parse
from dmdr.times import T_MAX, T_MIN, Beta
from dmdr.types import Draw, Renoised, Rollout
from dmdr_decoupled import Decoupled
from stubs import FLOW, VP, Network, context, draw_of, normal
from toy_trainer import adam, cpu, flat, prepared, state, trainer

STEPS = 4


def stepping(x0: Tensor, shift: float = 1.0) -> Draw:
    """A draw of every student step in turn."""
    count = len(x0)
    rollout = Rollout(
        draw_of(x0).cond,
        time_grid(STEPS, shift),
        x0.expand(STEPS + 1, *x0.shape),
        x0.expand(STEPS, *x0.shape),
        torch.arange(count),
        torch.arange(count),
    )
    return rollout.pick(torch.arange(count) % STEPS)


def asking(path: NoisePath = FLOW, shift: float = 1.0, **settings: Any) -> Any:
    ctx = context(path, **settings)
    ctx.backend.shift = shift
    return ctx


# --- Plain DMD as a special case --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matching", "guidance"),
    [(Decoupled(ca_time="shared"), (1.0, 1.0)), (Decoupled(ca_time="shared"), (3.0, 5.0)), (Decoupled(), (1.0, 1.0))],
)
def test_shared_times_or_no_guidance_train_as_plain_dmd_to_the_bit(
    matching: Matching, guidance: tuple[float, float]
) -> None:
    both = [trainer(prepared(), matching=m, optimize=adam, guidance=guidance) for m in (matching, DMD())]
    lines = [[running.train_step() for _ in range(3)] for running in both]
    assert lines[0] == lines[1]
    for role in ("student", "fake_score"):
        assert torch.equal(*(flat(state(running, role)) for running in both))


def test_parts_that_happen_to_share_their_state_are_plain_dmd() -> None:
    """The decoupled formula itself: its teacher and its normaliser are DMD's where the times agree."""

    class Together(Decoupled):
        def renoise_ca(self, draw: Draw, ctx: Context) -> Renoised:
            return self.renoise(draw, ctx)[0]

    draw, networks, ctx = stepping(normal(8, 3)), (Network(2), Network(1)), asking(guidance=(2.0, 6.0), fake_mix=0.25)
    found, expected = (matching.direction(draw, *networks, ctx) for matching in (Together(), DMD()))
    torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=0)
    for name in ("dm", "ca"):
        torch.testing.assert_close(found.parts[name], expected.parts[name], rtol=1e-12, atol=0)


def test_no_guidance_asks_for_no_guidance() -> None:
    teacher, fake = Network(2), Network(1)
    Decoupled().direction(stepping(normal(8, 3)), teacher, fake, asking(fake_mix=0.25))
    assert teacher.told == [(1.0, 0.25)]
    assert len(fake.told) == 1


# --- Times ------------------------------------------------------------------------------------------------------------


def test_guidance_is_renoised_below_the_students_time_and_matching_anywhere() -> None:
    draw, ctx = stepping(normal(2000, 1)), asking()
    ca, (dm,) = Decoupled().renoise_ca(draw, ctx), Decoupled().renoise(draw, ctx)
    assert (ca.t < draw.t).all()
    assert ((ca.t >= T_MIN) & (ca.t <= T_MAX)).all()
    for index in range(STEPS):
        share = (ca.t / draw.t)[draw.index == index]
        assert abs(share.mean() - 0.5) < 0.04  # 3 standard errors of 500 uniforms
        assert abs((share**2).mean() - 1 / 3) < 0.04
        times = dm.t[draw.index == index]
        assert times.min() < 0.05 and times.max() > 0.95
        assert abs(times.mean() - 0.5) < 0.04
    assert len(ca.t.unique()) > 1900
    assert (ca.eps - dm.eps).abs().min() > 0
    assert abs(torch.corrcoef(torch.stack([ca.t / draw.t, dm.t]))[0, 1]) < 0.07


def test_guidance_times_are_uniform_before_the_timestep_shift() -> None:
    draw, ctx = stepping(normal(2000, 1), shift=3.0), asking(shift=3.0)
    t = Decoupled().renoise_ca(draw, ctx).t
    assert (t < draw.t).all()
    share = unshift_times(t, 3.0) / unshift_times(draw.t, 3.0)
    assert abs(share.mean() - 0.5) < 0.02
    assert abs((share**2).mean() - 1 / 3) < 0.02
    assert (t[draw.index == 0] > 0.5).float().mean() > 0.7  # towards noise: 3/4 of the first step's


def test_both_times_are_shifted_as_the_grid_is() -> None:
    """A uniform time under shift 3 has the mean of 3 t / (1 + 2 t), 1.5 - 0.75 ln 3 = .676."""
    (dm,) = Decoupled().renoise(stepping(normal(2000, 1), shift=3.0), asking(shift=3.0))
    assert abs(dm.t.mean() - (1.5 - 0.75 * math.log(3))) < 0.02


def test_a_first_step_that_is_told_less_starts_from_pure_noise() -> None:
    """As the one-step SDXL, which is told .399: nothing is settled in its input."""
    draw = stepping(normal(2000, 1))
    told = replace(draw, t=torch.where(draw.index == 0, 0.399, draw.t))
    t = Decoupled().renoise_ca(told, asking()).t
    assert torch.equal(t, Decoupled().renoise_ca(draw, asking()).t)
    assert t[draw.index == 0].max() > 0.9


def test_dynamic_renoising_moves_matching_only() -> None:
    draw = stepping(normal(200, 1))
    early, late = asking(renoise=(4.0, 1.5)), asking(renoise=(1.0, 1.0))
    assert torch.equal(Decoupled().renoise_ca(draw, early).t, Decoupled().renoise_ca(draw, late).t)
    assert Decoupled().renoise(draw, early)[0].t.mean() > Decoupled().renoise(draw, late)[0].t.mean() + 0.1


def test_a_rollout_that_is_used_again_is_renoised_anew() -> None:
    draw, ctx = stepping(normal(8, 3)), asking()
    first = Decoupled().renoise_ca(draw, ctx)
    ctx.random = replace(ctx.random, iteration=1)
    again = Decoupled().renoise_ca(replace(draw, iteration=1), ctx)
    assert (first.t != again.t).all()
    assert (first.eps != again.eps).all()


def test_guidance_does_not_depend_on_the_batch() -> None:
    draw, networks, ctx = stepping(normal(8, 3)), (Network(2), Network(1)), asking(guidance=(2.0, 6.0))
    whole = Decoupled().direction(draw, *networks, ctx)
    parts = [Decoupled().direction(part, *networks, ctx) for part in draw.split(3)]
    torch.testing.assert_close(torch.cat([part.total for part in parts]), whole.total, rtol=1e-12, atol=0)


# --- Direction --------------------------------------------------------------------------------------------------------


def test_four_calls_two_at_each_time() -> None:
    draw, teacher, fake = stepping(normal(8, 3)), Network(2), Network(1)
    ctx = asking(guidance=(2.0, 6.0), fake_mix=0.25)
    Decoupled().fake_loss(draw, fake, ctx)
    Decoupled().direction(draw, teacher, fake, ctx)
    assert sorted(teacher.told) == [(0.0, 0.25), (1.0, 0.25), (1.0, 0.25)]
    (learnt, matched), states = fake.asked, teacher.asked
    ca, (dm,) = Decoupled().renoise_ca(draw, ctx), Decoupled().renoise(draw, ctx)
    assert [torch.equal(t, dm.t) for _, t in states] == [True, False, False]
    for (x_t, t), expected in zip((learnt, matched, *states), (dm, dm, dm, ca, ca), strict=True):
        assert torch.equal(x_t, expected.x_t)
        assert torch.equal(t, expected.t)


@pytest.mark.parametrize("path", [FLOW, VP])
def test_direction_is_the_published_one_over_dmds_normaliser(path: NoisePath) -> None:
    kind: Any = "velocity" if path is FLOW else "eps"
    draw, teacher, fake = stepping(normal(8, 3)), Network(2, path, kind), Network(1, path, kind)
    ctx = asking(path, guidance=(2.0, 6.0))
    direction = Decoupled().direction(draw, teacher, fake, ctx)
    ca, (dm,) = Decoupled().renoise_ca(draw, ctx), Decoupled().renoise(draw, ctx)
    own, c = fake(dm.x_t, dm.t, draw.cond).x0, teacher(dm.x_t, dm.t, draw.cond).x0
    there, u = (teacher(ca.x_t, ca.t, draw.cond, guidance=g).x0 for g in (1.0, 0.0))
    w = ctx.random.uniform("guidance", draw.sample, 2.0, 6.0)[:, None]
    distance = (draw.x0 - c - (w - 1) * (there - u)).abs().mean(1, keepdim=True)
    torch.testing.assert_close(direction.parts["dm"] * distance, own - c, rtol=0, atol=1e-10)
    torch.testing.assert_close(direction.parts["ca"] * distance, -(w - 1) * (there - u), rtol=0, atol=1e-10)
    assert torch.equal(direction.parts["dm"] + direction.parts["ca"], direction.total)
    assert not direction.total.requires_grad


# --- In training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [4, 3])
def test_micro_batches_accumulate_to_the_whole(micro_batch: int) -> None:
    settings: dict[str, Any] = {"matching": Decoupled(), "guidance": (2.0, 4.0)}
    whole, split = trainer(**settings), trainer(**settings, micro_batch=micro_batch)
    before = flat(state(whole))
    lines = [running.train_step() for running in (whole, split)]
    assert lines[1] == pytest.approx(lines[0], rel=1e-5, abs=1e-6)
    moved = [flat(state(running)) - before for running in (whole, split)]
    assert moved[0].norm() > 1e-3
    assert (moved[1] - moved[0]).norm() < 1e-6 * moved[0].norm()


def quickly(lr: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, betas=(0.5, 0.99), weight_decay=0.0)


def overshoot(matching: Matching, steps: int = 100) -> tuple[float, float]:
    """How far a student lies from its modes after training at guidance 3: all in all, and outwards, in latent units.

    It starts half a unit off. Guidance pushes samples away from the other modes where these can be taken for each
    other, that is at noisy times.
    """
    backend = ToyBackend("", ToyOptions(seed=0))
    backend.prepare(cpu(), roles=("student", "fake_score"))
    with torch.no_grad():
        backend.residuals["student"].net[-1].bias += torch.tensor([0.8, -0.5])
    running = trainer(
        backend,
        matching=matching,
        batch=48,
        fake_updates=3,
        guidance=(3.0, 3.0),
        eta=0.9,
        renoise=lambda step: Beta(1.0, 1.0),
        optimize=quickly(5e-3),
        fake_optimize=quickly(2e-2),
    )
    for step in range(steps):
        running.student.optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        running.train_step()
    noise = torch.randn((STEPS, 2000, 2), generator=torch.Generator().manual_seed(1))
    final = running.sampler.rollout(backend.student, noise, backend.encode(PROMPTS * 500)).final
    off = (final - CENTRES.repeat(500, 1)).view(500, len(CENTRES), 2).mean(0)
    return off.norm(dim=1).mean().item(), (off * CENTRES / 2).sum(1).mean().item()


def test_guidance_at_settled_levels_overshoots_and_at_open_ones_does_not() -> None:
    """The paper's claim, on the mixture. (Read with our times, the paper's "tau > t" would push out by 1.9.)"""
    (bias, outwards), (_, of_dmd) = overshoot(Decoupled()), overshoot(DMD())
    assert of_dmd > 0.35
    assert abs(outwards) < 0.2
    assert bias < 0.25


# --- Flags ------------------------------------------------------------------------------------------------------------


def test_flags() -> None:
    settings = parse(["--model", "toy", "--matching", "decoupled", "--ca_time", "shared", "--floor", "0.01"])
    assert settings.of("matchings")[0].build() == Decoupled(ca_time="shared", floor=0.01)
