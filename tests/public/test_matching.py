"""Distribution matching: its gradient, its parts, and where it comes to rest."""

import pytest
import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.matching import DMD, TimeWeight, renoise_times
from dmdr.paths import Kind, NoisePath, Prediction, add_noise
from dmdr.sampling import shift_times, unshift_times
from dmdr.times import T_MAX, T_MIN, Beta
from dmdr.types import Condition
from stubs import FLOW, VP, Network, Stub, context, draw_of, gaussian_posterior, normal

# --- Renoising --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("renoise", "end"), [((1, 200), T_MIN), ((200, 1), T_MAX)])
def test_renoise_times_stay_clear_of_both_ends(renoise: tuple[float, float], end: float) -> None:
    (renoised,) = DMD().renoise(draw_of(normal(500, 3)), context(renoise=renoise))
    assert ((renoised.t >= 0.02) & (renoised.t <= 0.98)).all()
    assert (renoised.t == end).float().mean() > 0.5


def test_renoise_times_follow_the_beta_law() -> None:
    (renoised,) = DMD().renoise(draw_of(normal(4000, 1)), context(renoise=(4, 1.5)))
    error = (6 / (5.5**2 * 6.5) / 4000) ** 0.5
    assert abs(renoised.t.mean().item() - 4 / 5.5) < 3 * error + 2e-3  # the clamp at 0.98 costs less than 2e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_of_an_interval_stay_in_it_and_are_its_share_before_the_shift(shift: float) -> None:
    draw, ctx = draw_of(normal(500, 3)), context(renoise=(4, 1.5))
    ctx.backend.shift = shift
    low = torch.linspace(0.1, 0.5, 500, dtype=torch.float64)
    t = renoise_times("renoise/t", draw, ctx, low=low, high=0.9, shifted=True)
    assert ((t > low) & (t < 0.9)).all()
    bounds = (unshift_times(end, shift) for end in (t, low, torch.tensor(0.9, dtype=torch.float64)))
    before, least, most = bounds
    share = ctx.random.beta("renoise/t", draw.sample, 4, 1.5)
    torch.testing.assert_close((before - least) / (most - least), share, rtol=0, atol=1e-12)


def test_a_law_says_itself_whether_its_times_are_shifted() -> None:
    draw, ctx = draw_of(normal(500, 3)), context()
    ctx.backend.shift = 3.0
    plain = renoise_times("renoise/t", draw, ctx)
    ctx.renoise = Beta(1.0, 1.0, shifted=True)
    shifted = renoise_times("renoise/t", draw, ctx)
    assert torch.equal(shifted, renoise_times("renoise/t", draw, ctx, shifted=True))  # once, whoever asks for it
    inside = (plain > T_MIN) & (shifted < T_MAX)
    torch.testing.assert_close(shifted[inside], shift_times(plain, 3.0)[inside], rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", [FLOW, VP])
def test_renoised_is_the_answer_with_its_own_noise(path: NoisePath) -> None:
    draw = draw_of(normal(6, 3))
    (renoised,) = DMD().renoise(draw, context(path))
    assert torch.equal(renoised.x0, draw.x0)
    assert torch.equal(renoised.x_t, add_noise(path, draw.x0, renoised.eps, renoised.t))
    assert len(renoised.eps.unique(dim=0)) == len(renoised.t.unique()) == 6
    assert renoised.weight.tolist() == [1.0] * 6


def test_renoising_does_not_depend_on_the_batch() -> None:
    draw = draw_of(normal(6, 3))
    (whole,) = DMD().renoise(draw, context())
    parts = [DMD().renoise(part, context())[0] for part in draw.split(4)]
    for name in ("x_t", "t", "x0", "eps", "weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_the_fake_score_learns_where_it_is_asked() -> None:
    draw, fake, teacher = draw_of(normal(6, 3)), Network(1), Network(2)
    DMD().fake_loss(draw, fake, context())
    DMD().direction(draw, teacher, fake, context())
    (learnt, asked), (other,) = fake.asked, teacher.asked
    for x_t, t in (asked, other):
        assert torch.equal(x_t, learnt[0])
        assert torch.equal(t, learnt[1])


# --- Fake score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "kind"), [(FLOW, "velocity"), (VP, "eps"), (VP, "v"), (FLOW, "x0")])
def test_fake_loss_is_the_denoising_error_per_sample(path: NoisePath, kind: Kind) -> None:
    draw, fake = draw_of(normal(6, 3)), Network(1, path, kind)
    term = DMD().fake_loss(draw, fake, context(path))
    (renoised,) = DMD().renoise(draw, context(path))
    alpha, sigma = path.alpha(renoised.t)[:, None], path.sigma(renoised.t)[:, None]
    target = {
        "velocity": renoised.eps - draw.x0,
        "eps": renoised.eps,
        "v": alpha * renoised.eps - sigma * draw.x0,
        "x0": draw.x0,
    }[kind]
    expected = ((renoised.x_t @ fake.weight + 1).sin() - target).square().mean(1)
    torch.testing.assert_close(term.loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert term.valid is None
    (grad,) = torch.autograd.grad(term.loss.sum(), fake.weight)
    (wanted,) = torch.autograd.grad(expected.sum(), fake.weight)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_fake_loss_is_least_at_the_posterior_mean() -> None:
    """Answers N(1, 0.25): the regression's minimum over linear denoisers is the exact posterior."""
    draw = draw_of(1 + 0.5 * normal(2000, 1))

    def exact(x_t: Tensor, t: Tensor, cond: Condition, off: float = 0.0) -> Prediction:
        return Prediction(gaussian_posterior(x_t, t, 1.0, 0.5) + off, "x0", x_t, t, FLOW)

    def loss(off: float) -> float:
        return DMD().fake_loss(draw, lambda *a: exact(*a, off=off), context()).loss.mean().item()

    assert loss(0.0) < min(loss(0.1), loss(-0.1))
    assert loss(0.1) - loss(0.0) == pytest.approx(0.01, abs=5e-3)


# --- Direction --------------------------------------------------------------------------------------------------------


def test_the_loss_has_the_gradient_of_the_published_one() -> None:
    """(x0 * g).sum() / numel against 0.5 mean((x0 - sg(x0 - g))^2), and both against g / numel."""
    x0 = normal(6, 4, 2, 2).requires_grad_()
    g = normal(6, 4, 2, 2, seed=1)
    anchor = DMD().anchor(Prediction(x0, "x0", x0, torch.zeros(6), FLOW), draw_of(x0.detach()), None)
    (ours,) = torch.autograd.grad((anchor * g).sum() / g.numel(), x0)
    (published,) = torch.autograd.grad(0.5 * (x0 - (x0 - g).detach()).square().mean(), x0)
    torch.testing.assert_close(ours, g / g.numel(), rtol=1e-14, atol=0)
    torch.testing.assert_close(published, g / g.numel(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("path", [FLOW, VP])
def test_direction_is_the_normalised_difference(path: NoisePath) -> None:
    kind: Kind = "velocity" if path is FLOW else "eps"
    draw, fake, teacher = draw_of(normal(6, 3)), Network(1, path, kind), Network(2, path, kind)
    direction = DMD().direction(draw, teacher, fake, context(path))
    (renoised,) = DMD().renoise(draw, context(path))
    real, own = (network(renoised.x_t, renoised.t, draw.cond).x0 for network in (teacher, fake))
    expected = (own - real) / (draw.x0 - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(direction.total, expected, rtol=0, atol=1e-12)
    assert torch.equal(direction.parts["ca"], torch.zeros_like(expected))
    assert teacher.told[0] == (1.0, 0.0)
    assert len(teacher.told) == 2  # one of them is this test's: no unconditional pass without guidance


@pytest.mark.parametrize("guidance", [(4.0, 4.0), (6.5, 7.5), (0.0, 0.5)])
def test_guided_direction_is_the_sum_of_matching_and_guidance(guidance: tuple[float, float]) -> None:
    """fake - (u + w (c - u)) = (fake - c) - (w - 1) (c - u), at a w of its own for each sample."""
    draw, fake, teacher = draw_of(normal(6, 3)), Network(1), Network(2)
    ctx = context(guidance=guidance, fake_mix=0.25)
    direction = DMD().direction(draw, teacher, fake, ctx)
    assert teacher.told == [(1.0, 0.25), (0.0, 0.25)]
    (renoised,) = DMD().renoise(draw, ctx)
    x_t, t, cond = renoised.x_t, renoised.t, draw.cond
    own, c = fake(x_t, t, cond).x0, teacher(x_t, t, cond, guidance=1.0).x0
    u = teacher(x_t, t, cond, guidance=0.0).x0
    w = ctx.random.uniform("guidance", draw.sample, *guidance)[:, None]
    assert ((w >= guidance[0]) & (w <= guidance[1])).all()
    assert len(w.unique()) == (1 if guidance[0] == guidance[1] else 6)
    guided = u + w * (c - u)
    distance = (draw.x0 - guided).abs().mean(1, keepdim=True)
    torch.testing.assert_close(direction.total * distance, own - guided, rtol=0, atol=1e-12)
    torch.testing.assert_close(direction.parts["dm"] * distance, own - c, rtol=0, atol=1e-12)
    torch.testing.assert_close(direction.parts["ca"] * distance, -(w - 1) * (c - u), rtol=0, atol=1e-12)
    assert torch.equal(direction.parts["dm"] + direction.parts["ca"], direction.total)


def test_outside_of_its_interval_guidance_is_exactly_nothing() -> None:
    draw, fake, teacher = draw_of(normal(200, 3)), Network(1), Network(2)
    always = DMD().direction(draw, teacher, fake, context(guidance=(4.0, 4.0)))
    plain = DMD().direction(draw, teacher, fake, context())
    ctx = context(guidance=(4.0, 4.0), guidance_interval=(0.3, 0.6))
    found = DMD().direction(draw, teacher, fake, ctx)
    (renoised,) = DMD().renoise(draw, ctx)
    inside = (renoised.t >= 0.3) & (renoised.t <= 0.6)
    assert 30 < inside.sum() < 90
    assert torch.equal(found.total[inside], always.total[inside])
    assert torch.equal(found.total[~inside], plain.total[~inside])
    assert not found.parts["ca"][~inside].any()


# --- Weight by time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [FLOW, VP])
@pytest.mark.parametrize("name", ["alpha", "sigma", "sigma3"])
def test_time_weights_are_those_of_the_published_gradient(name: TimeWeight, path: NoisePath) -> None:
    """w_t alpha_t (s_fake - s_teacher), with scores s = -(x_t - alpha x0) / sigma^2 and the published w_t."""
    kind: Kind = "velocity" if path is FLOW else "eps"
    draw, fake, teacher = draw_of(normal(6, 3)), Network(1, path, kind), Network(2, path, kind)
    ctx = context(path, guidance=(2.0, 6.0))
    found = DMD(time_weight=name).direction(draw, teacher, fake, ctx)
    (r,) = DMD().renoise(draw, ctx)
    w = ctx.random.uniform("guidance", draw.sample, 2.0, 6.0)[:, None]
    c, u = (teacher(r.x_t, r.t, draw.cond, guidance=g).x0 for g in (1.0, 0.0))
    real, own = u + w * (c - u), fake(r.x_t, r.t, draw.cond).x0
    alpha, sigma = path.alpha(r.t)[:, None], path.sigma(r.t)[:, None]
    scores = [-(r.x_t - alpha * x0) / sigma**2 for x0 in (own, real)]
    weight = {
        "alpha": sigma**2 / alpha / (draw.x0 - real).abs().mean(1, keepdim=True),  # eq. 8
        "sigma": sigma / alpha,
        "sigma3": sigma**3 / alpha,
    }[name]
    torch.testing.assert_close(found.total, weight * alpha * (scores[0] - scores[1]), rtol=1e-9, atol=1e-9)
    assert torch.equal(found.parts["dm"] + found.parts["ca"], found.total)


def test_a_floor_without_a_normaliser_is_refused() -> None:
    with pytest.raises(ConfigError, match="--floor is not read with --time_weight sigma3"):
        DMD(floor=0.1, time_weight="sigma3")


def test_no_gradient_reaches_teacher_or_fake_score() -> None:
    draw, fake, teacher = draw_of(normal(6, 3)), Network(1), Network(2)
    direction = DMD().direction(draw, teacher, fake, context(guidance=(3.0, 4.0)))
    assert not any(part.requires_grad for part in (direction.total, *direction.parts.values()))
    x0 = normal(6, 3, seed=5).requires_grad_()
    (x0 * direction.total).sum().backward()
    assert x0.grad is not None
    assert fake.weight.grad is None
    assert teacher.weight.grad is None


def test_equal_scores_give_exactly_no_direction() -> None:
    fake = Network(1)
    direction = DMD().direction(draw_of(normal(6, 3)), fake, fake, context())
    assert torch.equal(direction.total, torch.zeros(6, 3, dtype=torch.float64))


@pytest.mark.parametrize("x0", [1e-3, 1.0, 1e3])
def test_direction_does_not_depend_on_the_latents_scale(x0: float) -> None:
    def answers(share: float) -> Stub:
        return lambda x_t, t, cond, **_: Prediction(share * draw.x0, "x0", x_t, t, FLOW)

    draw = draw_of(x0 * torch.ones(4, 3, dtype=torch.float64))
    direction = DMD().direction(draw, answers(0.5), answers(0.75), context())
    torch.testing.assert_close(direction.total, torch.full((4, 3), 0.5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_teacher_that_agrees_with_the_student_divides_by_the_floor() -> None:
    draw = draw_of(normal(4, 3))

    def answers(off: float) -> Stub:
        return lambda x_t, t, cond, **_: Prediction(draw.x0 + off, "x0", x_t, t, FLOW)

    direction = DMD(floor=0.01).direction(draw, answers(0.0), answers(0.002), context())
    torch.testing.assert_close(direction.total, torch.full((4, 3), 0.2, dtype=torch.float64), rtol=1e-9, atol=0)
    assert torch.equal(DMD().direction(draw, answers(0.0), answers(0.0), context()).total, torch.zeros_like(draw.x0))


# --- Fixed point ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "floor"), [(1, 100.0), (16, 1e-6)])
@pytest.mark.parametrize("renoise", [(1.0, 1.0), (4.0, 1.5)])
def test_a_gaussian_student_comes_to_rest_at_the_teacher(size: int, floor: float, renoise: tuple[float, float]) -> None:
    """Teacher N(1.5, 0.25); student theta + sigma z; the fake score is the student's exact posterior.

    The distance of a single element is no stable normaliser: there it is constant, with 16 elements their own.
    """
    batch, steps = 128, 200
    theta = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    scale = torch.full((size,), 1.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta, scale], lr=0.1)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 2)

    def gaussian(mean: Tensor | float, std: Tensor | float) -> Stub:
        return lambda x_t, t, cond, **_: Prediction(gaussian_posterior(x_t, t, mean, std), "x0", x_t, t, FLOW)

    for step in range(steps):
        x0 = theta + scale * normal(batch, size, seed=step)
        fake = gaussian(theta.detach(), scale.detach())
        ctx = context(step=step, renoise=renoise)
        g = DMD(floor).direction(draw_of(x0.detach()), gaussian(1.5, 0.5), fake, ctx).total
        optimizer.zero_grad()
        ((x0 * g).sum() / g.numel()).backward()
        optimizer.step()
        decay.step()
    assert theta.detach().tolist() == pytest.approx([1.5] * size, abs=0.02)
    assert scale.detach().tolist() == pytest.approx([0.5] * size, abs=0.02)
