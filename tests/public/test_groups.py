"""Statistics within groups: closed forms, what does not count, and exact zeros where nothing differs."""

import math

import pytest
import torch
from torch import Tensor

from dmdr.groups import comparable, group_deviation, group_std, spread_out

NAN, INF = math.nan, math.inf
VALUES = torch.tensor([1.0, 10.0, 2.0, 6.0, 20.0, 3.0, 7.0])
GROUP = torch.tensor([10**15, -4, 10**15, 7, -4, 10**15, 7])  # any numbers, in any order
ALL = torch.ones(7, dtype=torch.bool)
DEVIATION = [-1.0, -5.0, 0.0, -0.5, 5.0, 1.0, 0.5]
STD = [(2 / 3) ** 0.5, 5.0, (2 / 3) ** 0.5, 0.5, 5.0, (2 / 3) ** 0.5, 0.5]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_by_hand() -> None:
    deviation = group_deviation(VALUES, GROUP, ALL)
    close(deviation, DEVIATION)
    close(group_std(deviation, GROUP, ALL), STD)
    assert comparable(GROUP, ALL).all()


def test_one_group_is_the_whole() -> None:
    group = torch.zeros(7, dtype=torch.int64)
    deviation = group_deviation(VALUES, group, ALL)
    close(deviation, (VALUES.double() - VALUES.double().mean()).tolist())
    close(group_std(deviation, group, ALL), [VALUES.double().std(correction=0).item()] * 7)


@pytest.mark.parametrize("missing", [NAN, INF, -INF, 1e30])
def test_what_is_not_valid_enters_nothing(missing: float) -> None:
    values, valid = VALUES.clone(), ALL.clone()
    values[[2, 4]], valid[[2, 4]] = missing, False  # of three, of two
    deviation = group_deviation(values, GROUP, valid)
    close(deviation, [-1.0, 0.0, 0.0, -0.5, 0.0, 1.0, 0.5])
    assert comparable(GROUP, valid).tolist() == [True, False, False, True, False, True, True]
    std = group_std(deviation, GROUP, valid)
    close(std[comparable(GROUP, valid)], [1.0, 0.5, 1.0, 0.5])
    assert std[[1, 4]].tolist() == [0, 0]


def test_alone_there_is_nothing_to_compare_with() -> None:
    singles, none = torch.arange(7), ~ALL
    for group, valid in ((singles, ALL), (GROUP, none), (singles, none)):
        assert not comparable(group, valid).any()
        deviation = group_deviation(VALUES, group, valid)
        assert torch.equal(deviation, torch.zeros(7, dtype=torch.float64))
        assert torch.equal(group_std(deviation, group, valid), torch.zeros(7, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.3, 0.1, 22.3])
@pytest.mark.parametrize("count", [8, 12, 16, 24])
def test_equal_values_deviate_by_exactly_nothing(dtype: torch.dtype, value: float, count: int) -> None:
    values, group = torch.full((count,), value, dtype=dtype), torch.zeros(count, dtype=torch.int64)
    valid = torch.ones(count, dtype=torch.bool)
    for number in (1, 2, 4):
        deviation = group_deviation(values, group + torch.arange(count) % number, valid)
        assert torch.equal(deviation, torch.zeros(count, dtype=torch.float64))
        assert torch.equal(group_std(deviation, group, valid), torch.zeros(count, dtype=torch.float64))
    assert not spread_out(values.double())


@pytest.mark.parametrize("value", [0.3, 22.3, -1e4])
def test_values_that_differ_by_rounding_are_equal(value: float) -> None:
    values = torch.full((8,), value)
    values[::2] = torch.nextafter(values[0], torch.tensor(INF))
    group = torch.arange(8) // 4
    assert not group_deviation(values, group, torch.ones(8, dtype=torch.bool)).any()
    values[0] += 1e-3 * max(1.0, abs(value))  # which is no rounding: its own group only is affected
    deviation = group_deviation(values, group, torch.ones(8, dtype=torch.bool))
    assert deviation[:4].all()
    assert not deviation[4:].any()


def test_order_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    values, group = torch.randn(32, generator=generator), torch.randint(0, 9, (32,), generator=generator) * 1000
    valid, order = torch.rand(32, generator=generator) < 0.7, torch.randperm(32, generator=generator)
    deviation = group_deviation(values, group, valid)
    close(group_deviation(values[order], group[order], valid[order]), deviation[order].tolist())
    std = group_std(deviation, group, valid)
    close(group_std(deviation[order], group[order], valid[order]), std[order].tolist())
    assert torch.equal(comparable(group[order], valid[order]), comparable(group, valid)[order])


@pytest.mark.parametrize("constant", [-3.0, 0.25, 1000.0])
def test_the_level_of_a_group_does_not_matter(constant: float) -> None:
    moved = VALUES.double() + constant * (GROUP == -4)
    close(group_deviation(moved, GROUP, ALL), DEVIATION)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_answers_are_float64_where_the_values_are(device: str, dtype: torch.dtype) -> None:
    values, group, valid = VALUES.to(device, dtype), GROUP.to(device), ALL.to(device)
    deviation = group_deviation(values, group, valid)
    std = group_std(deviation, group, valid)
    assert comparable(group, valid).device == valid.device
    for found, expected in ((deviation, DEVIATION), (std, STD)):
        assert (found.dtype, found.device) == (torch.float64, values.device)
        close(found.cpu(), expected)


def test_no_samples() -> None:
    empty, group = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert group_deviation(empty, group, group.bool()).shape == (0,)


def test_spread_out() -> None:
    assert not spread_out(torch.full((4,), 0.3))
    assert not spread_out(torch.tensor([1e4, 1e4 + 1e-3]))
    assert spread_out(torch.tensor([0.30, 0.31]))
    assert spread_out(torch.tensor([1e4, 1e4 + 1]))
