"""Fixtures of all tests."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dmdr.run.run
from dmdr_digits import Digits

pytest_plugins = ["pytester"]
PLUGIN = Path(__file__).parents[1] / "plugins" / "dmdr_digits"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These models are too small for more, and threads that wait for a busy core are many times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """What is built on first use is kept between runs of the same code, apart from the user's own."""
    sources = (file.read_bytes() for file in sorted(PLUGIN.glob("*.py")) if file.name != "__init__.py")
    key = hashlib.sha256(b"".join(sources)).hexdigest()[:12]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DMDR_DIGITS_BUDGET", raising=False)
        patch.setenv("DMDR_CACHE", str(Path.home() / ".cache" / "dmdr" / "tests" / key))
        yield


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plots take longer than most trainings here."""
    monkeypatch.setattr(dmdr.run.run, "write_report", lambda folder: None)


@pytest.fixture
def short_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package does not hold is trained shortly."""
    monkeypatch.setenv("DMDR_DIGITS_BUDGET", "0.15")


@pytest.fixture(scope="session")
def digits() -> Digits:
    """The embedded default model, as the package holds it."""
    return Digits()
