"""DMDR's own checks of what a matching promises, and one of what this one is for."""

from dmdr.testing import check_matching, toy_trainer
from dmdr_template import UnitDMD


def test_matching_keeps_its_promises() -> None:
    check_matching(UnitDMD)


def test_the_direction_has_the_length() -> None:
    log = toy_trainer(matching=UnitDMD(length=2.0)).train_step()
    assert abs(log["loss/dmd"] - 0.5 * 2.0**2) < 1e-3  # which is half the mean square of the direction
