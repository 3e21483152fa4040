"""Metrics against closed forms and hand-made sets; images against the rounding of diffusers."""

import errno
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from dmdr.evaluation.metrics import (
    Evaluation,
    Moments,
    density_coverage,
    evaluate,
    frechet_distance,
    frechet_distance_of_moments,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dmdr.images import embed, image_grid, save, to_pil


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


def test_precision_and_recall_of_identical_and_distant_sets(generator: torch.Generator) -> None:
    real = torch.randn(100, 5, generator=generator)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)


def test_a_collapsed_student_is_precise_and_has_no_recall(generator: torch.Generator) -> None:
    real = torch.randn(200, 5, generator=generator)
    fake = real[7] + 1e-4 * torch.randn(200, 5, generator=generator)
    precision, recall = precision_recall(real, fake)
    assert precision == 1.0
    assert recall <= 0.01


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # radii for k = 1: 1, 1, 2, 7
    fake = torch.tensor([[-1.0], [-1.5], [4.5], [30.0]])  # radii for k = 1: .5, .5, 5.5, 25.5
    # -1 lies on the edge of the ball of 0, -1.5 in none, 4.5 in those of 3 and 10, 30 in none.
    assert precision_recall(real, fake, k=1) == (0.5, 1.0)
    # k = 2: radii of the real 3, 2, 3, 9 and of the fake 5.5, 6, 6, 31.5
    assert precision_recall(real, fake, k=2) == (0.75, 1.0)
    assert precision_recall(fake, real, k=2) == (1.0, 0.75)


def test_chunks_do_not_change_precision_and_recall(generator: torch.Generator) -> None:
    real, fake = torch.randn(2, 150, 40, generator=generator)
    whole = precision_recall(real, 0.8 * fake)
    assert 0 < whole[1] < whole[0] <= 1
    for limit in (1, 151, 7 * 150):
        assert precision_recall(real, 0.8 * fake, max_distances=limit) == whole


def test_points_that_are_not_finite_lie_outside() -> None:
    real = torch.arange(12.0)[:, None]
    fake = real.clone()
    fake[:3] = torch.nan
    assert precision_recall(real, fake)[0] == 0.75
    with pytest.raises(ValueError, match="4 samples or more"):
        precision_recall(real, real[:3])
    with pytest.raises(ValueError, match="k must be"):
        precision_recall(real, real, k=0)


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
    assert precision_recall(real, fake) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


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


def test_density_and_coverage_by_hand(generator: torch.Generator) -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # radii for k = 1: 1, 1, 2, 7
    fake = torch.tensor([[-1.0], [-1.5], [4.5], [30.0]])
    # -1 lies in the ball of 0 alone, 4.5 in those of 3 and 10, the others in none.
    assert density_coverage(real, fake, k=1) == (3 / 4, 3 / 4)
    points, others = torch.randn(2, 150, 6, generator=generator)
    whole = density_coverage(points, others)
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    radius = distances.sort(1).values[:, 5]
    inside = torch.cdist(others, points, compute_mode="donot_use_mm_for_euclid_dist") <= radius
    assert whole == pytest.approx((inside.sum().item() / (5 * 150), inside.any(0).float().mean().item()))
    assert density_coverage(points, others, max_distances=151) == whole
    assert density_coverage(points, points + 1000) == (0.0, 0.0)
    collapsed = points[3].expand(150, -1)
    assert density_coverage(points, collapsed)[1] < 0.1
    with pytest.raises(ValueError, match="more than 5 real images; there are 5"):
        density_coverage(points[:5], others)


class PixelJudge:
    """Sees the first pixel column; an image is correct where its mean is above its prompt."""

    def __init__(self, real: Tensor) -> None:
        self.real = real

    def features(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return images[:, 0, :, 0]

    embed = features

    def correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images.mean((1, 2, 3)) > torch.tensor([float(p) for p in prompts])).float()

    def reference(self) -> Tensor:
        return self.real


class TwoRewards:
    """`mean` is NaN for the images of prompt 1; `column` returns the column `label`."""

    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        asked = torch.tensor([float(p) for p in prompts])
        mean = torch.where(asked == 1, torch.nan, images.mean((1, 2, 3)))
        return {"mean": mean, "column": torch.tensor(columns["label"])}

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        return 2 * scores["mean"] + scores["column"]


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_evaluate(chunk: int, generator: torch.Generator) -> None:
    real, images = torch.rand(2, 20, 3, 4, 4, generator=generator)
    prompts = ["0"] * 15 + ["1"] * 5
    label = [float(i) for i in range(20)]
    metrics = evaluate(images, prompts, {"label": label}, PixelJudge(real), TwoRewards(), chunk=chunk).metrics
    assert set(metrics) == {
        *("accuracy", "frechet_distance", "precision", "recall"),
        *("reward/mean", "reward/column", "reward/total"),
    }
    means = images[:15].mean((1, 2, 3))
    features = real[:, 0, :, 0], images[:, 0, :, 0]
    assert metrics["accuracy"] == 0.75
    assert metrics["frechet_distance"] == frechet_distance(*features)
    assert (metrics["precision"], metrics["recall"]) == precision_recall(*features)
    assert metrics["reward/mean"] == pytest.approx(means.mean().item())  # NaN of prompt 1 is left out
    assert metrics["reward/column"] == 9.5
    assert metrics["reward/total"] == pytest.approx((2 * means + torch.arange(15.0)).mean().item())


def test_evaluate_without_judge_rewards_or_enough_images(generator: torch.Generator) -> None:
    images = torch.rand(3, 3, 4, 4, generator=generator)
    judge, columns = PixelJudge(images), {"label": [1.0, 2.0, 3.0]}
    assert evaluate(images, ["0"] * 3, {}, None, None) == Evaluation({}, {})
    assert evaluate(images, ["0"] * 3, {}, judge, None).metrics == {"accuracy": 1.0}
    metrics = evaluate(images, ["1"] * 3, columns, None, TwoRewards()).metrics
    assert metrics["reward/column"] == 2.0
    assert math.isnan(metrics["reward/mean"])
    with pytest.raises(ValueError, match="3 images to evaluate, 2 prompts, 4 label"):
        evaluate(images[:3], ["0"] * 2, {"label": [0.0] * 4}, judge, None)
    with pytest.raises(ValueError, match="0 images"):
        evaluate(images[:0], [], {}, judge, None)


def test_to_pil_rounds_as_diffusers_does(generator: torch.Generator) -> None:
    images = torch.rand(3, 3, 5, 7, generator=generator)
    images[0].flatten()[:6] = (torch.arange(6) + 0.5) / 255  # ties
    for dtype in (torch.float32, torch.bfloat16):
        stock = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images.to(dtype)))
        ours = to_pil(images.clone().requires_grad_().to(dtype))
        assert [i.size for i in ours] == [(7, 5)] * 3
        assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(ours, stock, strict=True))
    assert np.array(to_pil(torch.tensor([-1.0, 2.0, torch.nan]).reshape(1, 3, 1, 1))[0]).tolist() == [[[0, 255, 0]]]


@pytest.mark.parametrize(
    ("shape", "columns", "scale", "size"),
    [
        ((16, 8, 8), None, None, (4 * 50 - 2, 4 * 50 - 2)),  # 8 px cells become 48 px
        ((5, 8, 8), 10, None, (5 * 50 - 2, 48)),
        ((5, 8, 8), 2, 1, (2 * 10 - 2, 3 * 10 - 2)),
        ((3, 20, 30), None, None, (2 * 92 - 2, 2 * 62 - 2)),
        ((1, 512, 256), None, None, (256, 512)),
    ],
)
def test_grid_sizes(shape: tuple[int, ...], columns: int | None, scale: int | None, size: tuple[int, int]) -> None:
    count, height, width = shape
    assert image_grid(torch.zeros(count, 3, height, width), columns, scale).size == size


def test_grid_places_images_by_row_with_white_gaps() -> None:
    images = torch.tensor([0.0, 0.2, 0.4]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
    pixels = np.array(image_grid(images, columns=2, scale=2))[..., 0]
    assert [pixels[y, x] for y, x in ((0, 0), (15, 15), (0, 18), (18, 0))] == [0, 0, 51, 102]
    assert (pixels[:, 16:18] == 255).all()
    assert (pixels[16:, 18:] == 255).all()
    for bad in ({"columns": 0}, {"scale": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            image_grid(images, **bad)
    with pytest.raises(ValueError, match="at least one"):
        image_grid(images[:0])
    with pytest.raises(ValueError, match="must be"):
        image_grid(images[:, :1])


def test_save_is_complete_or_absent_and_embed_bounds_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples" / "step-000001.png"
    save(image_grid(torch.zeros(1, 3, 8, 8)), path)
    with Image.open(path) as image:
        assert image.size == (48, 48)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        save(image_grid(torch.ones(1, 3, 8, 8)), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    assert embed(path)[1:] == (48, 48)
    uri, *size = embed(path, max_width=24)
    assert uri.startswith("data:image/jpeg;base64,")
    assert size == [24, 24]


# ---- inception score


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


def test_only_a_judge_with_probabilities_gives_an_inception_score(generator: torch.Generator) -> None:
    class SureJudge(PixelJudge):
        def probabilities(self, images: Tensor) -> Tensor:
            return torch.eye(3)[torch.arange(len(images)) % 3]

    real, images = torch.rand(2, 6, 3, 2, 2, generator=generator)
    with_, without = (
        evaluate(images, ["0"] * 6, {}, kind(real), None, chunk=3).metrics for kind in (SureJudge, PixelJudge)
    )
    assert with_.pop("inception_score") == pytest.approx(3)
    assert with_ == without


def test_rewards_that_only_measure_are_named_apart(generator: torch.Generator) -> None:
    images, columns = torch.rand(4, 3, 2, 2, generator=generator), {"label": [1.0, 2.0, 3.0, 4.0]}
    trained = evaluate(images, ["0"] * 4, columns, None, TwoRewards()).metrics
    both = evaluate(images, ["0"] * 4, columns, None, TwoRewards(), TwoRewards()).metrics
    assert both == trained | {f"eval_{name}": value for name, value in trained.items()}
