"""Signals that end a run: none is lost, whenever it arrives."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr.run.signals import Interrupts


@pytest.mark.parametrize("during", [True, False])
def test_a_signal_that_arrives_while_processes_agree_is_noticed_the_next_time(
    during: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process waits in the gather while the main one saves; that is when a signal arrives."""

    def gather(own: Tensor) -> Tensor:
        if during and not calls:
            signal.raise_signal(signal.SIGUSR1)
        calls.append(own.item())
        return torch.cat([own, torch.tensor([0])])

    calls: list[Any] = []
    monkeypatch.setattr("dmdr.run.signals.gather", gather)
    state: Any = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with Interrupts(state) as interrupts:
        assert not interrupts.arrived()
        assert interrupts.arrived() == during
        if during:
            with pytest.raises(SystemExit) as end:
                interrupts.leave()
            assert end.value.code == 138
    assert calls == [0, signal.SIGUSR1 if during else 0]
