"""Keyed random numbers: a function of the key alone."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from dmdr.randomness import Random

SAMPLES = torch.tensor([3, 0, 7, 11])


def draws(source: Random, samples: Tensor, purpose: str = "noise") -> dict[str, Tensor]:
    """Every kind of number, by kind; the leading dimension is the sample."""
    return {
        "normal": source.normal(purpose, samples, (2, 3)),
        "uniform": source.uniform(purpose, samples, 6.5, 7.5),
        "integers": source.integers(purpose, samples, 1000),
        "beta": source.beta(purpose, samples, 4, 1.5),
    }


def test_same_key_same_numbers() -> None:
    once, again = (draws(Random(1, 2, "rollout/0"), SAMPLES) for _ in range(2))
    assert all(torch.equal(once[kind], again[kind]) for kind in once)


def test_numbers_stay_the_same_between_versions() -> None:
    """A resumed run must draw what it would have drawn before an update of this package or of NumPy."""
    source = Random(0, 0, "rollout/0")
    assert source.integers("index", torch.arange(8), 4).tolist() == [2, 0, 3, 0, 0, 0, 0, 1]
    expected = torch.tensor([[0.430651009, 0.93209368, -2.18577528]])
    torch.testing.assert_close(source.normal("noise", torch.tensor([0]), (3,)), expected)


def test_each_part_of_the_key_matters() -> None:
    base = Random(1, 2, "rollout/0")
    others = [
        draws(Random(2, 2, "rollout/0"), SAMPLES),
        draws(Random(1, 3, "rollout/0"), SAMPLES),
        draws(Random(1, 2, "rollout/1"), SAMPLES),
        draws(base, SAMPLES, "renoise/eps"),
        draws(base, SAMPLES + 1),
    ]
    for kind, value in draws(base, SAMPLES).items():
        assert all(not torch.equal(value, other[kind]) for other in others), kind
        assert len(value.unique(dim=0)) == len(SAMPLES), kind


def test_parts_of_the_key_do_not_run_into_each_other() -> None:
    keys = [Random(1, 23, "a"), Random(12, 3, "a"), Random(123, 0, "a")]
    values = torch.stack([key.normal("b", torch.tensor([0]), (4,)) for key in keys])
    assert len(values.unique(dim=0)) == 3
    assert not torch.equal(
        Random(1, 2, "a").normal("b", torch.tensor([1]), (4,)), Random(1, 2, "a").normal("b/1", torch.tensor([1]), (4,))
    )


def test_a_sample_does_not_depend_on_its_batch() -> None:
    source = Random(1, 2, "rollout/0")
    whole = draws(source, SAMPLES)
    for row, sample in enumerate(SAMPLES):
        alone = draws(source, sample[None])
        assert all(torch.equal(whole[kind][row], alone[kind][0]) for kind in whole)
    order = torch.tensor([2, 0, 3, 1])
    permuted = draws(source, SAMPLES[order])
    assert all(torch.equal(whole[kind][order], permuted[kind]) for kind in whole)


def test_no_global_generator_is_read_or_moved() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    first = draws(Random(1, 2, "rollout/0"), SAMPLES)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(torch.equal(first[kind], value) for kind, value in draws(Random(1, 2, "rollout/0"), SAMPLES).items())


def test_dtypes() -> None:
    found = {kind: value.dtype for kind, value in draws(Random(0, 0, ""), SAMPLES).items()}
    assert found == {
        "normal": torch.float32,
        "uniform": torch.float64,
        "integers": torch.int64,
        "beta": torch.float64,
    }


def test_moments_over_samples() -> None:
    """Numbers of different keys are independent: means within 4 standard errors of the distributions'."""
    count = 4000
    source, samples = Random(5, 0, "rollout/0"), torch.arange(count)
    normal = source.normal("noise", samples, ()).double()
    assert normal.mean().abs() < 4 / count**0.5
    assert abs(normal.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((normal[1:] * normal[:-1]).mean()) < 4 / count**0.5
    uniform = source.uniform("u", samples, 2, 4)
    assert abs(uniform.mean() - 3) < 4 * (1 / 3 / count) ** 0.5
    assert uniform.min() >= 2
    assert uniform.max() < 4
    counts = source.integers("i", samples, 4).bincount(minlength=4)
    assert len(counts) == 4
    assert (counts - count / 4).abs().max() < 4 * (count * 3 / 16) ** 0.5


@pytest.mark.parametrize(("a", "b"), [(4, 1.5), (2.5, 1.25), (1, 1)])
def test_beta_has_its_mean(a: float, b: float) -> None:
    count = 20_000
    values = Random(5, 0, "rollout/0").beta("t", torch.arange(count), a, b)
    error = (a * b / ((a + b) ** 2 * (a + b + 1)) / count) ** 0.5
    assert abs(values.mean().item() - a / (a + b)) < 3 * error
    assert ((values >= 0) & (values <= 1)).all()
