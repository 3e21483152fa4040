"""Where things are kept."""

from pathlib import Path

import pytest

from dmdr.cache import cache_folder, fingerprint
from dmdr_digits.cache import root


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "~/.cache/dmdr"), ("", "~/.cache/dmdr"), ("~/elsewhere", "~/elsewhere"), ("/far/away", "/far/away")],
)
def test_the_folder(monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str) -> None:
    monkeypatch.delenv("DMDR_CACHE")
    if given is not None:
        monkeypatch.setenv("DMDR_CACHE", given)
    assert cache_folder() == root().parent == Path(expected).expanduser()


def test_a_fingerprint_tells_settings_apart() -> None:
    given = [(), ("a",), ("a", "b"), ("ab",), ("b", "a"), (1,), ("1",)]
    assert len({fingerprint(*settings) for settings in given}) == len(given)
    assert fingerprint("a", 1) == fingerprint("a", 1)
