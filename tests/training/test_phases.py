"""The clock: whose time is whose, on the host and on a GPU that is pretended."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from dmdr.evaluation.names import TIMES
from dmdr.training import phases
from dmdr.training.phases import OTHER, PHASES, Clock, phase
from dmdr.training.tilt import RewardTilt
from dmdr_refl import ReFL
from toy_trainer import Plain, trainer

CPU = torch.device("cpu")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The host's time, as the test has it."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@dataclass
class Event:
    """Of a GPU that runs when it is told to: `done` marks have been passed, each takes the time of its place."""

    at: ClassVar[list["Event"]] = []
    done: ClassVar[int] = 0
    waited: ClassVar[int] = 0
    enable_timing: bool = False

    def record(self) -> None:
        self.number = len(self.at)
        self.at.append(self)

    def query(self) -> bool:
        return self.number < Event.done

    def synchronize(self) -> None:
        Event.waited += 1
        Event.done = len(self.at)

    def elapsed_time(self, later: "Event") -> float:
        assert self.query() and later.query()
        return sum(1000.0 * number for number in range(self.number + 1, later.number + 1))


def test_a_phase_within_another_counts_once(host: list[float]) -> None:
    clock = Clock(CPU)

    @phase("reward")
    def score() -> None:
        host[0] += 2
        with phase("communication"):
            host[0] += 1

    with clock:
        host[0] += 1
        with phase("student"):
            host[0] += 3
            score()
            host[0] += 1
        shares = clock.read()
        assert shares == dict.fromkeys(PHASES, 0.0) | {
            "student": 0.5, "reward": 0.25, "communication": 0.125, OTHER: 0.125
        }  # fmt: skip
        host[0] += 5
        assert clock.read()[OTHER] == 1.0  # of the time since
    host[0] += 100  # between two stages
    with clock:
        with phase("rollout"):
            host[0] += 1
        assert clock.read()["rollout"] == 1.0


def test_an_error_ends_its_phases(host: list[float]) -> None:
    with Clock(CPU) as clock:
        with pytest.raises(KeyError), phase("student"), phase("reward"):
            raise KeyError
        host[0] += 1
        assert clock.read()[OTHER] == 1.0


def test_a_gpu_is_waited_for_where_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(phases, "SETTLE_AT", 4)
    Event.at, Event.done, Event.waited = [], 0, 0
    with Clock(torch.device("cuda")) as clock:
        with phase("student"), phase("reward"):
            Event.done = 2
        assert Event.waited == 0 and len(clock._marks) == 3  # the first was settled on the way
        shares = clock.read()
        # marks 1 .. 5 end other, student, reward, student and other, and take as many seconds
        assert Event.waited == 1
        assert shares["student"] == pytest.approx((2 + 4) / 15) and shares["reward"] == pytest.approx(3 / 15)
        assert shares[OTHER] == pytest.approx((1 + 5) / 15)


def test_a_training_step_is_made_of_phases() -> None:
    settings: dict[str, Any] = {"rewards": Plain(), "objectives": [ReFL()], "sample_weight": RewardTilt(1.5)}
    with Clock(CPU) as clock:
        trainer(**settings).train_step()
        shares = clock.read()
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[name] > 0 for name in PHASES if name not in ("communication", "evaluation"))
    assert shares["communication"] == shares["evaluation"] == 0.0


def test_every_phase_has_words_in_the_report() -> None:
    assert set(TIMES) == {*PHASES, OTHER}
