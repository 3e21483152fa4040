"""Laws of renoise times, against their quantiles."""

import math

import pytest
import torch
from torch import Tensor

from dmdr.randomness import Random
from dmdr.times import T_MAX, T_MIN, Beta, LogitNormal, TimeLaw, Uniform

COUNT = 4000
QUANTILES = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)


def sigmoid_of_normal(mean: float, std: float) -> Tensor:
    return torch.sigmoid(mean + std * torch.special.ndtri(QUANTILES))


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (Uniform(), T_MIN + (T_MAX - T_MIN) * QUANTILES),
        (LogitNormal(0.0, 1.0), sigmoid_of_normal(0.0, 1.0)),
        (LogitNormal(1.0, 0.5), sigmoid_of_normal(1.0, 0.5)),
        (Beta(1.0, 1.0), QUANTILES),
        (Beta(2.0, 1.0), QUANTILES.sqrt()),
    ],
)
def test_shares_have_the_quantiles_of_their_law(law: TimeLaw, expected: Tensor) -> None:
    shares = law.shares(Random(0, 0, "rollout/0"), "t", torch.arange(COUNT))
    assert shares.dtype == torch.float64 and shares.shape == (COUNT,)
    for quantile, value in zip(QUANTILES, expected, strict=True):
        error = math.sqrt(quantile * (1 - quantile) / COUNT)
        assert abs((shares <= value).double().mean() - quantile) < 4 * error
    assert ((shares > 0) & (shares < 1)).all()


@pytest.mark.parametrize("law", [Uniform(), LogitNormal(0.0, 1.0), Beta(4.0, 1.5)])
def test_shares_belong_to_their_sample(law: TimeLaw) -> None:
    random, samples = Random(0, 3, "rollout/1"), torch.arange(6)
    whole = law.shares(random, "t", samples)
    assert torch.equal(torch.cat([law.shares(random, "t", part) for part in samples.split(4)]), whole)
    assert len({*whole.tolist(), *law.shares(random, "other", samples).tolist()}) == 12
