"""Noise paths and predictions, against the pair that made each state and against published tables."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dmdr.paths import Kind, NoisePath, Prediction, RectifiedFlow, VariancePreserving, add_noise, expand

KINDS: tuple[Kind, ...] = ("x0", "eps", "velocity", "v")


def sdxl() -> VariancePreserving:
    """The table of SDXL and SD1.5."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return VariancePreserving(scheduler.alphas_cumprod.double())


PATHS = {"rectified_flow": RectifiedFlow(), "variance_preserving": sdxl()}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x0, eps


def value_of(kind: Kind, path: NoisePath, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The published definitions: flow matching's eps - x0, and v = alpha eps - sigma x0 of progressive distillation."""
    alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (path.alpha, path.sigma))
    return {"x0": x0, "eps": eps, "velocity": eps - x0, "v": alpha * eps - sigma * x0}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_with_the_pair_that_made_the_state(kind: Kind, path: NoisePath) -> None:
    x0, eps = pair()
    t = torch.tensor([0.02, 0.25, 0.399, 0.5, 0.75, 0.98], dtype=torch.float64)
    x_t = add_noise(path, x0, eps, t)
    prediction = Prediction(value_of(kind, path, x0, eps, t), kind, x_t, t, path)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.target(x0, eps), prediction.value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["eps", "velocity", "v"])
def test_x0_and_eps_of_a_wrong_answer_still_make_the_state(kind: Kind, path: NoisePath) -> None:
    x_t, value = pair()
    t = torch.full((len(x_t),), 0.6, dtype=torch.float64)
    prediction = Prediction(value, kind, x_t, t, path)
    torch.testing.assert_close(add_noise(path, prediction.x0, prediction.eps, t), x_t, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.target(prediction.x0, prediction.eps), value, rtol=0, atol=1e-12)


def test_at_pure_noise_a_velocity_tells_x0() -> None:
    x0, eps = pair()
    t = torch.ones(len(x0), dtype=torch.float64)
    torch.testing.assert_close(Prediction(eps - x0, "velocity", eps, t, RectifiedFlow()).x0, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_networks_are_answered_in_float32(kind: Kind, path: NoisePath) -> None:
    x0, eps = pair(torch.bfloat16)
    t = torch.full((len(x0),), 0.5, dtype=torch.float64)
    prediction = Prediction(eps, kind, x0, t, path)
    assert prediction.x0.dtype == prediction.eps.dtype == prediction.target(x0, eps).dtype == torch.float32
    exact = Prediction(eps.double(), kind, x0.double(), t, path)
    torch.testing.assert_close(prediction.x0, exact.x0.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prediction.eps, exact.eps.float(), rtol=1e-6, atol=1e-6)


def test_rectified_flow_is_the_straight_line() -> None:
    x0, eps = pair()
    t = torch.tensor([0.0, 0.1, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
    t_ = t.view(-1, 1, 1, 1)
    assert torch.equal(add_noise(RectifiedFlow(), x0, eps, t), (1 - t_) * x0 + t_ * eps)
    assert torch.equal(RectifiedFlow().timestep(t), 1000 * t)


def test_variance_preserving_reads_the_published_table() -> None:
    t = torch.tensor([0.999, 0.749, 0.5, 0.399, 0.25], dtype=torch.float64)
    alpha, sigma = sdxl().alpha(t), sdxl().sigma(t)
    published = torch.tensor([0.00466, 0.0566, 0.2763, 0.4261, 0.6738], dtype=torch.float64)
    torch.testing.assert_close(alpha**2, published, rtol=0, atol=6e-5)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-15)


def test_variance_preserving_adds_noise_as_diffusers_does() -> None:
    x0, eps = pair()
    t = torch.tensor([0.001, 0.25, 0.399, 0.5, 0.749, 0.999], dtype=torch.float64)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    expected = scheduler.add_noise(x0, eps, torch.tensor([1, 250, 399, 500, 749, 999]))
    torch.testing.assert_close(add_noise(sdxl(), x0, eps, t), expected, rtol=0, atol=1e-6)


def test_variance_preserving_snaps_to_the_nearest_index() -> None:
    t = torch.tensor([1.0, 0.9996, 0.9994, 0.2504, 0.2496, 0.0004, 0.0], dtype=torch.float64)
    index = sdxl().timestep(t)
    assert index.tolist() == [999, 999, 999, 250, 250, 0, 0]
    assert index.dtype == torch.int64
    snapped = index[:-1].double() / 1000
    assert torch.equal(sdxl().alpha(t)[:5], sdxl().alpha(snapped)[:5])


def test_variance_preserving_is_clean_at_exactly_zero_only() -> None:
    path = sdxl()
    x0, eps = pair()
    assert torch.equal(add_noise(path, x0, eps, torch.zeros(len(x0), dtype=torch.float64)), x0)
    almost = torch.tensor(1e-6, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(almost) ** 2, path.alphas_cumprod[0], rtol=1e-15, atol=0)
    assert path.sigma(almost) > 0.02


def test_expand_keeps_the_batch_and_float32_or_better() -> None:
    values = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        expanded = expand(values, torch.zeros(2, 4, 8, 8, dtype=dtype))
        assert (expanded.shape, expanded.dtype) == ((2, 1, 1, 1), expected)
    assert expand(values, torch.zeros(2, 3)).flatten().tolist() == [1.0, 2.0]
