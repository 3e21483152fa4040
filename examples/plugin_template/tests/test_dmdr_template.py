"""DMDR's own checks of what a plugin promises, and one of what this one is for."""

from dmdr.testing import WeightedObjective, check_objective, check_reward, toy_trainer
from dmdr_template import Brightness, TargetScore


def test_objective_keeps_its_promises() -> None:
    check_objective(TargetScore)


def test_reward_keeps_its_promises() -> None:
    check_reward(Brightness())


def test_scores_come_near_the_target() -> None:
    trainer = toy_trainer(
        WeightedObjective("target_score", 1.0, TargetScore(target=0.2)),
        reward=Brightness(),
        dmd_weight=0.0,
        learning_rate=1e-2,
    )
    distances = [trainer.train_step()["target_score/distance"] for _ in range(60)]
    assert distances[-1] < 0.5 * distances[0]
