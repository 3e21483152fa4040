"""Fixtures of the families' tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import sd3
from family import Stock
from stock import stock_diffusers


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """Runs the snippet of an export's card for some prompts, in a process that cannot import dmdr."""
    with stock_diffusers(tmp_path_factory.mktemp("stock"), "cpu") as draw:
        yield draw


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 3 with random weights, which no test changes."""
    folder = tmp_path_factory.mktemp("pipelines") / "sd3"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(no_report: None) -> None:
    """None of these tests is about the report."""


@pytest.fixture(autouse=True)
def plain_again() -> Iterator[None]:
    """The precision of one test, which accelerate keeps for its process, is not that of the next."""
    yield
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != "no":
        AcceleratorState._reset_state()
