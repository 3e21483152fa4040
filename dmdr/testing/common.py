"""Shared by the checks."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from dmdr.errors import ConfigError
from dmdr.settings.registry import examine


class CannotRun(AssertionError):
    """A broken promise without which the plugin cannot be used at all: further checks would say the same."""


@contextmanager
def untouched_global_rng(who: str, instead: str) -> Iterator[None]:
    """Nothing inside may draw from a global generator, which no checkpoint holds."""
    before = _global_states()
    yield
    after = _global_states()
    for owner, state in before.items():
        assert after[owner] == state, (
            f"the {who} drew from {owner}'s global random generator, so that a resumed run would go on differently; "
            f"{instead}"
        )


def _global_states() -> dict[str, object]:
    """What tells whether somebody has drawn, by whose generator it is."""
    numpy = np.random.get_state(legacy=False)
    used = torch.cuda.is_initialized()  # asking would open every GPU
    return {
        "torch": torch.random.get_rng_state().tolist(),
        **({"torch.cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()]} if used else {}),
        "numpy": (bytes(numpy["state"]["key"]), numpy["state"]["pos"], numpy["has_gauss"]),
        "Python": random.getstate(),
    }


def taken_by_a_run(group: str, plugin: object) -> None:
    """A run reads flags and signatures off the class before it builds one, and refuses what does not fit.

    Raises:
        CannotRun: If a run would refuse it.
    """
    try:
        examine(group, type(plugin))
    except ConfigError as error:
        raise CannotRun(f"no run takes it: {error}") from error


def networks(plugin: object) -> Iterator[tuple[str, nn.Module]]:
    """The networks that a plugin holds, by attribute."""
    for name, value in vars(plugin).items():
        if isinstance(value, nn.Module):
            yield name, value
