"""Metrics against closed forms, hand-made sets, and torch-fidelity."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from dmdr.metrics import (
    Moments,
    Neighbours,
    chunks,
    frechet_distance,
    frechet_distance_of_moments,
    inception_score,
    kernel_distance,
    neighbours,
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def exact_sample(mean: Tensor, covariance: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, D] float64 whose mean and unbiased covariance are exactly these."""
    noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    noise = noise - noise.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(noise.T.cov()), noise.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_diagonal_gaussians(generator: torch.Generator) -> None:
    means = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([3.0, 1.0, 0.5]).double()
    deviations = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.3, 2.5, 4.0]).double()
    real, fake = (
        exact_sample(m, torch.diag(s**2), 50 + i, generator)
        for i, (m, s) in enumerate(zip(means, deviations, strict=True))
    )
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(real, fake) == pytest.approx(expected.item(), abs=1e-9)


def test_frechet_distance_of_full_gaussians_that_commute(generator: torch.Generator) -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    a, b = (torch.rand(8, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    mean = torch.zeros(8, dtype=torch.float64)
    real, fake = (exact_sample(mean, basis @ torch.diag(s**2) @ basis.T, 40, generator) for s in (a, b))
    assert frechet_distance(real, fake) == pytest.approx((a - b).square().sum().item(), abs=1e-9)


def test_frechet_distance_equals_the_formula_with_sqrtm(generator: torch.Generator) -> None:
    mix = torch.randn(2, 16, 16, generator=generator)
    real = torch.randn(300, 16, generator=generator) @ mix[0]
    fake = torch.randn(200, 16, generator=generator) @ mix[1] + 0.5
    a, b = real.double().numpy(), fake.double().numpy()
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    expected = shift + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert frechet_distance(real, fake) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(fake, real) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [10, 500])  # fewer samples than dimensions, and more
def test_frechet_distance_of_identical_sets_is_zero(count: int, generator: torch.Generator) -> None:
    features = 100 * torch.randn(count, 64, generator=generator)
    features[:, :8] = 3.0  # features that never fire
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-7)
    assert frechet_distance(features, features + 2) == pytest.approx(64 * 4, rel=1e-5)


def test_frechet_distance_of_broken_input() -> None:
    assert math.isnan(frechet_distance(torch.zeros(4, 2), torch.full((4, 2), torch.nan)))
    with pytest.raises(ValueError, match="2 samples or more"):
        frechet_distance(torch.zeros(4, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="same D"):
        frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3))


def test_neighbours_of_identical_and_distant_sets(generator: torch.Generator) -> None:
    real = torch.randn(200, 6, generator=generator)
    same = neighbours(real, real, 5)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    assert neighbours(real, real + 1000) == Neighbours(0.0, 0.0, 0.0, 0.0)


def test_a_collapsed_student_is_precise_and_has_no_recall(generator: torch.Generator) -> None:
    real = torch.randn(200, 5, generator=generator)
    fake = real[7] + 1e-4 * torch.randn(200, 5, generator=generator)
    found = neighbours(real, fake)
    assert found.precision == 1.0
    assert found.recall <= 0.01


def test_neighbours_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # radii for k = 1: 1, 1, 2, 7
    fake = torch.tensor([[-1.0], [-1.5], [4.5], [30.0]])  # radii for k = 1: .5, .5, 5.5, 25.5
    # -1 lies on the edge of the ball of 0, -1.5 in none, 4.5 in those of 3 and 10, 30 in none.
    assert neighbours(real, fake, 1) == Neighbours(precision=0.5, recall=1.0, density=3 / 4, coverage=3 / 4)
    # k = 2: radii of the real 3, 2, 3, 9 and of the fake 5.5, 6, 6, 31.5
    assert neighbours(real, fake, 2) == Neighbours(precision=0.75, recall=1.0, density=5 / 8, coverage=1.0)
    assert neighbours(fake, real, 2).recall == 0.75


class InParts:
    """A tensor that is read a few rows at a time."""

    def __init__(self, tensor: Tensor, size: int) -> None:
        self.tensor, self.size = tensor, size

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensor.split(self.size))

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.tensor[index]

    def whole(self) -> Tensor:
        return self.tensor


def test_neighbours_are_those_of_brute_force_however_they_are_read(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = torch.randn(2, 150, 40, generator=generator)
    fake = 0.9 * fake[:130] + 0.3
    pairs, own, others = (
        torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        for a, b in ((fake, real), (real, real), (fake, fake))
    )
    radius, other_radius = (distances.sort(1).values[:, 3] for distances in (own, others))
    inside = pairs <= radius
    expected = Neighbours(
        precision=inside.any(1).double().mean().item(),
        recall=(pairs <= other_radius[:, None]).any(0).double().mean().item(),
        density=inside.sum().item() / (3 * 130),
        coverage=inside.any(0).double().mean().item(),
    )
    assert 0 < expected.recall < expected.precision <= 1 and expected.coverage > 0
    wide = pairs <= own.sort(1).values[:, 5]
    both = neighbours(real, fake, k_density=5)
    assert (both.precision, both.recall) == (expected.precision, expected.recall)
    assert (both.density, both.coverage) == (wide.sum().item() / (5 * 130), wide.any(0).double().mean().item())
    for limit in (1, 151, 7 * 150, 2**24):
        assert neighbours(real, fake, max_distances=limit) == expected
    monkeypatch.setattr("dmdr.metrics.BLOCK", 17)
    assert neighbours(InParts(real, 11), InParts(fake, 64)) == expected


def test_all_metrics_are_the_same_of_features_in_parts(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmdr.metrics.BLOCK", 17)
    real, fake = torch.randn(2, 150, 6, generator=generator)
    sure = real.softmax(1)
    assert [len(part) for part in chunks(InParts(real, 11), 40)] == [40, 40, 40, 30]
    assert torch.equal(torch.cat(list(chunks(InParts(real, 64), 7))), real)
    assert kernel_distance(InParts(real, 11), InParts(fake, 7)) == kernel_distance(real, fake)
    for chunk in (None, 40):
        assert inception_score(InParts(sure, 11), chunk) == pytest.approx(inception_score(sure, chunk), rel=1e-12)
    torch.testing.assert_close(Moments.of(InParts(real, 11)).covariance, real.double().T.cov())
    with pytest.raises(ValueError, match=r"not \[150, 6\] and \[20, 3\]"):
        neighbours(InParts(real, 11), InParts(real[:20, :3], 4))
    with pytest.raises(ValueError, match="each set needs 4 samples or more; there are 150 real and 0 fake"):
        neighbours(real, real[:0])


def test_points_that_are_not_finite_lie_outside() -> None:
    real = torch.arange(12.0)[:, None]
    fake = real.clone()
    fake[:3] = torch.nan
    assert neighbours(real, fake).precision == 0.75
    with pytest.raises(ValueError, match="4 samples or more"):
        neighbours(real, real[:3])
    with pytest.raises(ValueError, match="k must be"):
        neighbours(real, real, 0)


def test_moments_of_parts_are_those_of_the_whole(generator: torch.Generator) -> None:
    features = 5 + torch.randn(700, 12, generator=generator)
    whole = Moments.of(features)
    summed = Moments.of(features[:1]) + Moments.of(features[1:400]) + Moments.of(features[400:])
    assert summed.count == 700
    torch.testing.assert_close(summed.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(summed.covariance, whole.covariance, rtol=1e-10, atol=1e-12)
    expected = torch.from_numpy(np.cov(features.double().numpy(), rowvar=False))
    torch.testing.assert_close(whole.covariance, expected, rtol=1e-12, atol=1e-12)


def test_the_frechet_distance_of_moments_is_that_of_the_features(generator: torch.Generator) -> None:
    real = torch.randn(300, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    fake = torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 0.5
    found = frechet_distance_of_moments(Moments.of(real), Moments.of(fake))
    assert found == pytest.approx(frechet_distance(real, fake), rel=1e-9)
    assert frechet_distance_of_moments(Moments.of(real), Moments.of(real)) == pytest.approx(0, abs=1e-9)
    assert math.isnan(frechet_distance_of_moments(Moments.of(real), Moments.of(fake * torch.nan)))
    with pytest.raises(ValueError, match="of 16 and of 3 numbers"):
        frechet_distance_of_moments(Moments.of(real), Moments.of(real[:, :3]))


def test_metrics_of_the_same_features_are_torch_fidelitys(generator: torch.Generator) -> None:
    fid, kid, isc, prc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "isc", "prc"))
    real, fake = torch.randn(300, 24, generator=generator), 0.8 * torch.randn(250, 24, generator=generator) + 0.1
    statistics = [
        {"mu": each.double().mean(0).numpy(), "sigma": np.cov(each.double().numpy(), rowvar=False)}
        for each in (fake, real)
    ]
    theirs = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(real, fake) == pytest.approx(theirs, rel=1e-6)
    given = {"kid_subsets": 1, "kid_subset_size": 250, "kid_degree": 3, "kid_gamma": None, "kid_coef0": 1}
    given |= {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    given |= {"kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False}
    theirs = kid.kid_features_to_metric(fake.double(), real[:250].double(), **given)["kernel_inception_distance_mean"]
    assert kernel_distance(real[:250], fake, subsets=1)[0] == pytest.approx(theirs, rel=1e-6)
    logits = torch.randn(400, 10, generator=generator)
    theirs = isc.isc_features_to_metric(logits, splits=4, shuffle=False)["inception_score_mean"]
    assert inception_score(logits.double().softmax(1), chunk=100) == pytest.approx(theirs, rel=1e-6)
    theirs = prc.prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=100, verbose=False)
    found = neighbours(real, fake)
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_the_kernel_distance_has_no_bias(generator: torch.Generator) -> None:
    """Of equal distributions it is 0 on average, also of few images; of others it is the closed form."""
    pairs = [torch.randn(2, 40, 3, generator=generator, dtype=torch.float64) for _ in range(200)]
    equal = [kernel_distance(a, b, subsets=1)[0] for a, b in pairs]
    assert abs(np.mean(equal)) < 4 * np.std(equal) / math.sqrt(200)
    # One dimension, unit Gaussians, one shifted by 1: E (x y + 1)^3 by the moments of a Gaussian.
    x, y = torch.randn(2, 20_000, 1, generator=generator, dtype=torch.float64)
    expected = (1 + 3 * 1) + (1 + 3 + 3 * 4 + 16) - 2 * (1 + 3 * 0 + 3 * 2 + 0)
    found, spread = kernel_distance(x, y + 1, subsets=40, subset_size=500)
    assert found == pytest.approx(expected, abs=4 * spread / math.sqrt(40))
    with pytest.raises(ValueError, match="2 samples or more"):
        kernel_distance(x[:1], y)


def test_inception_score_of_sure_unsure_and_mixed_classifiers() -> None:
    assert inception_score(torch.eye(10)) == pytest.approx(10)  # certain, every class as often
    assert inception_score(torch.eye(10)[:4]) == pytest.approx(4)
    assert inception_score(torch.full((7, 10), 0.1)) == pytest.approx(1)  # it never knows
    assert inception_score(torch.eye(10)[[3, 3]]) == pytest.approx(1)  # one class only
    p, rows = 0.9, torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    divergence = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)  # the same for both rows
    assert inception_score(rows) == pytest.approx(math.exp(divergence))
    assert math.isnan(inception_score(torch.tensor([[math.nan, 1.0]])))
    for wrong in (torch.ones(3), torch.ones(0, 10)):
        with pytest.raises(ValueError, match="probabilities"):
            inception_score(wrong)
