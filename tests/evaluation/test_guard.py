"""A hacked reward is one that rises while something else falls, both beyond their noise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr.evaluation.guard import Look, compare, look_of, thumbnails, variety

PROMPTS = [f"prompt {index // 4}" for index in range(160)]


def look(*, gain: float = 0.0, held: float | None = None, spread: float = 1.0, shift: float = 0.0) -> Look:
    """Images of 40 prompts that vary around what each asks for, and their scores."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(40, 1, 192, generator=generator).expand(-1, 4, -1)
    images = centre + spread * 0.1 * torch.randn(40, 4, 192, generator=generator) + shift
    noise = torch.randn(2, 160, generator=generator)
    other = None if held is None else noise[1] + held
    jitter = torch.randn(160, generator=generator)
    return Look(PROMPTS, noise[0] + gain + 0.1 * (jitter if gain else 0), images.reshape(160, 192), other)


def causes(**now: Any) -> list[str]:
    held = 0.0 if "held" in now else None
    return compare(look(held=held), look(**now))[1]


def test_what_speaks_for_a_hacked_reward() -> None:
    rose, fell = causes(gain=0.5, spread=0.6)
    assert rose.startswith("the trained reward rose by 0.") and fell == (
        "images of one prompt differ 0.36 times as much as after stage 1"
    )
    assert "the held-out rewards fell by 0.4 (" in causes(gain=0.5, held=-0.4)[1]
    assert "0% of stage 1's images lie among the present ones" in causes(gain=0.5, shift=0.5)[1]


@pytest.mark.parametrize(
    "now",
    [
        {},
        {"gain": 0.5},
        {"gain": 0.5, "held": 0.2},
        {"gain": 0.5, "spread": 0.9},
        {"gain": 0.5, "spread": 1.3},
        {"spread": 0.5},  # nothing was gained by it
        {"gain": -0.5, "held": -0.5},
        {"gain": 0.005, "spread": 0.5},  # within the noise
    ],
    ids=str,
)
def test_what_does_not(now: dict[str, float]) -> None:
    assert causes(**now) == []


def test_metrics_for_the_log() -> None:
    metrics, _ = compare(look(held=0.0), look(gain=0.5, held=0.25, spread=0.9))
    assert metrics["reward_gain"] == pytest.approx(0.5, abs=0.05)
    assert metrics["held_out_gain"] == pytest.approx(0.25)
    assert metrics["variety"] == pytest.approx(0.81, abs=0.01)
    assert metrics["recall"] > 0.9


def test_variety_is_the_mean_squared_distance_of_pairs() -> None:
    small = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [5.0, 5.0]])
    found = variety(Look(["a", "a", "b", "a"], torch.zeros(4), small))
    assert found.tolist() == pytest.approx([(25 + 50 + 5) / 3])
    assert not len(variety(Look(["a", "b"], torch.zeros(2), small[:2])))


def test_images_of_one_prompt_each_and_few_of_them() -> None:
    one = Look(["a", "b", "c"], torch.zeros(3), torch.rand(3, 192))
    assert compare(one, one) == ({"reward_gain": 0.0}, [])
    with pytest.raises(ValueError, match="different prompts"):
        compare(one, Look(["a", "b", "d"], one.trained, one.thumbnails))


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (96, 160)])
def test_thumbnails_are_means_of_parts(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    small = thumbnails(images)
    assert small.shape == (2, 192) and small.dtype == torch.float32
    if size[0] % 8 == size[1] % 8 == 0:
        expected: Tensor = images.unfold(2, size[0] // 8, size[0] // 8).unfold(3, size[1] // 8, size[1] // 8)
        torch.testing.assert_close(small.view(2, 3, 8, 8), expected.mean((-1, -2)))


def test_it_is_kept_in_a_file() -> None:
    before = look(held=0.0)
    again = look_of(before.tensors(), PROMPTS)
    assert compare(before, again) == ({"reward_gain": 0.0, "held_out_gain": 0.0, "variety": 1.0, "recall": 1.0}, [])
    assert look_of(look().tensors(), PROMPTS).held_out is None
