"""What the checks share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class CannotRun(AssertionError):
    """A broken promise without which the plugin cannot be used at all: further checks would say the same."""


@contextmanager
def untouched_global_rng(who: str, instead: str) -> Iterator[None]:
    """Nothing inside may draw from torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), (
        f"the {who} drew from torch's global random generator, so that a resumed run would go on differently; {instead}"
    )


def networks(plugin: object) -> Iterator[tuple[str, nn.Module]]:
    """The networks that a plugin holds, by attribute."""
    for name, value in vars(plugin).items():
        if isinstance(value, nn.Module):
            yield name, value
