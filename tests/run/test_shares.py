"""Shares of images: each process has neighbours, and together they have all."""

from types import SimpleNamespace
from typing import Any

import pytest

from dmdr.run.device import share_of


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 9, 16])
def test_shares_cover_all_images_in_order(processes: int, count: int) -> None:
    states: list[Any] = [SimpleNamespace(num_processes=processes, process_index=index) for index in range(processes)]
    padded = [share_of(state, count) for state in states]
    assert {len(share) for share in padded} == {-(-count // processes)}
    assert [index for share in padded for index in share][:count] == list(range(count))
    assert [index for state in states for index in share_of(state, count, padded=False)] == list(range(count))
