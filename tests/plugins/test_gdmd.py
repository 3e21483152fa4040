"""GDMD: weights by hand, of the images that the direction points to."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.types import Direction, Draw
from dmdr_gdmd import GDMD
from stubs import draw_of

NAN = float("nan")


def context(unscored: int | None = None) -> Any:
    """A step whose reward is the first element of latents."""

    def score(latents: Tensor, draw: Draw) -> dict[str, Tensor]:
        scores = latents[:, 0].float()
        if unscored is not None:
            scores[unscored] = NAN
        return {"first": scores}

    return SimpleNamespace(rewards=SimpleNamespace(weights={"first": 1.0}), score=score, gather=lambda values: values)


def of(x0: list[float], g: list[float]) -> tuple[Draw, Direction]:
    latents, move = (torch.tensor([[value, 7.0] for value in values], dtype=torch.float64) for values in (x0, g))
    return draw_of(latents), Direction(move)


def test_weights_follow_the_reward_of_where_the_direction_leads() -> None:
    """Rewards 1, 2, 3, 6 have the mean 3 and the deviation sqrt(3.5)."""
    draw, direction = of([5.0, 5.0, 5.0, 5.0], [4.0, 3.0, 2.0, -1.0])
    z = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 3.5**0.5
    expected = 1 + (z / 2).clamp(-1, 1)
    weights = GDMD()(draw, direction, context())
    torch.testing.assert_close(weights, expected / expected.mean(), rtol=1e-3, atol=1e-4)  # up to floors of deviations
    assert weights.dtype == torch.float32


def test_the_gain_is_what_the_update_adds() -> None:
    draw, direction = of([0.0, 10.0, 20.0, 30.0], [-1.0, 1.0, 1.0, -1.0])
    led, gained = GDMD()(draw, direction, context()), GDMD(gain=True)(draw, direction, context())
    assert (led.diff() > 0).all()
    torch.testing.assert_close(gained, torch.tensor([1.5, 0.5, 0.5, 1.5]), rtol=1e-3, atol=0)


def test_images_of_a_prompt_are_compared_with_each_other() -> None:
    draw, direction = of([0.0, 1.0, 100.0, 101.0], [0.0] * 4)
    weights = GDMD()(replace(draw, group=torch.tensor([0, 0, 1, 1])), direction, context())
    assert weights[0] == weights[2] < 1 < weights[1] == weights[3]


def test_a_missing_score_weighs_as_the_mean() -> None:
    draw, direction = of([0.0, 5.0, 1.0], [0.0] * 3)
    weights = GDMD()(draw, direction, context(unscored=1))
    assert weights[1] == 1.0 and weights[0] < 1 < weights[2]


def test_equal_rewards_weigh_exactly_one() -> None:
    draw, direction = of([0.3] * 5, [0.0] * 5)
    assert GDMD()(draw, direction, context()).tolist() == [1.0] * 5


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--limit must be above 0"):
        GDMD(limit=0.0)
