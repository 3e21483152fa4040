"""RL beside distribution matching: the ratio of their gradients, logged and held."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr_grpo import GRPO
from dmdr_nft import DiffusionNFT
from dmdr_refl import ReFL
from toy_trainer import ROWS, Plain, flat, prepared, state, step_of, trainer

POLICY = GRPO(init_same_noise=False)  # the rollouts of a run without it
SETTINGS: dict[str, Any] = {"rewards": Plain(), "batch": 16, "group_size": 4, "eta": 0.9, "rl_weight": 3.0}
SUMS: dict[str, list[Any]] = {
    "refl": [ReFL()],
    "grpo": [POLICY],
    "grpo and refl": [(2.0, POLICY), (0.5, ReFL())],
    "refl downhill": [(-1.0, ReFL()), (1.0, DiffusionNFT(old_decay=0.0))],
}


def gradients(objectives: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
    """Of matching, and of each objective alone, in the student's parameters: plain descent at rate 1 moves by them."""
    weighted = [each if isinstance(each, tuple) else (1.0, each) for each in objectives]
    matching = -step_of(trainer(**SETTINGS | {"rl_weight": 0.0}))
    return matching, [-step_of(trainer(objectives=[each], **SETTINGS)) - matching for each in weighted]


@pytest.mark.parametrize("micro_batch", [16, 8])
@pytest.mark.parametrize("name", SUMS)
def test_the_ratio_is_that_of_the_gradients_in_the_parameters(name: str, micro_batch: int) -> None:
    matching, each = gradients(SUMS[name])
    line = trainer(objectives=SUMS[name], **SETTINGS, micro_batch=micro_batch).train_step(noted=True)
    found = [value for key, value in line.items() if key.startswith("rl_ratio/")]
    expected = [grad.norm() / matching.norm() for grad in (each if len(each) == 1 else [*each, sum(each)])]
    assert found == pytest.approx([float(value) for value in expected], rel=1e-3)


def test_comparing_changes_no_bit_of_the_update() -> None:
    plain, compared = (trainer(objectives=SUMS["grpo and refl"], **SETTINGS) for _ in range(2))
    assert not any(key.startswith("rl_ratio") for key in plain.train_step())
    compared.train_step(noted=True)
    assert torch.equal(flat(state(plain)), flat(state(compared)))


@pytest.mark.parametrize("name", SUMS)
def test_the_ratio_is_held_and_shared_by_weight(name: str) -> None:
    """RL points where the objectives' unit gradients, each by its weight, point together."""
    matching, each = gradients(SUMS[name])
    running = trainer(objectives=SUMS[name], **SETTINGS | {"rl_weight": 0.7}, balances=True, micro_batch=8)
    before = flat(state(running))
    line = running.train_step()
    climbed = before - flat(state(running)) - matching
    assert float(climbed.norm() / matching.norm()) == pytest.approx(0.7, rel=1e-3)
    weights = [abs(term[0]) if isinstance(term, tuple) else 1.0 for term in SUMS[name]]
    wanted = sum(weight * grad / grad.norm() for weight, grad in zip(weights, each, strict=True))
    assert float(torch.nn.functional.cosine_similarity(climbed, wanted, dim=0)) == pytest.approx(1, abs=1e-4)
    found = [value for key, value in line.items() if key.startswith("rl_ratio/")]
    assert found[-1] == pytest.approx(0.7, rel=1e-3)
    assert found[0] / found[len(weights) - 1] == pytest.approx(weights[0] / weights[-1], rel=1e-3)


def test_with_nothing_to_learn_matching_goes_on_alone() -> None:
    unscored = Plain({row["prompt"]: math.nan for row in ROWS})
    alone, running = (
        trainer(objectives=objectives, **SETTINGS | {"rewards": unscored}, balances=True)
        for objectives in ([], [POLICY])
    )
    assert running.train_step()["rl_ratio/grpo"] == 0
    alone.train_step()
    assert torch.equal(flat(state(running)), flat(state(alone)))


def test_a_loss_scaler_changes_nothing() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    moved = [
        step_of(trainer(prepared(), objectives=SUMS["grpo and refl"], **SETTINGS, balances=True, **more))
        for more in ({}, {"scaler": scaler})
    ]
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-7)
