"""Checks of a plugin, for its author: `check_objective`, `check_reward`, `check_backend`.

Each runs a list of small checks (`OBJECTIVE_CHECKS`, ...), every one of which raises an AssertionError that says which
promise is broken and how to keep it. `pytest --dmdr-plugin NAME` runs the same lists, a test per check. They need no
GPU and no network; an objective is tried on the toy Gaussian mixture, whose latents are points of the plane and whose
images are 4 x 4.
"""

from dmdr.testing.backends import BACKEND_CHECKS, check_backend
from dmdr.testing.objectives import OBJECTIVE_CHECKS, check_objective
from dmdr.testing.rewards import REWARD_CHECKS, check_reward
from dmdr.testing.toy import toy_trainer
from dmdr.training.objectives import WeightedObjective

__all__ = [
    "BACKEND_CHECKS",
    "OBJECTIVE_CHECKS",
    "REWARD_CHECKS",
    "WeightedObjective",
    "check_backend",
    "check_objective",
    "check_reward",
    "toy_trainer",
]
