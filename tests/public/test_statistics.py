"""Intervals hold as often as they say, against closed forms and SciPy's."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dmdr.statistics import bootstrap, jackknife, paired, prompt_means, standard_error, wilson


def test_images_of_a_prompt_are_one_observation() -> None:
    values = torch.tensor([1.0, 10.0, 3.0, math.nan, math.nan])
    means = prompt_means(values, ["a", "b", "a", "b", "c"])
    assert means[:2].tolist() == [2.0, 10.0] and means[2].isnan()
    assert standard_error(means) == pytest.approx(math.sqrt(32) / math.sqrt(2))
    assert math.isnan(standard_error(means[:1]))


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_an_interval_holds_in_95_of_100_experiments(kind: str) -> None:
    """500 synthetic experiments of 200 prompts with 4 images each, whose true mean is known."""
    random = np.random.default_rng(2)
    prompts = [index // 4 for index in range(800)]
    held = 0
    for experiment in range(500):
        of_prompt = random.normal(size=200) if kind == "normal" else random.exponential(size=200) - 1
        values = torch.tensor(np.repeat(of_prompt, 4) + random.normal(size=800) + 0.3)
        found = paired(values, torch.zeros(800), prompts, resamples=1000, seed=experiment)
        assert found.count == 200 and found.low < found.mean < found.high
        held += found.low <= 0.3 <= found.high
    assert 0.93 <= held / 500 <= 0.97


def test_the_interval_is_scipys() -> None:
    x = np.random.default_rng(1).gamma(1.5, size=60)
    found = bootstrap(torch.tensor(x), resamples=50_000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=50_000, method="BCa", random_state=0).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01 * x.std())


def test_what_cannot_be_compared() -> None:
    found = bootstrap(torch.tensor([1.0, math.nan, 3.0, math.inf]))
    assert (found.mean, found.count, found.left_out) == (2.0, 2, 2)
    single = bootstrap(torch.tensor([1.0]))
    assert single.mean == 1.0 and math.isnan(single.low)
    assert math.isnan(bootstrap(torch.tensor([])).mean)
    equal = bootstrap(torch.full((9,), 0.5))
    assert (equal.low, equal.high) == (0.5, 0.5)
    with pytest.raises(ValueError, match="3 and 2 values of 3 prompts cannot be paired"):
        paired(torch.zeros(3), torch.zeros(2), "abc")


def test_a_share() -> None:
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    theirs = stats.binomtest(37, 120).proportion_ci(method="wilson")
    assert wilson(37, 120) == pytest.approx((theirs.low, theirs.high))
    with pytest.raises(ValueError, match="3 of 2 is no share"):
        wilson(3, 2)


def test_the_jackknife_is_the_standard_error_of_a_mean_and_of_a_curved_statistic() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, generator=generator).double()
    error = jackknife(lambda index: values[index].mean()[None], list(range(60)), groups=60)
    assert error.item() == pytest.approx(standard_error(values), rel=1e-9)
    # Ten parts: right on average, here for the variance of Gaussians, whose squared error is 2 / (n - 1).
    found = []
    for _ in range(100):
        draws = torch.randn(200, generator=generator).double()
        found.append(jackknife(lambda index, x=draws: x[index].var()[None], list(range(200))).square().item())
    assert np.mean(found) == pytest.approx(2 / 199, rel=0.25)
    # Images of one prompt are left out together: pairs of the same value are no more than one.
    twice = jackknife(lambda index: values.repeat_interleave(2)[index].mean()[None], [i // 2 for i in range(120)])
    once = jackknife(lambda index: values[index].mean()[None], list(range(60)))
    assert twice.item() == pytest.approx(once.item(), rel=1e-9)
    assert jackknife(lambda index: values[index].mean()[None], ["a"] * 60).isnan().all()


def test_an_interval_within_strata_is_that_of_their_spread_alone() -> None:
    """Two kinds that differ by 10: the interval is as narrow as within each, and holds as often as it says."""
    generator = torch.Generator().manual_seed(0)
    kinds = ["a"] * 100 + ["b"] * 100
    held, widths = 0, []
    for seed in range(500):
        values = torch.randn(200, generator=generator).double()
        values[100:] += 10
        found = bootstrap(values, kinds, resamples=1000, seed=seed)
        held += found.low <= 5 <= found.high
        widths.append(found.high - found.low)
    assert 0.93 <= held / 500 <= 0.97
    assert np.mean(widths) == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.05)
    plain = bootstrap(values, resamples=400)
    assert plain.high - plain.low > 4 * np.mean(widths)
