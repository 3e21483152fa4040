"""DMDR's own checks of what a reward promises, and one of what this one is for."""

import torch

from dmdr.testing import check_reward
from dmdr_template import Brightness


def test_reward_keeps_its_promises() -> None:
    check_reward(Brightness(power=2.0))


def test_a_brighter_image_scores_higher() -> None:
    dark, bright = Brightness()(torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 3, 8, 8), ["", ""])
    assert dark < bright
