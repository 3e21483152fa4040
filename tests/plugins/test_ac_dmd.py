"""AC-DMD: ambient target and direction against closed forms, the consistency term, and where training comes to rest."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stubs
from dmdr.backends.toy import CENTRES, PROMPTS, STD, ToyBackend, ToyOptions
from dmdr.errors import TrainingError
from dmdr.matching import DMD
from dmdr.paths import NoisePath, Prediction
from dmdr.protocols import Matching
from dmdr.sampling import FewStepSampler, time_grid
from dmdr.settings.parse import parse
from dmdr.times import T_MIN, Beta
from dmdr.types import Condition, Rollout
from dmdr_ac_dmd import ACDMD, level, state_after
from stubs import FLOW, VP, context, gaussian_posterior, networks, normal
from toy_trainer import DoubleToy, EpsToy, adam, cpu, flat, prepared, state, step_of, trainer

PLAIN = ACDMD(consistency=0.0)
PATHS = [FLOW, VP]
rolled = partial(stubs.rolled, eta=0.9)


def column(values: Tensor) -> Tensor:
    return values[:, None]


# --- Renoising --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_states_are_noised_from_where_their_step_ends(path: NoisePath) -> None:
    draw, ctx = rolled(path)
    (renoised,) = PLAIN.renoise(draw, ctx)
    s, t = level(draw), renoised.t
    assert s.tolist() == [0.75, 0.5, 0.25, 0.0] * 2
    eps = ctx.random.normal("renoise/eps", draw.sample, (3,)).double()
    a = path.alpha(t) / path.alpha(s)
    std = (path.sigma(t) ** 2 - a**2 * path.sigma(s) ** 2).sqrt()
    torch.testing.assert_close(renoised.x_t, column(a) * draw.x_next + column(std) * eps, rtol=1e-12, atol=0)
    weight = std**2 * (1 / std**2).clamp(max=10)
    torch.testing.assert_close(renoised.weight, weight.float())
    assert weight.min() < 1 == weight.max()


def test_times_are_each_samples_own_and_above_its_level() -> None:
    draw, ctx = rolled(count=2000)
    t, s = PLAIN.renoise(draw, ctx)[0].t, level(draw)
    assert ((t >= s + 0.01) & (t <= 0.98)).all()
    assert (t >= T_MIN).all()
    for index, low in enumerate((0.75, 0.5, 0.25, 0.0)):
        times = t[draw.index == index]
        assert len(times.unique()) > 400
        assert abs(times.mean() - (1 + low) / 2) < 4 * (1 - low) / math.sqrt(12 * 500)
        assert times.min() < low + 0.03 and times.max() > 0.97
    biased = PLAIN.renoise(draw, rolled(count=2000, renoise=(4.0, 1.5))[1])[0].t  # DynaRS
    share = ((biased - s) / (1 - s)).mean()
    assert abs(share - 4 / 5.5) < 0.02


def test_a_level_beyond_the_greatest_renoise_time_is_still_below_it() -> None:
    draw, ctx = rolled(grid=torch.tensor([1.0, 0.993, 0.985, 0.0], dtype=torch.float64), count=9)
    (renoised,) = PLAIN.renoise(draw, ctx)
    assert (renoised.t > level(draw)).all()
    for values in (renoised.x_t, renoised.x0, renoised.eps, PLAIN.direction(draw, *networks(), ctx).total):
        assert values.isfinite().all()


def test_renoising_does_not_depend_on_the_batch() -> None:
    draw, ctx = rolled()
    (whole,) = PLAIN.renoise(draw, ctx)
    parts = [PLAIN.renoise(part, ctx)[0] for part in draw.split(3)]
    for name in ("x_t", "t", "x0", "eps", "weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


# --- Ambient target ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_pair_made_the_state(path: NoisePath) -> None:
    draw, ctx = rolled(path)
    (r,) = PLAIN.renoise(draw, ctx)
    made = column(path.alpha(r.t)) * r.x0 + column(path.sigma(r.t)) * r.eps
    torch.testing.assert_close(made, r.x_t, rtol=1e-10, atol=1e-10)


def test_target_on_rectified_flow_is_the_published_velocity() -> None:
    draw, ctx = rolled()
    (r,) = PLAIN.renoise(draw, ctx)
    s, t, eps = level(draw), r.t, ctx.random.normal("renoise/eps", draw.sample, (3,)).double()
    std = (t**2 - ((1 - t) / (1 - s)) ** 2 * s**2).sqrt()
    published = -draw.x_next / column(1 - s) + eps * column((t + (1 - t) * s**2 / (1 - s) ** 2) / std)
    torch.testing.assert_close(r.eps - r.x0, published, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_clean_states_have_the_ordinary_target(path: NoisePath) -> None:
    draw, ctx = rolled(path)
    draw = draw.rollout.pick(torch.full_like(draw.index, 3))
    (found,), (expected,) = PLAIN.renoise(draw, ctx), DMD().renoise(draw, ctx)
    for name in ("x_t", "t", "x0", "eps"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_regression_on_noisy_states_learns_the_score_of_clean_data(path: NoisePath, index: int) -> None:
    """For data N(m, v), exactly: the best prediction of x0* and of eps* is the posterior mean of clean data.

    Everything is linear in (x_s, eps), and so the coefficients are read off the function itself.
    """
    m, v = 1.5, 0.4
    draw, ctx = rolled(path)
    draw = draw.rollout.pick(torch.full_like(draw.index, index))
    states = draw.rollout.x_t.clone()

    def at(x_s: float) -> Any:
        states[index + 1] = x_s
        return PLAIN.renoise(replace(draw, rollout=replace(draw.rollout, x_t=states.clone())), ctx)[0]

    zero, one = at(0.0), at(1.0)
    eps = ctx.random.normal("renoise/eps", draw.sample, (3,)).double()
    coefficients = {
        name: (getattr(one, name) - getattr(zero, name), getattr(zero, name) / eps) for name in ("x_t", "x0", "eps")
    }
    s, t = level(draw)[0], column(zero.t)
    mean_s, var_s = path.alpha(s) * m, path.alpha(s) ** 2 * v + path.sigma(s) ** 2
    a, std = coefficients["x_t"]
    alpha, sigma = path.alpha(t), path.sigma(t)
    var_t = alpha**2 * v + sigma**2
    torch.testing.assert_close(a**2 * var_s + std**2, var_t.expand(8, 3))  # x_t is what noised data would be
    posterior = {"x0": (m, alpha * v / var_t), "eps": (0.0, sigma / var_t)}
    for name, (mean, slope) in posterior.items():
        p, q = coefficients[name]
        torch.testing.assert_close(p * mean_s, torch.full_like(p, mean), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close((p * a * var_s + q * std) / var_t, slope.expand(8, 3), rtol=1e-8, atol=1e-9)


# --- Anchor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_anchor_is_the_state_after_the_step_without_its_noise(eta: float) -> None:
    draw, ctx = rolled(eta=eta)
    value = draw.x0.clone().requires_grad_()
    prediction = Prediction(value, "x0", draw.x_t, draw.t, FLOW)
    anchor = PLAIN.anchor(prediction, draw, ctx)
    noise = torch.stack([normal(8, 3, seed=seed) for seed in range(1, 4)] + [torch.zeros(8, 3)])
    noise = noise[draw.index, torch.arange(8)]
    s = column(level(draw))
    torch.testing.assert_close(anchor + s * math.sin(eta * math.pi / 2) * noise, draw.x_next, rtol=1e-10, atol=1e-12)
    (grad,) = torch.autograd.grad(anchor.sum(), value)
    slope = (1 - s) - s * math.cos(eta * math.pi / 2) * (1 - column(draw.t)) / column(draw.t)
    torch.testing.assert_close(grad, slope.expand(8, 3), rtol=1e-10, atol=1e-12)
    assert torch.equal(anchor[3::4], value[3::4])  # the last step's is the image


def test_state_follows_a_student_that_has_moved_on() -> None:
    draw, ctx = rolled()
    assert torch.equal(state_after(draw, ctx), draw.x_next)
    again = replace(draw, iteration=1)
    torch.testing.assert_close(state_after(again, ctx), draw.x_next, rtol=1e-12, atol=1e-12)
    moved = replace(again, x0=draw.x0 + normal(8, 3, seed=9))
    mean, std = ctx.sampler.moments(draw.index, Prediction(moved.x0, "x0", draw.x_t, draw.t, FLOW))
    noise = torch.stack([normal(8, 3, seed=seed) for seed in range(1, 4)] + [torch.zeros(8, 3)])
    expected = mean + std * noise[draw.index, torch.arange(8)]
    torch.testing.assert_close(state_after(moved, ctx), expected, rtol=1e-12, atol=1e-12)
    assert (state_after(moved, ctx) - draw.x_next).abs().min() > 1e-3
    (first,) = PLAIN.renoise(draw, ctx)
    ctx.iteration = 1  # of a running step, or
    ctx.random = replace(ctx.random, iteration=1)
    (renoised,) = PLAIN.renoise(moved, ctx)
    assert (first.t != renoised.t).all()


# --- Direction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("guidance", [(1.0, 1.0), (2.0, 6.0)])
def test_on_the_last_step_it_is_dmd(path: NoisePath, guidance: tuple[float, float]) -> None:
    draw, ctx = rolled(path, guidance=guidance, fake_mix=0.25)
    draw = draw.rollout.pick(torch.full_like(draw.index, 3))
    found, expected = (matching.direction(draw, *networks(path), ctx) for matching in (ACDMD(), DMD()))
    torch.testing.assert_close(found.total, expected.total, rtol=1e-6, atol=0)
    for name in ("dm", "ca"):
        torch.testing.assert_close(found.parts[name], expected.parts[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sde_type", ["cps", "ddim"])
def test_direction_is_the_difference_of_the_moves_to_the_level(path: NoisePath, sde_type: Any) -> None:
    draw, ctx = rolled(path, guidance=(2.0, 6.0), fake_mix=0.25)
    ctx.sampler = replace(ctx.sampler, sde_type=sde_type)
    teacher, fake = networks(path)
    direction = PLAIN.direction(draw, teacher, fake, ctx)
    assert teacher.told == [(1.0, 0.25), (0.0, 0.25)]
    assert len(fake.told) == 1
    (r,) = PLAIN.renoise(draw, ctx)
    own, c, u = fake(r.x_t, r.t, draw.cond).x0, *(teacher(r.x_t, r.t, draw.cond, guidance=g).x0 for g in (1.0, 0.0))
    w = column(ctx.random.uniform("guidance", draw.sample, 2.0, 6.0))

    def moved(x0: Tensor) -> Tensor:
        return ctx.sampler.transition(Prediction(x0, "x0", r.x_t, r.t, path), level(draw))[0]

    guided = moved(u + w * (c - u))
    distance = (draw.x_next - guided).abs().mean(1, keepdim=True)
    torch.testing.assert_close(direction.total * distance, moved(own) - guided, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(direction.parts["dm"] * distance, moved(own) - moved(c), rtol=1e-9, atol=1e-10)
    assert torch.equal(direction.parts["dm"] + direction.parts["ca"], direction.total)
    assert not direction.total.requires_grad


def test_direction_has_the_published_factor_of_the_velocities() -> None:
    """(-(1 - s) t + s c (1 - t)) (v_fake - v_teacher), which is -0.384 times it at s = .5, t = .8, eta = .9."""
    draw, ctx = rolled(count=200)
    teacher, fake = networks()
    direction = ACDMD(floor=1e6).direction(draw, teacher, fake, ctx).total * 1e6  # an even normaliser
    (r,) = PLAIN.renoise(draw, ctx)
    s, t, c = level(draw), r.t, math.cos(0.45 * math.pi)
    factor = -(1 - s) * t + s * c * (1 - t)
    velocities = fake(r.x_t, t, draw.cond).value - teacher(r.x_t, t, draw.cond).value
    torch.testing.assert_close(direction, column(factor) * velocities, rtol=1e-8, atol=1e-10)
    near = ((s - 0.5).abs() < 1e-9) & ((t - 0.8).abs() < 0.02)
    assert near.any()
    assert factor[near].tolist() == pytest.approx([-0.384] * int(near.sum()), abs=0.013)


def test_steps_of_one_batch_are_as_alone() -> None:
    draw, ctx = rolled(guidance=(2.0, 6.0))
    whole = PLAIN.direction(draw, *networks(), ctx).total
    alone = torch.cat([PLAIN.direction(part, *networks(), ctx).total for part in draw.split(1)])
    torch.testing.assert_close(alone, whole, rtol=1e-10, atol=1e-12)


def test_nothing_hides_what_is_not_finite() -> None:
    draw, ctx = rolled()

    def broken(x_t: Tensor, t: Tensor, cond: Condition, **kwargs: Any) -> Prediction:
        return Prediction(torch.full_like(x_t, math.nan), "x0", x_t, t, FLOW)

    assert PLAIN.direction(draw, broken, networks()[1], ctx).total.isnan().all()
    assert ACDMD().fake_loss(draw, broken, ctx).loss.isnan().all()


# --- Fake score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_fake_loss_is_the_weighted_error_in_one_call(path: NoisePath) -> None:
    draw, ctx = rolled(path)
    fake = networks(path)[1]
    loss = PLAIN.fake_loss(draw, fake, ctx).loss
    assert len(fake.told) == 1
    (r,) = PLAIN.renoise(draw, ctx)
    target = r.eps - r.x0 if path is FLOW else r.eps
    expected = r.weight * (fake(r.x_t, r.t, draw.cond).value - target).square().mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)


def test_one_step_students_regress_as_dmd_does() -> None:
    """But for the weight, which fades out little noise."""
    draw, ctx = rolled(grid=time_grid(1))
    found, expected = (matching.fake_loss(draw, networks()[1], ctx).loss for matching in (PLAIN, DMD()))
    (r,) = DMD().renoise(draw, ctx)
    torch.testing.assert_close(found, expected * (10 * r.t**2).clamp(max=1), rtol=1e-6, atol=0)


def test_consistency_looks_at_two_ends_of_a_move_back() -> None:
    draw, ctx = rolled(count=400)
    fake = networks()[1]
    term = ACDMD(consistency=0.5).fake_loss(draw, fake, ctx)
    (x_t, t), (first, back), (second, same) = fake.asked
    assert torch.equal(x_t, PLAIN.renoise(draw, ctx)[0].x_t)
    assert torch.equal(back, same)
    assert (first != second).all()
    assert ((back <= t - 0.001) & (back >= t - 0.2) | (back == level(draw).clamp_min(T_MIN))).all()
    assert (back >= level(draw)).all()
    assert (back == level(draw)).any()
    assert (t - back).max() > 0.19
    h, *ends = (fake(x, at, draw.cond).x0 for x, at in ((x_t, t), (first, back), (second, back)))
    gap = ((ends[0] - h) * (ends[1] - h)).mean(1)
    torch.testing.assert_close(term.metrics["consistency"], gap)
    torch.testing.assert_close(term.loss, PLAIN.fake_loss(draw, fake, ctx).loss + 0.5 * gap)


@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_consistency_trains_both_ends_and_not_the_move(eta: float) -> None:
    """The gradient with the moves given; without noise the two moves are one, and so is their call."""
    draw, ctx = rolled(eta=eta)
    fake = networks()[1]
    loss = ACDMD(consistency=1.0).fake_loss(draw, fake, ctx).loss - PLAIN.fake_loss(draw, fake, ctx).loss
    (found,) = torch.autograd.grad(loss.sum(), fake.weight)
    asked = [(x.detach(), t) for x, t in fake.asked[:-1]]
    assert len(asked) == (3 if eta else 2)
    h, *ends = (fake(x, t, draw.cond).x0 for x, t in asked)
    (expected,) = torch.autograd.grad(((ends[0] - h) * (ends[-1] - h)).mean(1).sum(), fake.weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.norm() > 1e-2


def test_consistency_is_an_unbiased_estimate_of_the_squared_mean_gap() -> None:
    """A linear fake score h = W x answers W mean(x') on average. A single move's square is no such estimate."""
    draw, ctx = rolled(count=4000)
    weight = normal(3, 3, seed=7) / 2

    def fake(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return Prediction(x_t @ weight, "x0", x_t, t, FLOW)

    (r,) = PLAIN.renoise(draw, ctx)
    prediction = fake(r.x_t, r.t, draw.cond)
    found = ACDMD().gap(prediction, draw, fake, ctx)
    back = ctx.random.uniform("consistency/t", draw.sample, 0.001, 0.2)
    mean, std = ctx.sampler.transition(prediction, torch.maximum(r.t - back, level(draw).clamp_min(T_MIN)))
    exact = (mean @ weight - prediction.x0).square().mean(1)
    z = normal(4000, 3, seed=8)
    single = ((mean + std * z) @ weight - prediction.x0).square().mean(1)

    def deviation(values: Tensor) -> float:
        """Mean error in its own standard errors."""
        error = values - exact
        return (error.mean() / (error.std() / math.sqrt(len(error)))).item()

    assert abs(deviation(found)) < 4
    assert deviation(single) > 20
    assert (found < 0).any()


# --- In training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [4, 3])
@pytest.mark.parametrize("cls", [ToyBackend, EpsToy])
def test_micro_batches_accumulate_to_the_whole(micro_batch: int, cls: type[ToyBackend]) -> None:
    settings: dict[str, Any] = {"matching": ACDMD(), "guidance": (2.0, 4.0), "eta": 0.9}
    whole, split = trainer(prepared(cls), **settings), trainer(prepared(cls), **settings, micro_batch=micro_batch)
    before = {role: flat(state(whole, role)) for role in ("student", "fake_score")}
    lines = [running.train_step() for running in (whole, split)]
    assert lines[1] == pytest.approx(lines[0], rel=1e-5, abs=1e-6)
    for role, start in before.items():
        moved = [flat(state(running, role)) - start for running in (whole, split)]
        assert moved[0].norm() > 1e-3
        assert (moved[1] - moved[0]).norm() < 2e-6 * moved[0].norm()


def test_a_step_takes_the_gradient_at_the_state_after_the_step() -> None:
    by_hand = trainer(prepared(DoubleToy), matching=ACDMD(), eta=0.9)
    ctx = by_hand.context(0)
    draw = by_hand.rollouts.pick(by_hand.rollouts.whole(ctx), ctx)
    assert len(draw.index.unique()) > 2
    g = by_hand.direction(draw, ctx).total
    s, noise = column(level(draw)), math.cos(0.45 * math.pi)
    prediction = by_hand.backend.student(draw.x_t, draw.t, draw.cond)
    x_s = (1 - s) * prediction.x0 + s * noise * prediction.eps
    loss = 0.5 * (x_s - (x_s - g).detach()).square().mean()
    grads = torch.autograd.grad(loss, list(by_hand.student.parameters.values()))
    expected = torch.cat([grad.flatten() for grad in grads])
    found = -step_of(trainer(prepared(DoubleToy), matching=ACDMD(), eta=0.9))
    assert (found - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("sampler", [{"eta": 0.0}, {"steps": 1}, {"sde_type": "ddim"}, {"sde_type": "flow_sde"}])
def test_every_sampler_has_steps_to_match(sampler: dict[str, Any]) -> None:
    running = trainer(matching=ACDMD(), optimize=adam, **{"eta": 0.7} | sampler)
    assert all(math.isfinite(value) for _ in range(3) for value in running.train_step().values())


def test_training_stops_where_the_fake_score_is_not_finite() -> None:
    class Broken(ToyBackend):
        calls = 0

        def fake_score(self, *args: Any) -> Prediction:
            self.calls += 1
            prediction = super().fake_score(*args)
            ends = torch.tensor([[math.nan]] + [[0.0]] * (len(prediction.value) - 1))
            return replace(prediction, value=prediction.value + ends) if self.calls % 3 == 2 else prediction

    backend = prepared(Broken)
    running = trainer(backend, matching=ACDMD(), eta=0.9)
    before = flat(state(running, "fake_score"))
    with pytest.raises(TrainingError, match="the fake_score was not updated: its gradient is not finite"):
        running.train_step()
    assert torch.equal(flat(state(running, "fake_score")), before)


# --- Where it comes to rest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_gaussian_first_step_comes_to_rest_at_the_noised_teacher(eta: float) -> None:
    """Data N(1.5, 0.25); the first of two steps answers theta + scale x_1; the fake score is exact for what follows.

    At rest the state after the step is the data noised to its level s, whatever part of the noise is fresh.
    """
    s, steps = 0.6, 200
    sampler = FewStepSampler(FLOW, torch.tensor([1.0, s, 0.0], dtype=torch.float64), eta)
    kept, fresh = s * math.cos(eta * math.pi / 2), s * math.sin(eta * math.pi / 2)
    theta = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    scale = torch.full((16,), 1.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta, scale], lr=0.1)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 2)

    def gaussian(mean: Any, std: Any) -> Any:
        return lambda x_t, t, cond, **_: Prediction(gaussian_posterior(x_t, t, mean, std), "x0", x_t, t, FLOW)

    def noised() -> tuple[Tensor, Tensor]:
        """Moments of the state after the step."""
        return (1 - s) * theta.detach(), ((1 - s) * scale.detach() + kept).square() + fresh**2

    batch = 96
    cond, index = Condition([""] * batch), torch.arange(batch)
    for step in range(steps):
        noise = normal(batch, 16, seed=2 * step)
        x0 = theta + scale * noise
        prediction = Prediction(x0, "x0", noise, torch.ones(batch, dtype=torch.float64), FLOW)
        x_s = (sampler.moments(0, prediction)[0] + fresh * normal(batch, 16, seed=2 * step + 1)).detach()
        states, answers = torch.stack([noise, x_s, x_s]), torch.stack([x0, x0]).detach()
        draw = Rollout(cond, sampler.t, states, answers, index, index).pick(torch.zeros_like(index))
        mean, var = noised()
        fake = gaussian(mean / (1 - s), ((var - s**2).clamp_min(1e-4) / (1 - s) ** 2).sqrt())
        ctx = context(step=step)
        ctx.sampler = sampler
        g = ACDMD().direction(draw, gaussian(1.5, 0.5), fake, ctx).total
        optimizer.zero_grad()
        ((ACDMD().anchor(prediction, draw, ctx) * g).sum() / g.numel()).backward()
        optimizer.step()
        decay.step()
    mean, var = noised()
    assert mean.tolist() == pytest.approx([(1 - s) * 1.5] * 16, abs=0.02)
    assert var.tolist() == pytest.approx([(1 - s) ** 2 * 0.25 + s**2] * 16, abs=0.03)


def trained(cls: type[ToyBackend], matching: Matching, steps: int = 100) -> tuple[float, float]:
    """Distance of the modes' means and mean standard deviation of a two-step student's samples, in latent units.

    It starts 0.7 off, and with next to no spread.
    """

    def quickly(lr: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.AdamW(parameters, lr=lr, betas=(0.5, 0.99), weight_decay=0.0)

    backend = cls("", ToyOptions(seed=0))
    backend.prepare(cpu(), roles=("student", "fake_score"))
    with torch.no_grad():
        backend.residuals["student"].net[-1].bias += torch.tensor([0.8, -0.5])
    running = trainer(
        backend,
        matching=matching,
        batch=64,
        fake_updates=3,
        eta=0.9,
        grid=torch.tensor([1.0, 0.7, 0.0], dtype=torch.float64),
        renoise=lambda step: Beta(1.0, 1.0),
        optimize=quickly(5e-3),
        fake_optimize=quickly(2e-2),
    )
    for step in range(steps):
        running.student.optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        running.fake_learners[0].optimizer.param_groups[0]["lr"] = 2e-2 * math.sqrt(1 - step / steps)
        running.train_step()
    noise = torch.randn((2, 2000, 2), generator=torch.Generator().manual_seed(1))
    final = running.sampler.rollout(backend.student, noise, backend.encode(PROMPTS * 500)).final
    samples = final.view(500, len(CENTRES), 2)
    return (samples.mean(0) - CENTRES).norm(dim=1).mean().item(), samples.std(0).mean().item()


@pytest.mark.parametrize("cls", [ToyBackend, pytest.param(EpsToy, marks=pytest.mark.verify)])
def test_training_brings_the_student_to_the_teachers_mixture(cls: type[ToyBackend]) -> None:
    """As far as DMD brings it in as many steps; both paths, both students' steps at once, a fake score that learns."""
    assert trained(cls, DMD(), 0)[0] > 0.6
    for matching in (DMD(), ACDMD()):
        bias, std = trained(cls, matching)
        assert bias < 0.22, matching
        assert STD / 4 < std < 1.5 * STD, matching


# --- Flags ------------------------------------------------------------------------------------------------------------


def test_flags() -> None:
    settings = parse(["--model", "toy", "--matching", "ac_dmd", "--consistency", "0"])
    assert settings.of("matchings")[0].build() == ACDMD(consistency=0.0)
