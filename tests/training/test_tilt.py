"""Reward-tilted distribution matching: the weights by hand, their degenerate cases, and what they move."""

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.run.job import planned
from dmdr.settings.parse import parse
from dmdr.training.tilt import (
    DECAY,
    Divergence,
    Moments,
    RewardTilt,
    automatic_baseline,
    bounded,
    density_ratio,
    divergence_weight,
    effective_sample_size,
    ranks,
    standardised,
)
from dmdr.types import Condition, Direction, Draw, Rollout
from toy_trainer import tilt_weights

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
def test_what_cannot_be_scored_is_neutral_and_enters_no_statistic(missing: float) -> None:
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


def test_the_default_is_the_formula_to_the_bit() -> None:
    """As it was before there were others: recipes depend on it."""

    def formula(rewards: Tensor, beta: float) -> Tensor:
        w = ((rewards.double() - rewards.double().max()) / beta).exp()
        w = (w / w.mean()).clamp(0.1, 5.0)
        return (w / w.mean()).float()

    generator = torch.Generator().manual_seed(0)
    for count in (2, 7, 8, 24, 64):
        a, b = torch.randn(count, generator=generator), 100 * torch.rand(count, generator=generator)
        for beta in (0.1, 1.5, 30.0):
            assert torch.equal(tilt_weights(a, beta), formula(a, beta))
        parts = [(0.3, a.double()), (-2.0, b.double())]
        total = torch.zeros(count, dtype=torch.float64)
        for share, score in parts:
            total += share * (score - score.mean()) / score.std(correction=0)
        for tau in (0.5, 1.5, 4.0):
            found, _ = call(RewardTilt(tau), {"a": a, "b": b}, {"a": 0.3, "b": -2.0})
            assert torch.equal(found, formula(total, tau * total.std(correction=0).item()))


# --- Other weights ----------------------------------------------------------------------------------------------------


def test_linear_is_the_first_order_of_exp() -> None:
    rewards, all_ = torch.tensor([0.28, 0.30, 0.26, 0.29]), torch.ones(4, dtype=torch.bool)
    linear = density_ratio(rewards, 0.05, all_, linear=True)
    torch.testing.assert_close(linear, torch.tensor([0.95, 1.35, 0.55, 1.15]).double(), rtol=0, atol=1e-6)
    for beta in (10.0, 100.0):
        gap = density_ratio(rewards, beta, all_) - density_ratio(rewards, beta, all_, linear=True)
        assert gap.abs().max() < (0.04 / beta) ** 2
    assert density_ratio(rewards, 1e-3, all_, linear=True).min() < 0  # for the clip to deal with


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, -1.0, 7.0, 0.0, 5.0], [0.5, 0.0, 1.0, 0.25, 0.75]),
        ([1.0, 2.0, 2.0, 3.0], [0.0, 0.5, 0.5, 1.0]),
        ([2.0, 1.0, 2.0, 2.0, 1.0], [0.75, 0.125, 0.75, 0.75, 0.125]),
        ([0.1, 0.1, 0.1], [0.5, 0.5, 0.5]),
        ([4.0], [0.0]),
        ([], []),
    ],
)
def test_ranks(values: list[float], expected: list[float]) -> None:
    found = ranks(torch.tensor(values, dtype=torch.float64))
    assert found.dtype == torch.float64
    assert found.tolist() == expected
    assert ranks(torch.tensor(values, dtype=torch.float64) + 1e-9 * torch.rand(len(values))).tolist() == expected


TABLE: dict[Divergence, list[float]] = {
    "forward_kl": [0.1, 1, 10],
    "js": [1 / 11, 0.5, 10 / 11],
    "softened_reverse_kl": [10 / 11, 0.5, 1 / 11],
    "hellinger": [0.1**0.5, 1, 10**0.5],
    "jeffreys": [1.1, 2, 11],
    "neyman": [10, 1, 0.1],
    "reverse_kl": [1, 1, 1],
}
GENERATORS: dict[Divergence, Callable[[Tensor], Tensor]] = {  # f of E_q f(p / q), f-distill's table 1
    "forward_kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "hellinger": lambda r: (r.sqrt() - 1) ** 2,
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
    "reverse_kl": lambda r: -r.log(),
}


@pytest.mark.parametrize("name", get_args(Divergence))
def test_table_of_divergences(name: Divergence) -> None:
    ratio = torch.tensor([0.1, 1, 10], dtype=torch.float64)
    found = divergence_weight(name, ratio)
    torch.testing.assert_close(found, torch.tensor(TABLE[name], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", get_args(Divergence))
def test_divergence_weight_comes_from_its_divergence(name: Divergence) -> None:
    """h(rho) = f''(rho) rho^2, up to a constant."""
    ratio = torch.linspace(0.1, 5, 50, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[name](ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratio)
    found, expected = divergence_weight(name, ratio.detach()), (second * ratio**2).detach()
    torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-9, atol=0)


def test_a_divergence_weighs_the_clipped_ratio() -> None:
    ratio, valid = torch.tensor([0.01, 1.0, 3.0, 100.0, 1.0]).double(), torch.tensor([True] * 4 + [False])
    found = bounded(ratio, valid, (0.1, 5.0), "neyman")
    h = torch.tensor([10, 1, 1 / 3, 0.2])
    torch.testing.assert_close(found[:4], h / h.mean())
    assert found[4] == 1


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


def test_a_sample_counts_if_every_reward_scored_it() -> None:
    scores = {"a": torch.tensor([0.1, NAN, 0.3, 0.2, 0.5]), "b": torch.tensor([1.0, 2.0, INF, 5.0, 3.0])}
    total, valid = standardised(scores, {"a": 1.0, "b": 1.0})
    assert valid.tolist() == [True, False, False, True, True]
    assert total[~valid].tolist() == [0, 0]
    alone, _ = standardised({name: score[valid] for name, score in scores.items()}, {"a": 1.0, "b": 1.0})
    assert torch.equal(total[valid], alone)


def test_nothing_scored_is_zero_and_invalid() -> None:
    total, valid = standardised({"a": torch.full((3,), NAN)}, {"a": 1.0})
    assert total.tolist() == [0, 0, 0]
    assert not valid.any()


# --- As the trainer calls it ------------------------------------------------------------------------------------------


def call(
    tilt: RewardTilt,
    scores: dict[str, Tensor],
    weights: dict[str, float],
    rows: slice = slice(None),
    group: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Weights of the rows of one process, for scores and groups (by default, of one) of the global batch."""
    whole = torch.arange(len(next(iter(scores.values()))))
    index, group = whole[rows], whole if group is None else group
    state = torch.zeros(len(index), 2)
    cond = Condition([""] * len(index))
    states = torch.stack([state, state])
    rollout = Rollout(cond, torch.tensor([1.0, 0.0]), states, state[None], index, group[rows])
    logged: dict[str, Any] = {}

    ctx: Any = SimpleNamespace(
        global_scores=lambda: (scores, group),
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


def test_share_of_clipped_weights() -> None:
    scores = {"a": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, NAN, NAN])}
    _, logged = call(RewardTilt(0.5), scores, {"a": 1.0})
    assert logged["tilt/clipped"] == pytest.approx(0.8)  # the ratios are e^-6 and nearly 8
    _, logged = call(RewardTilt(0.5, tilt_clip=[0.1, 9.0]), scores, {"a": 1.0})
    assert logged["tilt/clipped"] == pytest.approx(0.7)
    _, logged = call(RewardTilt(50.0), scores, {"a": 1.0})
    assert logged["tilt/clipped"] == 0


def test_linear_and_rank_by_hand() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 2.0, 4.0, 6.0])}  # mean 3, variance 3.2
    found, _ = call(RewardTilt(2.0, tilt_weight="linear"), scores, {"a": 0.7})
    torch.testing.assert_close(found.double(), 1 + (scores["a"].double() - 3) / 3.2**0.5 / 2, rtol=1e-6, atol=0)
    found, _ = call(RewardTilt(2.0, tilt_weight="rank"), scores, {"a": 0.7})
    z = torch.tensor([-0.5, -0.125, -0.125, 0.25, 0.5], dtype=torch.float64)
    z = z / z.std(correction=0)
    expected = (z / 2).exp() / (z / 2).exp().mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    far, _ = call(RewardTilt(2.0, tilt_weight="rank"), {"a": torch.tensor([-1e4, 2.0, 2.0, 2.1, 1e4])}, {"a": 0.7})
    assert torch.equal(far, found)


# --- What holds for all of them ---------------------------------------------------------------------------------------

SETTINGS = [
    *(
        {"tilt_weight": weight, "tilt_baseline": b}
        for weight in ("exp", "linear", "rank")
        for b in ("batch", "prompt_group", "ema")
    ),
    *(
        {"tilt_divergence": divergence, "tilt_baseline": b}
        for divergence in get_args(Divergence)[1:]
        for b in ("batch", "prompt_group", "ema")
    ),
]
PAIRS = torch.arange(8) // 2
RISING = {"forward_kl", "js", "hellinger", "jeffreys"}
every = pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings.values()))


def experienced(settings: dict[str, Any], tau: float = 1.5, names: str = "a") -> RewardTilt:
    """A tilt that has been at it for a while, which matters over time only."""
    tilt, generator = RewardTilt(tau, **settings), torch.Generator().manual_seed(5)
    for _ in range(20):
        scores = {name: torch.randn(8, generator=generator) for name in names}
        call(tilt, scores, dict.fromkeys(names, 1.0), group=PAIRS)
    return tilt


@every
@pytest.mark.parametrize("value", [0.3, 22.3, -1e4, 0.0])
def test_equal_rewards_weigh_exactly_one_in_all(settings: dict[str, Any], value: float) -> None:
    for count, dtype in ((8, torch.float32), (12, torch.float32), (16, torch.bfloat16), (24, torch.float16)):
        score = torch.full((count,), value, dtype=dtype).float()
        tilt = RewardTilt(1.5, **settings)
        for _ in range(4):
            found, logged = call(tilt, {"a": score}, {"a": 0.3}, group=torch.arange(count) // 4)
            assert torch.equal(found, torch.ones(count))
            assert logged == {"tilt/effective_sample_size": 1, "tilt/max": 1, "tilt/clipped": 0}


@every
@pytest.mark.parametrize("missing", [NAN, INF, -INF])
def test_what_cannot_be_scored_is_neutral_in_all(settings: dict[str, Any], missing: float) -> None:
    scores, weights = {name: score.clone() for name, score in SCORES.items()}, {"a": 1.0, "b": 0.3}
    scores["a"][5], scores["b"][6:] = missing, missing
    kept = torch.arange(5)  # 5 and the last pair are not scored: with groups, 4 has nobody to be compared with
    tilt, other = experienced(settings, names="ab"), experienced(settings, names="ab")
    for _ in range(2):  # the second call would show what the first has learned from the others
        found, _ = call(tilt, scores, weights, group=PAIRS)
        alone, _ = call(other, {name: score[kept] for name, score in scores.items()}, weights, group=PAIRS[kept])
        assert found[5:].tolist() == [1, 1, 1]
        assert torch.equal(found[kept], alone)
        assert len(found[:4].unique()) > 1 or settings.get("tilt_divergence") == "reverse_kl"
        assert found[4] == 1 or settings["tilt_baseline"] != "prompt_group"


@every
def test_nothing_scored_is_plain_matching_in_all(settings: dict[str, Any]) -> None:
    tilt = experienced(settings)
    before = tilt.state_dict()
    found, logged = call(tilt, {"a": torch.full((8,), NAN)}, {"a": 1.0}, group=PAIRS)
    assert torch.equal(found, torch.ones(8))
    assert logged == {"tilt/effective_sample_size": 1, "tilt/max": 1, "tilt/clipped": 0}
    assert tilt.state_dict() == before


@every
@pytest.mark.parametrize("tau", [1e-9, 0.5, 1e9])
def test_weights_are_finite_and_have_mean_one_in_all(settings: dict[str, Any], tau: float) -> None:
    tilt = experienced(settings, tau)
    for scale in (1e-3, 1.0, 1e4, 1e30):
        found, _ = call(tilt, {"a": scale * SCORES["a"]}, {"a": 1.0}, group=PAIRS)
        assert found.isfinite().all()
        assert found.max() / found.min() <= 50 * (1 + 1e-6)
        if settings["tilt_baseline"] != "ema":
            assert found.mean().item() == pytest.approx(1, abs=1e-6)
        if tau == 1e9:
            torch.testing.assert_close(found, torch.ones(8), rtol=0, atol=1e-6)


@every
def test_weights_follow_the_reward_in_all(settings: dict[str, Any]) -> None:
    score = torch.tensor([0.1, 0.4, 0.1, 0.4, 0.2, 0.3, 0.4, 0.1])  # of each pair, the mean is the same
    found, _ = call(experienced(settings), {"a": score}, {"a": 1.0}, group=PAIRS)
    steps = found[[0, 4, 5, 1]].diff()
    divergence = settings.get("tilt_divergence", "forward_kl")
    assert (steps > 0).all() if divergence in RISING else (steps <= 0).all()
    for equal in ([0, 2, 7], [1, 3, 6]):
        torch.testing.assert_close(found[equal], found[equal[:1]].expand(3), rtol=1e-6, atol=0)


@every
def test_shards_and_order_do_not_matter_in_all(settings: dict[str, Any]) -> None:
    scores, weights = {**SCORES, "a": SCORES["a"].clone()}, {"a": 1.0, "b": 1.0}
    scores["a"][5] = NAN
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    whole, *shards = (
        call(experienced(settings, names="ab"), scores, weights, rows, PAIRS)[0]
        for rows in (slice(None), slice(0, 4), slice(4, 8))
    )
    assert torch.equal(torch.cat(shards), whole)
    mixed = {name: score[order] for name, score in scores.items()}
    found, _ = call(experienced(settings, names="ab"), mixed, weights, group=PAIRS[order])
    torch.testing.assert_close(found, whole[order], rtol=1e-6, atol=0)


@every
def test_rewards_that_differ_by_rounding_weigh_exactly_one_in_all(settings: dict[str, Any]) -> None:
    alike = torch.full((8,), 22.3)
    alike[::3] = torch.nextafter(alike[0], torch.tensor(INF))
    generator = torch.Generator().manual_seed(0)
    tilt, other = RewardTilt(1e-3, **settings), RewardTilt(1e-3, **settings)
    for _ in range(4):
        found, _ = call(tilt, {"a": alike.roll(1)}, {"a": 1.0}, group=PAIRS)
        assert torch.equal(found, torch.ones(8))
        score = torch.randn(8, generator=generator)
        found, _ = call(other, {"a": score, "b": -3 * score}, {"a": 0.3, "b": 0.3}, group=PAIRS)  # they cancel
        assert torch.equal(found, torch.ones(8))


@every
def test_the_first_sample_of_all_has_weight_one(settings: dict[str, Any]) -> None:
    found, _ = call(RewardTilt(1.5, **settings), {"a": torch.tensor([0.7])}, {"a": 1.0})
    assert found.tolist() == [1]


# --- What a reward is compared with -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "baseline"),
    [([0], "ema"), ([0, 1, 2], "batch"), ([0, 0, 1, 1], "prompt_group"), ([3, 3], "prompt_group")],
)
def test_automatic_baseline(group: list[int], baseline: Any) -> None:
    assert automatic_baseline(torch.tensor(group)) == baseline
    score = {"a": torch.linspace(0, 1, len(group))}
    found, expected = RewardTilt(1.5), RewardTilt(1.5, tilt_baseline=baseline)
    for _ in range(2):
        score = {"a": score["a"] ** 2 + 0.1}
        weights, _ = call(found, score, {"a": 1.0}, group=torch.tensor(group))
        assert torch.equal(weights, call(expected, score, {"a": 1.0}, group=torch.tensor(group))[0])


@pytest.mark.parametrize("weight", ["exp", "linear", "rank"])
def test_by_group_the_level_of_a_prompt_does_not_matter(weight: Any) -> None:
    score = torch.tensor([1.0, 3, 4, 2, 1, 1, 5, 2], dtype=torch.float64) / 16
    group = torch.tensor([7, 2, 7, 2, 7, 2, 7, 2])
    tilt = RewardTilt(1.5, tilt_weight=weight, tilt_baseline="prompt_group")
    found, _ = call(tilt, {"a": score}, {"a": 1.0}, group=group)
    assert len(found.unique()) > 4
    for constant in (-3.0, 1000.0):
        moved, _ = call(tilt, {"a": score + constant * (group == 2)}, {"a": 1.0}, group=group)
        torch.testing.assert_close(moved, found, rtol=1e-6, atol=0)
        total, valid = standardised({"a": score + constant * (group == 2)}, {"a": 1.0}, group)
        torch.testing.assert_close(total, standardised({"a": score}, {"a": 1.0}, group)[0], rtol=0, atol=1e-12)
        assert valid.all()
    others, _ = call(
        RewardTilt(1.5, tilt_weight=weight, tilt_baseline="batch"), {"a": score + 1000.0 * (group == 2)}, {"a": 1.0}
    )
    assert others[group == 2].min() > others[group == 7].max()  # which the batch prefers


def test_by_group_by_hand() -> None:
    """Deviations -1, 1 of a prompt at 1 and -3, 3 of one at 103, in units of their common spread sqrt(5)."""
    scores, group = {"a": torch.tensor([0.0, 2.0, 100.0, 106.0])}, torch.tensor([0, 0, 1, 1])
    found, _ = call(RewardTilt(2.0), scores, {"a": 0.4}, group=group)
    w = (torch.tensor([-1.0, 1.0, -3.0, 3.0]).double() / 5**0.5 / 2).exp()
    torch.testing.assert_close(found.double(), w / w.mean(), rtol=1e-6, atol=0)


def test_by_group_a_sample_alone_is_neutral() -> None:
    scores = {"a": torch.tensor([0.1, 0.5, 9.0, 0.3, NAN, 0.2, 0.4]), "b": torch.tensor([1.0, 2, 0, 3, 1, 5, 2])}
    group, weights = torch.tensor([0, 0, 1, 2, 2, 3, 3]), {"a": 1.0, "b": 1.0}
    found, _ = call(RewardTilt(1.5, tilt_baseline="prompt_group"), scores, weights, group=group)
    assert found[[2, 3, 4]].tolist() == [1, 1, 1]
    kept = torch.tensor([0, 1, 5, 6])
    alone, _ = call(RewardTilt(1.5), {n: score[kept] for n, score in scores.items()}, weights, group=group[kept])
    assert torch.equal(found[kept], alone)
    assert found.mean().item() == pytest.approx(1, abs=1e-6)
    singles, _ = call(RewardTilt(1.5, tilt_baseline="prompt_group"), SCORES, weights)
    assert torch.equal(singles, torch.ones(8))


def test_a_batch_of_one_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tilt = RewardTilt(1.5, tilt_baseline="batch")
    with caplog.at_level(logging.WARNING, logger="dmdr"):
        for value in (0.1, 0.7, 0.3):
            assert call(tilt, {"a": torch.tensor([value])}, {"a": 1.0})[0].tolist() == [1]
        call(RewardTilt(1.5), {"a": torch.tensor([0.3])}, {"a": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "RT-DM gives weight 1 to a global batch of one image: use --tilt_baseline ema"
    ]


# --- Over time --------------------------------------------------------------------------------------------------------


def decaying(count: int) -> Tensor:
    """Shares of calls in their average, the oldest first, [count]."""
    shares = DECAY ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return shares / shares.sum()


def test_moments_are_corrected_moving_averages() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [50 + torch.randn(count, generator=generator, dtype=torch.float64) for count in (1, 3, 1, 2, 0, 5)]
    moments = Moments()
    for batch in batches:
        moments.add(batch)
    counted = [batch for batch in batches if len(batch)]
    shares = decaying(len(counted))
    mean = sum(share * batch.mean() for share, batch in zip(shares, counted, strict=True))
    square = sum(share * (batch**2).mean() for share, batch in zip(shares, counted, strict=True))
    assert (moments.count, moments.mean) == (5, pytest.approx(float(mean), rel=1e-12))
    assert moments.var == pytest.approx(float(square - mean**2), rel=1e-9)


def test_over_time_by_hand() -> None:
    """As in a batch: standardised, summed, in units of the spread of the sum; exp over its mean, twice."""
    tilt = RewardTilt(2.0, tilt_baseline="ema")
    raw, total, w, ratio = (torch.zeros(0, dtype=torch.float64) for _ in range(4))
    for count, value in enumerate([3.0, 5.0, 4.5, 1.0], start=1):
        found, _ = call(tilt, {"a": torch.tensor([value])}, {"a": 0.3})
        shares = decaying(count)
        raw = torch.cat([raw, torch.tensor([value]).double()])
        mean = (shares * raw).sum()
        std = (shares * (raw - mean) ** 2).sum().sqrt()
        total = torch.cat([total, 0.3 * (raw[-1:] - mean) / std.clamp_min(1e-9)])
        z = total[-1:] / (shares * total**2).sum().sqrt().clamp_min(1e-9)
        w = torch.cat([w, (z / 2).exp()])
        ratio = torch.cat([ratio, w[-1:] / (shares * w).sum()])
        expected = ratio[-1:] / (shares * ratio).sum()
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
        assert (expected > 1).item() == (count == 2)


@pytest.mark.parametrize(
    "settings", [{}, {"tilt_weight": "linear"}, {"tilt_weight": "rank"}, {"tilt_divergence": "js"}], ids=str
)
def test_over_time_the_first_call_only_learns(settings: dict[str, Any]) -> None:
    tilt = RewardTilt(1.5, tilt_baseline="ema", **settings)
    assert torch.equal(call(tilt, SCORES, {"a": 1.0, "b": 1.0})[0], torch.ones(8))
    assert len(call(tilt, SCORES, {"a": 1.0, "b": 1.0})[0].unique()) > 6


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tilt_weight": "linear"},
        {"tilt_weight": "rank"},
        {"tilt_divergence": "jeffreys"},
        {"tilt_divergence": "neyman"},
    ],
    ids=str,
)
def test_over_time_weights_have_mean_one(settings: dict[str, Any], count: int) -> None:
    """For a reward whose level and scale drift slowly."""
    tilt, generator = RewardTilt(1.5, tilt_baseline="ema", **settings), torch.Generator().manual_seed(0)
    found, z = [], []
    for step in range(1500):
        z.append(torch.randn(count, generator=generator))
        score = 20 + step / 1000 + (1 + step / 1500) * z[-1]
        found.append(call(tilt, {"a": score, "b": -score}, {"a": 1.0, "b": -0.5})[0])
    weights, z = torch.cat(found[100:]), torch.cat(z[100:])
    assert weights.mean().item() == pytest.approx(1, abs=0.02)
    assert 0.2 < weights.std() < 1.5
    assert torch.corrcoef(torch.stack([weights, z]))[0, 1].abs() > 0.8
    if settings in ({}, {"tilt_weight": "rank"}):
        uniform = math.sqrt(12) * (torch.special.ndtr(z) - 0.5)
        exact = ((uniform if settings else z) / 1.5).exp()
        exact = (exact / exact.mean()).clamp(0.1, 5)
        assert (weights - exact).square().mean().sqrt() < 0.2


def test_over_time_a_jump_is_bounded_after_a_constant() -> None:
    tilt = RewardTilt(1.5, tilt_baseline="ema")
    for _ in range(50):
        assert call(tilt, {"a": torch.tensor([0.3])}, {"a": 1.0})[0].tolist() == [1]
    for value in (1e4, -1e4, 0.3):
        found, _ = call(tilt, {"a": torch.tensor([value])}, {"a": 1.0})
        assert found.isfinite().all()
        assert 0 < found.item() <= 5


@pytest.mark.parametrize(
    "settings", [{}, {"tilt_weight": "linear"}, {"tilt_weight": "rank"}, {"tilt_divergence": "js"}], ids=str
)
def test_over_time_the_state_is_all_there_is(settings: dict[str, Any]) -> None:
    def tilts() -> RewardTilt:
        return RewardTilt(1.5, tilt_baseline="ema", **settings)

    whole, generator = tilts(), torch.Generator().manual_seed(0)
    scores = [{n: torch.randn(2, generator=generator) for n in "ab"} for _ in range(12)]
    weights = {"a": 1.0, "b": 0.3}
    expected = [call(whole, score, weights)[0] for score in scores]
    first, second = tilts(), tilts()
    for score in scores[:6]:
        call(first, score, weights)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    found = [call(second, score, weights)[0] for score in scores[6:]]
    assert torch.equal(torch.cat(found), torch.cat(expected[6:]))
    fresh = [call(tilts(), score, weights)[0] for score in scores[6:]]
    assert not torch.equal(torch.cat(fresh), torch.cat(expected[6:]))


def test_without_time_there_is_no_state() -> None:
    for baseline in ("batch", "prompt_group"):
        assert experienced({"tilt_baseline": baseline}).state_dict() == {}


# --- Flags ------------------------------------------------------------------------------------------------------------


def test_flags() -> None:
    def built(*flags: str) -> Any:
        (chosen,) = parse(["--model", "toy", *flags]).of("sample_weights")
        return chosen.build()

    assert built() == RewardTilt(1.5)
    given = ["--tilt_weight", "rank", "--tilt_baseline", "prompt_group", "--num_generations", "2"]
    assert built(*given) == RewardTilt(1.5, tilt_weight="rank", tilt_baseline="prompt_group")
    assert built("--tilt_divergence", "js").tilt_divergence == "js"
    assert RewardTilt(0.0).idle and not RewardTilt(0.1).idle
    assert parse(["--model", "toy", "--reward", "none"]).of("sample_weights") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"tilt_baseline": "prompt_group"},
            "--sample_weight rt_dm needs --num_generations of at least 2, not 1",
        ),
        (
            {"tilt_weight": "linear", "tilt_divergence": "js"},
            "--tilt_weight must be exp with --tilt_divergence js, not linear",
        ),
        ({"tilt_divergence": "kl"}, "--rt_dm_tilt_divergence must be one of forward_kl, js,"),
        (
            {"tilt_baseline": "never"},
            "--rt_dm_tilt_baseline must be one of batch, prompt_group, ema or null, not 'never'",
        ),
    ],
)
def test_flags_that_cannot_be_meant(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        planned(parse(settings={"model": "toy", **settings}))
    assert said in str(error.value)


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
