"""Grids against published values; the sampler against closed forms; rollouts against what the student really saw."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dmdr.errors import ConfigError, TrainingError
from dmdr.paths import NoisePath, Prediction, RectifiedFlow, VariancePreserving
from dmdr.sampling import FewStepSampler, SdeType, shift_times, time_grid, unshift_times
from dmdr.types import Condition, Direction

FLOW = RectifiedFlow()
VP = VariancePreserving(
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
)
PATHS = {"rectified_flow": FLOW, "variance_preserving": VP}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nobody(count: int) -> Condition:
    return Condition([""] * count, {"row": torch.arange(count)}, {"label": list(range(count))})


# --- Grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "published"),
    [
        (3, [1, 0.90012, 0.75037, 0.50100]),
        (5, [1, 0.93758, 0.83361, 0.62594]),
        (5, [1, 0.97225, 0.93758, 0.89301, 0.83361, 0.7505, 0.62594, 0.41861]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shift_gives_the_published_grids(shift: float, published: list[float], dtype: torch.dtype) -> None:
    raw = torch.linspace(1, 0.001, len(published) + 1, dtype=dtype)
    expected = torch.tensor(published, dtype=dtype)
    torch.testing.assert_close(shift_times(raw, shift)[:-1], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("shift", [1, 3, 5])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_time_grid_runs_from_one_to_exactly_zero(shift: float, steps: int) -> None:
    grid = time_grid(steps, shift)
    assert (len(grid), grid.dtype, grid[0].item(), grid[-1].item()) == (steps + 1, torch.float64, 1.0, 0.0)
    assert (grid.diff() < 0).all()
    inner = [shift * k / (steps + (shift - 1) * k) for k in range(steps, -1, -1)]
    torch.testing.assert_close(grid, torch.tensor(inner, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("shift", [1, 3, 5, 0.5])
def test_unshift_is_the_inverse(shift: float) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(unshift_times(shift_times(t, shift), shift), t, rtol=0, atol=1e-15)
    torch.testing.assert_close(shift_times(unshift_times(t, shift), shift), t, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shift", [1, 3, 5])
@pytest.mark.parametrize("raw", [[1, 0.75, 0.5, 0.25], [1, 0.75025, 0.5005, 0.25075]])
def test_stock_scheduler_shifts_raw_sigmas_to_our_grid(shift: float, raw: list[float]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=raw)
    expected = shift_times(torch.tensor([*raw, 0.0], dtype=torch.float64), shift)
    torch.testing.assert_close(scheduler.sigmas.double(), expected, rtol=0, atol=1e-6)
    if raw[1] == 0.75:
        torch.testing.assert_close(time_grid(4, shift), expected, rtol=0, atol=1e-15)
        assert unshift_times(time_grid(4, shift), shift)[:-1].tolist() == pytest.approx(raw, abs=1e-15)


def test_stock_scheduler_would_shift_our_grid_twice() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5)
    scheduler.set_timesteps(sigmas=time_grid(4, 5)[:-1].tolist())
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.9868, 0.9615, 0.8929, 0], abs=1e-4)


# --- Steps ------------------------------------------------------------------------------------------------------------


def predictions(path: NoisePath, t: float) -> tuple[Prediction, Tensor]:
    """Any prediction of 5 samples, and fresh noise."""
    kind = "velocity" if isinstance(path, RectifiedFlow) else "eps"
    times = torch.full((5,), t, dtype=torch.float64)
    return Prediction(normal(5, 3, 2, seed=1), kind, normal(5, 3, 2, seed=2), times, path), normal(5, 3, 2, seed=3)


def test_eta_zero_is_the_euler_step() -> None:
    sampler = FewStepSampler(FLOW, time_grid(4, 3.0), 0.0)
    for i in range(4):
        prediction, noise = predictions(FLOW, sampler.t[i].item())
        expected = prediction.x_t + (sampler.t[i + 1] - sampler.t[i]) * prediction.value
        torch.testing.assert_close(sampler.step(i, prediction, noise), expected, rtol=0, atol=1e-12)
        assert torch.equal(sampler.step(i, prediction, noise), sampler.step(i, prediction, None))


def test_eta_zero_is_the_ddim_step() -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    sampler = FewStepSampler(VP, torch.tensor([0.999, 0.749, 0.499, 0.249, 0], dtype=torch.float64), 0.0)
    for i, timestep in enumerate(scheduler.timesteps):
        prediction, noise = predictions(VP, sampler.t[i].item())
        expected = scheduler.step(prediction.value, timestep, prediction.x_t).prev_sample
        torch.testing.assert_close(sampler.step(i, prediction, noise), expected, rtol=1e-5, atol=1e-5)


def test_eta_one_is_the_renoise_step(path: NoisePath) -> None:
    sampler = FewStepSampler(path, time_grid(4, 3.0), 1.0)
    for i in range(4):
        prediction, noise = predictions(path, sampler.t[i].item())
        t = sampler.t[i + 1]
        expected = path.alpha(t) * prediction.x0 + path.sigma(t) * noise
        torch.testing.assert_close(sampler.step(i, prediction, noise), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_last_step_is_the_prediction_itself(path: NoisePath, eta: float) -> None:
    sampler = FewStepSampler(path, time_grid(2), eta)
    prediction, noise = predictions(path, 0.5)
    assert torch.equal(sampler.step(1, prediction, noise), prediction.x0)


def test_renoise_step_can_do_without_eps() -> None:
    """The clean end of a path has no noise to tell: a student that answers x0 there must not divide by sigma = 0."""
    x = normal(2, 3)
    prediction = Prediction(x, "x0", x, torch.zeros(2, dtype=torch.float64), FLOW)
    for eta in (0.0, 0.5, 1.0):
        assert torch.equal(FewStepSampler(FLOW, time_grid(1), eta).step(0, prediction, None), x)


# --- Marginals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_a_student_that_knows_the_data_point_keeps_the_marginals(path: NoisePath, eta: float) -> None:
    """Data are one point m: every state has mean alpha m and variance sigma^2, with 2e5 samples within 4 errors."""
    count, m = 200_000, 1.7

    def oracle(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return Prediction(torch.full_like(x_t, m), "x0", x_t, t, path)

    grid = time_grid(4, 3.0) if path is FLOW else torch.tensor([0.999, 0.749, 0.5, 0.25, 0], dtype=torch.float64)
    noise = normal(4, count, 1, seed=5)
    # On the variance-preserving path the first time is not quite pure noise: start from what the path says there.
    noise[0] = path.alpha(grid[0]) * m + path.sigma(grid[0]) * noise[0]
    states = FewStepSampler(path, grid, eta).rollout(oracle, noise, nobody(count)).x_t
    for t, state in zip(grid, states, strict=True):
        mean, sigma = path.alpha(t).item() * m, path.sigma(t).item()
        assert state.mean().item() == pytest.approx(mean, abs=4 * sigma / count**0.5 + 1e-12)
        assert state.var().item() == pytest.approx(sigma**2, abs=4 * sigma**2 * (2 / count) ** 0.5 + 1e-12)


@pytest.mark.parametrize(("eta", "expected"), [(0.0, 0.987), (0.3, 0.934), (0.8, 0.641), (1.0, 0.489)])
def test_a_posterior_mean_keeps_the_variance_on_the_ode_only(eta: float, expected: float) -> None:
    """Data N(0, 1), 200 steps. Fresh noise costs variance where the student answers with a mean instead of a sample.

    The step is linear, x' = a x + b z, so that the variance follows exactly: no sampling error.
    """
    steps = 200
    sampler = FewStepSampler(FLOW, time_grid(steps), eta)
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)  # two rows: a from (1, 0), b from (0, 1)
    variance = 1.0
    for i in range(steps):
        t = sampler.t[i].expand(2)
        gain = (FLOW.alpha(t) / (FLOW.alpha(t) ** 2 + FLOW.sigma(t) ** 2))[:, None]
        a, b = sampler.step(i, Prediction(gain * x, "x0", x, t, FLOW), x.flip(0)).flatten().tolist()
        variance = a**2 * variance + b**2
    assert variance == pytest.approx(expected, abs=2e-3)
    assert variance == pytest.approx((1 + math.cos(eta * math.pi / 2)) / 2, abs=0.021)


# --- Other stochastic steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_stock_schedulers_step(eta: float) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(4)
    sampler = FewStepSampler(VP, torch.tensor([0.999, 0.749, 0.499, 0.249, 0], dtype=torch.float64), eta, "ddim")
    for i, timestep in enumerate(scheduler.timesteps):
        prediction, noise = predictions(VP, sampler.t[i].item())
        stock = scheduler.step(prediction.value, timestep, prediction.x_t, eta=eta, variance_noise=noise)
        torch.testing.assert_close(sampler.step(i, prediction, noise), stock.prev_sample, rtol=1e-5, atol=1e-5)


def test_ddim_has_the_published_spread_on_sdxls_grid() -> None:
    sampler = FewStepSampler(VP, torch.tensor([0.999, 0.749, 0.5, 0.25, 0], dtype=torch.float64), 1.0, "ddim")
    for i, expected in enumerate([0.9326, 0.7810, 0.5157, 0.0]):
        prediction, _ = predictions(VP, sampler.t[i].item())
        assert sampler.moments(i, prediction)[1].flatten()[0].item() == pytest.approx(expected, abs=5e-4)


def test_euler_maruyama_steps_are_the_published_ones() -> None:
    """Flow-GRPO: x (1 + s^2 dt / 2t) + v (1 + s^2 (1 - t) / 2t) dt; DanceGRPO: x + v dt - s^2 score dt / 2."""
    grid, eta = time_grid(4, 3.0), 0.7
    flow, dance = (FewStepSampler(FLOW, grid, eta, name) for name in ("flow_sde", "dance_sde"))
    for i, published in enumerate([0.700, 0.813, 0.606]):
        prediction, noise = predictions(FLOW, grid[i].item())
        x, v, t = prediction.x_t, prediction.value, grid[i]
        dt = grid[i + 1] - t
        s = eta * (t / (1 - (grid[1] if i == 0 else t))) ** 0.5
        mean = x * (1 + s**2 * dt / (2 * t)) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
        std = s * (-dt) ** 0.5
        assert std.item() == pytest.approx(published, abs=1e-3)
        torch.testing.assert_close(flow.step(i, prediction, noise), mean + std * noise, rtol=0, atol=1e-12)
        score = -(x - (1 - t) * prediction.x0) / t**2
        mean, std = x + v * dt - eta**2 * score * dt / 2, eta * (-dt) ** 0.5
        torch.testing.assert_close(dance.step(i, prediction, noise), mean + std * noise, rtol=0, atol=1e-12)
    prediction, noise = predictions(FLOW, grid[3].item())
    for sampler in (flow, dance):  # the last step is the ODE's
        torch.testing.assert_close(sampler.step(3, prediction, noise), prediction.x0, rtol=0, atol=1e-12)


def test_euler_maruyama_adds_variance_where_steps_are_few() -> None:
    """Data are one point m: the mean is kept, the variance exceeds t'^2 by s^2 dt^2 / t + s^4 dt^2 / (4 t^2)."""
    grid, m, count = time_grid(4, 3.0), 1.7, 200_000
    for sde_type, excess in (("flow_sde", [0.109, 0.245, 0.1825]), ("dance_sde", [0.0055, 0.0139, 0.0475])):
        sampler = FewStepSampler(FLOW, grid, 0.7, sde_type)  # type: ignore[arg-type]
        for i in range(3):
            t = grid[i].expand(count)
            x_t = (1 - grid[i]) * m + grid[i] * normal(count, 1, seed=1)
            x_next = sampler.step(i, Prediction(torch.full_like(x_t, m), "x0", x_t, t, FLOW), normal(count, 1, seed=2))
            variance = grid[i + 1].item() ** 2 + excess[i]
            assert x_next.mean().item() == pytest.approx(
                (1 - grid[i + 1].item()) * m, abs=4 * (variance / count) ** 0.5
            )
            assert x_next.var().item() == pytest.approx(variance, rel=4 * (2 / count) ** 0.5 + 2e-3)


@pytest.mark.parametrize(("sde_type", "eta", "expected"), [("flow_sde", 0.7, 1.004), ("dance_sde", 0.3, 0.98)])
def test_euler_maruyama_keeps_the_variance_where_steps_are_many(sde_type: str, eta: float, expected: float) -> None:
    """Data N(0, 1), a posterior mean, 200 steps: where cps loses variance (above), these keep it."""
    sampler = FewStepSampler(FLOW, time_grid(200), eta, sde_type)  # type: ignore[arg-type]
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    variance = 1.0
    for i in range(200):
        t = sampler.t[i].expand(2)
        gain = (FLOW.alpha(t) / (FLOW.alpha(t) ** 2 + FLOW.sigma(t) ** 2))[:, None]
        a, b = sampler.step(i, Prediction(gain * x, "x0", x, t, FLOW), x.flip(0)).flatten().tolist()
        variance = a**2 * variance + b**2
    assert variance == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("sde_type", ["flow_sde", "dance_sde"])
def test_steps_of_rectified_flow_are_refused_elsewhere(sde_type: str) -> None:
    with pytest.raises(ConfigError, match=f"--sde_type {sde_type} works only with rectified flow"):
        FewStepSampler(VP, time_grid(4), 0.7, sde_type)  # type: ignore[arg-type]


@pytest.mark.parametrize("sde_type", ["cps", "ddim", "flow_sde", "dance_sde"])
def test_each_sample_may_take_a_step_of_its_own(sde_type: str) -> None:
    sampler = FewStepSampler(FLOW, time_grid(4, 3.0), 0.6, sde_type)  # type: ignore[arg-type]
    index = torch.tensor([2, 0, 3, 1])
    value, x_t = normal(4, 3, 2), normal(4, 3, 2, seed=1)
    mean, std = sampler.moments(index, Prediction(value, "velocity", x_t, sampler.t[index], FLOW))
    for row, i in enumerate(index.tolist()):
        part = slice(row, row + 1)
        alone = sampler.moments(i, Prediction(value[part], "velocity", x_t[part], sampler.t[i].expand(1), FLOW))
        torch.testing.assert_close(mean[part], alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(std[part].flatten(), alone[1].flatten(), rtol=0, atol=1e-12)


# --- Log-probability --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
def test_log_prob_is_the_gaussian_one(path: NoisePath, eta: float) -> None:
    sampler = FewStepSampler(path, time_grid(4, 3.0), eta)
    for i in range(3):
        prediction, noise = predictions(path, sampler.t[i].item())
        x_next = sampler.step(i, prediction, noise)
        alpha, sigma = path.alpha(sampler.t[i + 1]), path.sigma(sampler.t[i + 1])
        angle = eta * math.pi / 2
        mean = alpha * prediction.x0 + sigma * math.cos(angle) * prediction.eps
        std = sigma * math.sin(angle)
        torch.testing.assert_close((x_next - mean) / std, noise, rtol=0, atol=1e-11)
        for there in (x_next, x_next + 0.1, normal(5, 3, 2, seed=9)):
            expected = torch.distributions.Normal(mean, std).log_prob(there).mean((1, 2))
            torch.testing.assert_close(sampler.log_prob(i, prediction, there), expected, rtol=1e-12, atol=1e-12)


def test_log_prob_has_the_gradient_of_its_mean() -> None:
    """From t = 0.9 to 0.75 at eta = 0.8 the mean moves by -0.201824 per unit of velocity."""
    sampler = FewStepSampler(FLOW, torch.tensor([0.9, 0.75, 0.0], dtype=torch.float64), 0.8)
    value = normal(2, 6, seed=1).requires_grad_()
    x_t, t = normal(2, 6, seed=2), torch.full((2,), 0.9, dtype=torch.float64)
    prediction = Prediction(value, "velocity", x_t, t, FLOW)
    noise = normal(2, 6, seed=3)
    x_next = sampler.step(0, prediction, noise).detach()
    (grad,) = torch.autograd.grad(sampler.log_prob(0, prediction, x_next).sum(), value)
    std = 0.75 * math.sin(0.4 * math.pi)
    torch.testing.assert_close(grad, noise / std / 6 * -0.201824, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("eta", "step"), [(0.0, 0), (0.0, 1), (0.5, 1), (1.0, 1)])
def test_log_prob_of_a_deterministic_step_is_refused(eta: float, step: int) -> None:
    prediction, noise = predictions(FLOW, 0.5)
    with pytest.raises(TrainingError, match=r"\(the last of 2, or any at eta 0\); declare .*, and pass mask=draw.mask"):
        FewStepSampler(FLOW, time_grid(2), eta).log_prob(step, prediction, noise)


@pytest.mark.parametrize("sde_type", ["cps", "ddim", "flow_sde"])
def test_log_prob_leaves_out_what_a_mask_does(sde_type: SdeType) -> None:
    """Its gradient is finite also where samples are at the last step, where the standard deviation is 0."""
    sampler = FewStepSampler(FLOW, time_grid(3), 0.7, sde_type)
    index, mask = torch.tensor([0, 2, 1, 2]), torch.tensor([True, False, True, False])
    value, x_t, x_next = normal(4, 3, seed=1).requires_grad_(), normal(4, 3, seed=2), normal(4, 3, seed=3)
    prediction = Prediction(value, "x0", x_t, sampler.t[index], FLOW)
    found = sampler.log_prob(index, prediction, x_next, mask=mask)
    (grad,) = torch.autograd.grad(found.sum(), value)
    assert grad[mask].all() and torch.equal(grad[~mask], torch.zeros(2, 3, dtype=grad.dtype))
    alone = Prediction(value[mask], "x0", x_t[mask], sampler.t[index][mask], FLOW)
    expected = sampler.log_prob(index[mask], alone, x_next[mask])
    assert torch.equal(found, torch.zeros(4, dtype=torch.float64).masked_scatter(mask, expected))


# --- Rollouts ---------------------------------------------------------------------------------------------------------


def recording(path: NoisePath, seen: list[tuple[Tensor, Tensor, Condition]]) -> Callable[..., Prediction]:
    """A nonlinear student that notes what it was asked."""
    weight = torch.nn.Parameter(normal(3, 3, seed=7))

    def student(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        seen.append((x_t, t, cond))
        return Prediction((x_t @ weight).tanh() * t[:, None], "velocity", x_t, t, path)

    return student


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_rollout_stores_what_the_student_saw_and_said(path: NoisePath, eta: float) -> None:
    seen: list[tuple[Tensor, Tensor, Condition]] = []
    student = recording(path, seen)
    sampler = FewStepSampler(path, time_grid(3, 3.0), eta)
    noise = normal(3, 4, 3)
    sample, group = torch.tensor([4, 5, 6, 7]), torch.tensor([2, 2, 3, 3])
    rollout = sampler.rollout(student, noise, nobody(4), sample=sample, group=group)
    assert not rollout.x_t.requires_grad
    assert torch.equal(rollout.x_t[0], noise[0])
    assert (rollout.sample.tolist(), rollout.group.tolist()) == ([4, 5, 6, 7], [2, 2, 3, 3])
    assert rollout.log_prob is None
    assert len(seen) == 3
    for i, (x_t, t, cond) in enumerate(list(seen)):
        assert torch.equal(rollout.x_t[i], x_t)
        assert torch.equal(t, rollout.t[i].expand(4))
        assert cond is rollout.cond
        prediction = student(x_t, t, cond)
        assert torch.equal(rollout.x0[i], prediction.x0)
        x_next = sampler.step(i, prediction, noise[i + 1] if i < 2 else None)
        assert torch.equal(rollout.x_t[i + 1], x_next)
    assert torch.equal(rollout.final, rollout.x_t[-1])
    assert torch.equal(rollout.final, rollout.x0[-1])


def test_rollout_keeps_log_probs_of_the_stochastic_steps() -> None:
    student = recording(FLOW, [])
    sampler = FewStepSampler(FLOW, time_grid(3), 0.7)
    rollout = sampler.rollout(student, normal(3, 4, 3), nobody(4), log_prob=True)
    assert rollout.log_prob is not None
    assert rollout.log_prob.shape == (2, 4)
    for i in range(2):
        prediction = student(rollout.x_t[i], rollout.t[i].expand(4), rollout.cond)
        assert torch.equal(rollout.log_prob[i], sampler.log_prob(i, prediction, rollout.x_t[i + 1]))


def test_rollout_of_one_step_starts_from_pure_noise_whatever_the_student_is_told() -> None:
    """SDXL's one-step student is told 399 of 1000 and fed a unit Gaussian."""
    asked: list[tuple[Tensor, Tensor]] = []

    def student(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        asked.append((x_t, t))
        return Prediction(0.5 * x_t, "eps", x_t, t, VP)

    noise = normal(1, 1000, 4)
    sampler = FewStepSampler(VP, torch.tensor([0.399, 0.0], dtype=torch.float64), 1.0)
    rollout = sampler.rollout(student, noise, nobody(1000))
    ((x_t, t),) = asked
    assert torch.equal(x_t, noise[0])
    assert torch.equal(rollout.x_t[0], noise[0])
    assert set(VP.timestep(t).tolist()) == {399}
    alpha, sigma = 0.4261**0.5, (1 - 0.4261) ** 0.5
    torch.testing.assert_close(rollout.final, noise[0] * (1 - 0.5 * sigma) / alpha, rtol=0, atol=1e-3)
    draw = rollout.pick(torch.zeros(1000, dtype=torch.int64))
    assert torch.equal(draw.x_t, noise[0])
    assert set(draw.t.tolist()) == {0.399}


def test_pick_takes_each_sample_from_its_own_trajectory() -> None:
    rollout = FewStepSampler(FLOW, time_grid(3), 1.0).rollout(recording(FLOW, []), normal(3, 4, 3), nobody(4))
    index = torch.tensor([2, 0, 1, 2])
    draw = rollout.pick(index)
    for row, i in enumerate(index.tolist()):
        assert torch.equal(draw.x_t[row], rollout.x_t[i, row])
        assert torch.equal(draw.x0[row], rollout.x0[i, row])
        assert draw.t[row] == rollout.t[i]
    assert draw.mask.all()
    assert draw.leaf is None
    assert draw.direction is None


def test_split_slices_everything_that_belongs_to_a_sample() -> None:
    sampler = FewStepSampler(FLOW, time_grid(3), 1.0)
    rollout = sampler.rollout(recording(FLOW, []), normal(3, 5, 3), nobody(5), log_prob=True)
    draw = rollout.pick(torch.tensor([2, 0, 1, 2, 0]))
    direction = Direction(normal(5, 3), {"dm": normal(5, 3, seed=1)})
    draw = replace(draw, direction=direction)
    parts = list(draw.split(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    for name in ("x_t", "t", "index", "x0", "sample", "group", "mask"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(draw, name)), name
    assert torch.equal(torch.cat([part.cond.tensors["row"] for part in parts]), torch.arange(5))
    assert [label for part in parts for label in part.cond.columns["label"]] == [0, 1, 2, 3, 4]
    for name in ("x_t", "x0", "log_prob"):
        joined = torch.cat([getattr(part.rollout, name) for part in parts], 1)
        assert torch.equal(joined, getattr(rollout, name)), name
    assert all(part.leaf is None for part in parts)
    directions = [part.direction for part in parts if part.direction]
    assert torch.equal(torch.cat([each.total for each in directions]), direction.total)
    assert torch.equal(torch.cat([each.parts["dm"] for each in directions]), direction.parts["dm"])
