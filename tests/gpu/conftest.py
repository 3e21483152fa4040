"""Fixtures of the tests that need a GPU: `make gpu`."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging
from examples.benchmarks import cases

from dmdr.backends.loading import quiet
from family import FAMILIES


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where there is no GPU, say so before the first test."""
    if any(item.get_closest_marker("gpu") for item in session.items) and not torch.cuda.is_available():
        raise pytest.UsageError("make gpu needs a CUDA device, and PyTorch finds none on this machine")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small pipelines of all families."""
    logging.disable_progress_bar()
    built = {name: tmp_path_factory.mktemp("pipelines") / name for name in FAMILIES}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, folder in built.items():
            FAMILIES[name].build(folder)
    return built


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD3 whose weights are most of a step's memory: over 1 GiB in float32, as a full student is."""
    folder = tmp_path_factory.mktemp("wide")
    cases.sd3(folder, width=1024, layers=8, size=16)
    (folder / "prompts.txt").write_text("a handwritten seven\na handwritten two\n")
    return folder


@pytest.fixture(autouse=True)
def nothing_left(no_report: None) -> Iterator[None]:
    """The next test finds no memory taken and no compiled code of this one."""
    yield
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
