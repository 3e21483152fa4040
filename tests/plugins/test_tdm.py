"""TDM: segments of time, the states there, and the fake score's weights, against closed forms."""

import pytest
import torch
from torch import Tensor

from dmdr.matching import DMD, level, renoise_times, state_after
from dmdr.paths import NoisePath, add_noise
from dmdr.sampling import time_grid
from dmdr.times import T_MAX, T_MIN
from dmdr.types import Condition, Rollout
from dmdr_tdm import TDM
from stubs import FLOW, VP, Network, context, gaussian_posterior, kind_of, networks, normal, rolled

PATHS = [FLOW, VP]


def test_each_step_has_the_times_of_its_segment() -> None:
    draw, ctx = rolled(count=2000)
    (renoised,) = TDM().renoise(draw, ctx)
    s, t, share = level(draw), renoised.t, ctx.random.beta("renoise/t", draw.sample, 1, 1)
    assert ((t >= s.clamp_min(T_MIN)) & (t <= draw.t.clamp(max=T_MAX))).all()
    inside = (t > T_MIN) & (t < T_MAX)
    torch.testing.assert_close(t[inside], (s + (draw.t - s) * share)[inside], rtol=1e-12, atol=0)
    assert inside.float().mean() > 0.9


def test_a_first_step_that_is_told_less_has_its_segment_up_to_noise() -> None:
    draw, ctx = rolled(grid=torch.tensor([0.4, 0.2, 0.0], dtype=torch.float64), count=200)
    t = TDM().renoise(draw, ctx)[0].t
    assert t[draw.index == 0].max() > 0.9 and t[draw.index == 1].max() < 0.2


def test_a_level_beyond_the_greatest_time_is_where_its_step_is_compared() -> None:
    draw, ctx = rolled(grid=torch.tensor([1.0, 0.993, 0.985, 0.0], dtype=torch.float64), count=9)
    (renoised,) = TDM().renoise(draw, ctx)
    assert (renoised.t >= level(draw)).all()
    assert renoised.x_t.isfinite().all() and renoised.weight.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.9, 1.0])
def test_states_go_on_from_where_the_step_ends_and_are_made_of_the_students_answer(path: NoisePath, eta: float) -> None:
    draw, ctx = rolled(path, eta=eta)
    (r,) = TDM().renoise(draw, ctx)
    s, t, z = level(draw), r.t, ctx.random.normal("renoise/eps", draw.sample, (3,)).double()
    a = path.alpha(t) / path.alpha(s)
    std = (path.sigma(t) ** 2 - (a * path.sigma(s)) ** 2).sqrt()
    torch.testing.assert_close(r.x_t, a[:, None] * draw.x_next + std[:, None] * z, rtol=1e-9, atol=1e-9)
    assert torch.equal(r.x0, draw.x0)
    torch.testing.assert_close(add_noise(path, r.x0, r.eps, t), r.x_t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_without_fresh_noise_the_students_own_is_mixed_in(path: NoisePath) -> None:
    """eps = (a sigma_s eps_student + sigma_ts z) / sigma_t, as the published code has it."""
    draw, ctx = rolled(path)
    (r,) = TDM().renoise(draw, ctx)
    s, t, z = level(draw), r.t, ctx.random.normal("renoise/eps", draw.sample, (3,)).double()
    own = Network(3, path, kind_of(path))(draw.x_t, draw.t, draw.cond).eps
    kept = path.alpha(t) / path.alpha(s) * path.sigma(s)
    std = (path.sigma(t) ** 2 - kept**2).sqrt()
    mixed = (kept[:, None] * own + std[:, None] * z) / path.sigma(t)[:, None]
    torch.testing.assert_close(r.eps, mixed, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_the_weight_is_the_ratio_of_densities_times_a_bounded_snr(path: NoisePath) -> None:
    draw, ctx = rolled(path)
    (r,) = TDM().renoise(draw, ctx)
    z, unit = ctx.random.normal("renoise/eps", draw.sample, (3,)).double(), torch.distributions.Normal(0.0, 1.0)
    ratio = (unit.log_prob(r.eps) - unit.log_prob(z)).mean(1).exp()  # to the power of 1 / 3
    snr = (path.alpha(r.t) / path.sigma(r.t)) ** 2
    torch.testing.assert_close(r.weight, (ratio * snr.clamp(max=5)).float(), rtol=1e-5, atol=0)
    assert (snr > 5).any() and (snr < 5).any()


def test_the_weighted_regression_learns_the_posterior_of_noised_answers() -> None:
    """In one dimension, where the ratio is exact: answers N(1, 0.25) whose noise is neither unit nor independent."""
    count = 10_000
    x0, s = 1 + 0.5 * normal(count, 1), 0.4
    x_s = (1 - s) * x0 + s * 3 * (x0 - 1)
    rollout = Rollout(
        Condition([""] * count),
        torch.tensor([1.0, s, 0.0], dtype=torch.float64),
        torch.stack([x_s, x_s, x0]),
        torch.stack([x0, x0]),
        torch.arange(count),
        torch.arange(count),
    )
    draw = rollout.pick(torch.zeros(count, dtype=torch.int64))
    (r,) = TDM().renoise(draw, context())
    far = r.t > 0.7  # near s one z alone leads to a given x_t, so that a mean of ratios says nothing
    off, moved, weight = (
        v[far] for v in ((x0 - gaussian_posterior(r.x_t, r.t, 1.0, 0.5))[:, 0], r.x_t[:, 0], r.weight)
    )

    def deviation(values: Tensor) -> float:
        """Of the mean from 0, in standard errors."""
        return abs((values.mean() / values.std() * len(values) ** 0.5).item())

    assert max(deviation(weight * off), deviation(weight * off * moved)) < 3.5
    assert deviation(off * moved) > 10  # without the ratio


@pytest.mark.parametrize("path", PATHS)
def test_fake_loss_is_the_weighted_error_of_x0(path: NoisePath) -> None:
    draw, ctx = rolled(path)
    fake = networks(path)[1]
    loss = TDM().fake_loss(draw, fake, ctx).loss
    (r,) = TDM().renoise(draw, ctx)
    expected = r.weight * (fake(r.x_t, r.t, draw.cond).x0 - draw.x0).square().mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_direction_is_dmds_at_these_states(path: NoisePath) -> None:
    draw, ctx = rolled(path, guidance=(2.0, 6.0))
    teacher, fake = networks(path)
    direction = TDM().direction(draw, teacher, fake, ctx)
    (r,) = TDM().renoise(draw, ctx)
    own, c, u = fake(r.x_t, r.t, draw.cond).x0, *(teacher(r.x_t, r.t, draw.cond, guidance=g).x0 for g in (1.0, 0.0))
    guided = u + ctx.random.uniform("guidance", draw.sample, 2.0, 6.0)[:, None] * (c - u)
    distance = (draw.x0 - guided).abs().mean(1, keepdim=True)
    torch.testing.assert_close(direction.total * distance, own - guided, rtol=1e-9, atol=1e-10)


def test_a_student_of_one_step_is_matched_as_by_dmd() -> None:
    draw, ctx = rolled(grid=time_grid(1), guidance=(2.0, 6.0))
    found, expected = (matching.direction(draw, *networks(), ctx) for matching in (TDM(), DMD()))
    torch.testing.assert_close(found.total, expected.total, rtol=1e-9, atol=1e-9)
    assert torch.equal(renoise_times("renoise/t", draw, ctx), TDM().renoise(draw, ctx)[0].t)
    assert torch.equal(state_after(draw, ctx), draw.x0)
