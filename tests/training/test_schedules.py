"""DynaDG, DynaRS and the learning rate, against their published shape."""

import math

import pytest

from dmdr.times import Beta
from dmdr.training.schedules import DynaDG, DynaRS, Schedule, cosine_decay

# Step, cosine, alpha, beta, mean of Beta(alpha, beta), share of the fake score; over 2000 steps from (4, 1.5) and 0.5.
TABLE = [
    (0, 1.0, 4.0, 1.5, 0.7273, 0.5),
    (500, 0.8536, 3.5607, 1.4268, 0.7139, 0.4268),
    (1000, 0.5, 2.5, 1.25, 0.6667, 0.25),
    (1500, 0.1464, 1.4393, 1.0732, 0.5729, 0.0732),
    (2000, 0.0, 1.0, 1.0, 0.5, 0.0),
    (2001, 0.0, 1.0, 1.0, 0.5, 0.0),
    (10**6, 0.0, 1.0, 1.0, 0.5, 0.0),
]


@pytest.mark.parametrize(("step", "cosine", "alpha", "beta", "mean", "share"), TABLE)
def test_table(step: int, cosine: float, alpha: float, beta: float, mean: float, share: float) -> None:
    law = DynaRS(4, 1.5, 2000)(step)
    a, b = law.alpha, law.beta
    found = (cosine_decay(step, 2000), a, b, a / (a + b), DynaDG(0.5, 2000)(step))
    assert found == pytest.approx((cosine, alpha, beta, mean, share), abs=5e-5)


def test_both_end_exactly() -> None:
    assert DynaDG(0.5, 2000)(0) == 0.5
    assert DynaRS(4, 1.5, 2000)(0) == Beta(4, 1.5)
    for step in (2000, 2001, 10**6):
        assert DynaDG(0.5, 2000)(step) == 0.0
        assert DynaRS(4, 1.5, 2000)(step) == Beta(1.0, 1.0)


def test_no_steps_switch_both_off() -> None:
    assert [DynaDG(0.5, 0)(step) for step in (0, 1, 100)] == [0.0] * 3
    assert [DynaRS(4, 1.5, 0)(step) for step in (0, 1, 100)] == [Beta(1.0, 1.0)] * 3


def test_learning_rate_is_constant() -> None:
    assert [Schedule(1.0, "constant", 10, 0)(step) for step in (0, 5, 9, 20)] == [1.0] * 4


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_learning_rate_warms_up_linearly(name: str) -> None:
    assert [Schedule(1.0, name, 10, 4)(step) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_learning_rate_decays_to_zero() -> None:
    linear = [Schedule(1.0, "linear", 12, 2)(step) for step in range(2, 13)]
    assert linear == pytest.approx([1 - k / 10 for k in range(11)], abs=1e-15)
    cosine = [Schedule(1.0, "cosine", 12, 2)(step) for step in range(2, 13)]
    assert cosine == pytest.approx([(1 + math.cos(math.pi * k / 10)) / 2 for k in range(11)], abs=1e-15)
    assert Schedule(1.0, "linear", 12, 2)(99) == Schedule(1.0, "cosine", 12, 2)(99) == 0.0


def test_warmup_that_fills_the_stage_divides_by_nothing() -> None:
    for name in ("constant", "linear", "cosine"):
        assert all(0 < Schedule(1.0, name, 4, 4)(step) <= 1 for step in range(5))
