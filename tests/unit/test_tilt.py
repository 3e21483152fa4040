"""Reward-tilted distribution matching: the weights by hand, their degenerate cases, and what they move."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr.tilt import RewardTilt, effective_sample_size, spread_out, standardised, tilt_weights
from dmdr.types import Condition, Direction, Draw, Rollout

NAN, INF = math.nan, math.inf
OPEN = (0.0, INF)  # no clipping


def test_example() -> None:
    weights = tilt_weights(torch.tensor([0.28, 0.30, 0.26, 0.29]), 0.02)
    torch.testing.assert_close(weights, torch.tensor([0.6975, 1.8960, 0.2566, 1.1500]), rtol=0, atol=5e-5)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.3, 0.1, 22.3, -1e4, 0.0])
def test_equal_rewards_weigh_exactly_one(dtype: torch.dtype, value: float) -> None:
    for count in (1, 2, 8, 12, 16, 24):
        rewards = torch.full((count,), value, dtype=dtype)
        for beta in (1e-12, 0.02, 1.0):
            assert torch.equal(tilt_weights(rewards, beta), torch.ones(count))
            assert torch.equal(tilt_weights(rewards.float(), beta), torch.ones(count))


@pytest.mark.parametrize("value", [0.3, 22.3, 1e4])
def test_rewards_that_differ_by_rounding_weigh_exactly_one(value: float) -> None:
    rewards = torch.full((8,), value)
    rewards[::2] = torch.nextafter(rewards[0], torch.tensor(INF))
    assert len(rewards.unique()) == 2
    assert torch.equal(tilt_weights(rewards, 1e-6), torch.ones(8))


@pytest.mark.parametrize("missing", [NAN, INF, -INF])
def test_what_cannot_be_judged_is_neutral_and_enters_no_statistic(missing: float) -> None:
    weights = tilt_weights(torch.tensor([0.28, missing, 0.30, 0.26, missing, 0.29]), 0.02)
    assert weights[[1, 4]].tolist() == [1.0, 1.0]
    alone = tilt_weights(torch.tensor([0.28, 0.30, 0.26, 0.29]), 0.02)
    assert torch.equal(weights[[0, 2, 3, 5]], alone)


def test_given_validity_wins_over_finiteness() -> None:
    valid = torch.tensor([True, True, False, True])
    weights = tilt_weights(torch.tensor([0.28, 0.30, 9.0, 0.29]), 0.02, valid=valid)
    assert weights[2] == 1
    assert torch.equal(weights[valid], tilt_weights(torch.tensor([0.28, 0.30, 0.29]), 0.02))


@pytest.mark.parametrize("rewards", [[NAN] * 4, [INF, -INF, NAN, NAN], [NAN, 0.7, NAN, NAN], [0.7], []])
def test_nothing_to_compare_is_plain_matching(rewards: list[float]) -> None:
    assert torch.equal(tilt_weights(torch.tensor(rewards), 0.02), torch.ones(len(rewards)))


@pytest.mark.parametrize("beta", [1e-12, 1e-3, 0.3, 1.0, 50.0, 1e12])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e30])
def test_weights_are_finite_have_mean_one_and_rise_with_the_reward(beta: float, scale: float) -> None:
    rewards = scale * torch.randn(16, generator=torch.Generator().manual_seed(0)).sort().values
    weights = tilt_weights(rewards, beta)
    assert weights.isfinite().all()
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert (weights.diff() >= 0).all()
    assert weights.max() / weights.min() <= 50 * (1 + 1e-6)


def test_huge_rewards() -> None:
    weights = tilt_weights(torch.tensor([1e4, -1e4, 1e4, 0.0]), 1.0, clip=OPEN)
    assert weights.tolist() == [2, 0, 2, 0]
    clipped = torch.tensor([2, 0.1, 2, 0.1])
    expected = clipped / clipped.mean()
    torch.testing.assert_close(tilt_weights(torch.tensor([1e4, -1e4, 1e4, 0.0]), 1.0), expected, rtol=1e-6, atol=0)


def test_hot_tilt_is_plain_matching_and_cold_tilt_takes_the_best() -> None:
    rewards = torch.tensor([0.28, 0.30, 0.26, 0.29])
    torch.testing.assert_close(tilt_weights(rewards, 1e9), torch.ones(4), rtol=0, atol=1e-7)
    assert tilt_weights(rewards, 1e-9, clip=OPEN).tolist() == [0, 4, 0, 0]
    winner = torch.tensor([0.1, 4, 0.1, 0.1])
    torch.testing.assert_close(tilt_weights(rewards, 1e-9), winner / winner.mean(), rtol=1e-6, atol=0)


def test_order_does_not_matter() -> None:
    rewards = torch.randn(32, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tilt_weights(rewards, 0.7)[order], tilt_weights(rewards[order], 0.7), rtol=1e-6, atol=0)


def test_level_of_the_reward_does_not_matter() -> None:
    rewards = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(tilt_weights(rewards, 0.7), tilt_weights(rewards + 100, 0.7), rtol=1e-6, atol=0)


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.ones(8)) == 1
    assert effective_sample_size(torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0])) == 1 / 8
    assert effective_sample_size(torch.tensor([2.0, 2, 0, 0])) == 0.5


def test_effective_sample_size_of_gaussian_rewards_follows_the_closed_form() -> None:
    """exp(-(std / beta)^2): about 85 % at beta = 2.5 std."""
    quantiles = torch.distributions.Normal(0, 0.02).icdf((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    for ratio in (1.5, 2.5, 5):
        found = effective_sample_size(tilt_weights(quantiles, ratio * 0.02, clip=OPEN))
        assert found.item() == pytest.approx(math.exp(-1 / ratio**2), abs=3e-3)


def test_spread_out() -> None:
    assert not spread_out(torch.full((4,), 0.3))
    assert not spread_out(torch.tensor([1e4, 1e4 + 1e-3]))
    assert spread_out(torch.tensor([0.30, 0.31]))
    assert spread_out(torch.tensor([1e4, 1e4 + 1]))


# --- Several rewards --------------------------------------------------------------------------------------------------


def test_each_reward_counts_in_units_of_its_own_spread() -> None:
    small, large = torch.tensor([0.1, 0.2, 0.3, 0.2]), torch.tensor([100.0, 300.0, 100.0, 500.0])
    total, valid = standardised({"small": small, "large": large}, {"small": 0.3, "large": 2.0})
    expected = 0.3 * (small.double() - 0.2) / math.sqrt(0.005) + 2 * (large.double() - 250) / math.sqrt(27_500)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    assert valid.all()
    assert total.dtype == torch.float64


def test_a_constant_reward_adds_exactly_nothing() -> None:
    varied = torch.tensor([0.1, 0.2, 0.3, 0.2])
    alone, _ = standardised({"a": varied}, {"a": 1.0})
    for constant in (torch.full((4,), 0.3), torch.full((4,), 22.3).half().float()):
        both, _ = standardised({"a": varied, "b": constant}, {"a": 1.0, "b": 5.0})
        assert torch.equal(both, alone)


def test_a_sample_counts_if_every_reward_judged_it() -> None:
    scores = {"a": torch.tensor([0.1, NAN, 0.3, 0.2, 0.5]), "b": torch.tensor([1.0, 2.0, INF, 5.0, 3.0])}
    total, valid = standardised(scores, {"a": 1.0, "b": 1.0})
    assert valid.tolist() == [True, False, False, True, True]
    assert total[~valid].tolist() == [0, 0]
    alone, _ = standardised({name: score[valid] for name, score in scores.items()}, {"a": 1.0, "b": 1.0})
    assert torch.equal(total[valid], alone)


def test_nobody_judged_is_zero_and_invalid() -> None:
    total, valid = standardised({"a": torch.full((3,), NAN)}, {"a": 1.0})
    assert total.tolist() == [0, 0, 0]
    assert not valid.any()


# --- As the trainer calls it ------------------------------------------------------------------------------------------


def call(
    tilt: RewardTilt, scores: dict[str, Tensor], weights: dict[str, float], rows: slice = slice(None)
) -> tuple[Tensor, dict[str, Any]]:
    """Weights of the rows of one process, which sees its own scores and gathers those of all."""
    index = torch.arange(len(next(iter(scores.values()))))[rows]
    state = torch.zeros(len(index), 2)
    cond = Condition([""] * len(index))
    rollout = Rollout(cond, torch.tensor([1.0, 0.0]), torch.stack([state, state]), state[None], index, index)
    logged: dict[str, Any] = {}

    def gather(values: Tensor) -> Tensor:
        (whole,) = (score for score in scores.values() if torch.equal(score[rows].nan_to_num(9), values.nan_to_num(9)))
        return whole

    ctx: Any = SimpleNamespace(
        scores=lambda rollout: {name: score[rollout.sample] for name, score in scores.items()},
        gather=gather,
        rewards=SimpleNamespace(parts={name: (weight, None) for name, weight in weights.items()}),
        log=logged.update,
    )
    draw: Draw = rollout.pick(torch.zeros(len(index), dtype=torch.int64))
    return tilt(draw, Direction(state), ctx), logged


SCORES = {
    "a": torch.randn(8, generator=torch.Generator().manual_seed(0)),
    "b": torch.randn(8, generator=torch.Generator().manual_seed(1)) * 100,
}


def test_temperature_is_in_standard_deviations_of_the_sum() -> None:
    weights = {"a": 0.3, "b": -0.1}
    total, _ = standardised(SCORES, weights)
    found, logged = call(RewardTilt(1.5), SCORES, weights)
    expected = tilt_weights(total, 1.5 * total.std(correction=0).item())
    assert torch.equal(found, expected)
    assert logged["tilt/max"] == expected.max()
    assert logged["tilt/effective_sample_size"] == effective_sample_size(expected)
    scaled, _ = call(RewardTilt(1.5), {"a": SCORES["a"] * 10 + 3, "b": SCORES["b"] / 7}, {"a": 3.0, "b": -1.0})
    torch.testing.assert_close(scaled, found, rtol=1e-5, atol=0)


def test_weights_do_not_depend_on_the_shards() -> None:
    scores = {**SCORES, "a": SCORES["a"].clone()}
    scores["a"][5] = NAN
    whole, _ = call(RewardTilt(1.5), scores, {"a": 1.0, "b": 1.0})
    shards = [call(RewardTilt(1.5), scores, {"a": 1.0, "b": 1.0}, rows)[0] for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(shards), whole)
    assert whole[5] == 1
    assert whole.mean().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("score", [torch.full((8,), 0.3), torch.full((8,), NAN), torch.tensor([0.3] + [NAN] * 7)])
def test_tilt_without_differences_is_plain_matching(score: Tensor) -> None:
    found, logged = call(RewardTilt(1.5), {"a": score}, {"a": 0.3})
    assert torch.equal(found, torch.ones(8))
    assert logged["tilt/max"] == logged["tilt/effective_sample_size"] == 1


# --- What it optimises ------------------------------------------------------------------------------------------------


def quantiles(count: int = 4001) -> Tensor:
    """Equally likely values of N(0, 1), with variance exactly one."""
    z = torch.distributions.Normal(0, 1).icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return z / z.square().mean().sqrt()


def root(function: Callable[[float], float], low: float, high: float) -> float:
    assert function(low) < 0 < function(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


@pytest.mark.parametrize("ratio", [0.1, 0.2, -0.2])
def test_a_student_that_cannot_match_moves_towards_the_reward(ratio: float) -> None:
    """Student theta + z, teacher N(0, 4), reward a x: matching rests at 0, its tilt at 3 a / beta.

    (The gradient of the reverse KL to the tilted teacher would rest at 4 a / beta: the weight is not that.)
    """

    def gradient(theta: float, ratio: float) -> float:
        x = theta + quantiles()
        direction = -(x - theta) + x / 4  # score of the student minus score of the teacher
        return (tilt_weights(ratio * x, 1.0, clip=OPEN).double() * direction).mean().item()

    assert root(lambda theta: gradient(theta, 0.0), -2, 2) == pytest.approx(0, abs=1e-6)
    assert root(lambda theta: gradient(theta, ratio), -2, 2) == pytest.approx(3 * ratio, abs=2e-3)


def test_a_student_that_can_match_ends_at_the_teacher_all_the_same() -> None:
    """Student m + s z, same teacher and reward: the tilted gradient vanishes at (0, 2) and leads there."""
    z, mean, std = quantiles(), 1.0, 1.0
    for _ in range(400):
        x = mean + std * z
        direction = -(x - mean) / std**2 + x / 4
        pull = tilt_weights(0.2 * x, 1.0, clip=OPEN).double() * direction
        mean, std = mean - pull.mean().item(), std - (pull * z).mean().item()
    assert (mean, std) == (pytest.approx(0, abs=1e-6), pytest.approx(2, abs=1e-6))
