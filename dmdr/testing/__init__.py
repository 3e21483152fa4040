"""Checks of a plugin, for its author.

`check_objective`, `check_reward`, `check_matching`, `check_sample_weight`, `check_backend` and `check_benchmark` run
lists of small checks (`OBJECTIVE_CHECKS`, ...), every one of which raises an AssertionError that says which promise is
broken and how to keep it. `pytest --dmdr-plugin NAME` runs the same lists, a test per check. They need no GPU and no
network; objectives, matchings and sample weights are tried on the toy Gaussian mixture, whose latents are points of the
plane and whose images are 4 x 4.
"""

from dmdr.testing.backends import BACKEND_CHECKS, check_backend
from dmdr.testing.benchmarks import BENCHMARK_CHECKS, check_benchmark
from dmdr.testing.matchings import MATCHING_CHECKS, check_matching
from dmdr.testing.objectives import OBJECTIVE_CHECKS, check_objective
from dmdr.testing.rewards import REWARD_CHECKS, check_reward
from dmdr.testing.sample_weights import SAMPLE_WEIGHT_CHECKS, check_sample_weight
from dmdr.testing.toy import toy_trainer
from dmdr.training.objectives import WeightedObjective

__all__ = [
    "BACKEND_CHECKS",
    "BENCHMARK_CHECKS",
    "MATCHING_CHECKS",
    "OBJECTIVE_CHECKS",
    "REWARD_CHECKS",
    "SAMPLE_WEIGHT_CHECKS",
    "WeightedObjective",
    "check_backend",
    "check_benchmark",
    "check_matching",
    "check_objective",
    "check_reward",
    "check_sample_weight",
    "toy_trainer",
]
