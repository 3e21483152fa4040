"""Image sizes, as users write them: `1024` (a square), `1152x896` (width x height), or several with commas."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """Width and height in pixels; `str` is what a user writes."""

    width: int
    height: int

    def __str__(self) -> str:
        return str(self.width) if self.width == self.height else f"{self.width}x{self.height}"


def parse_sizes(text: str) -> tuple[Size, ...]:
    """The sizes that a text names, in its order.

    Raises:
        ValueError: If it names none, one without pixels, or one twice; in words that go on from "must be".
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*x\s*(\d{1,6}))?\s*", part, re.ASCII)
        width, height = (int(number) for number in (match[1], match[2] or match[1])) if match else (0, 0)
        if not width or not height:
            raise ValueError("sizes such as 1024 or 1152x896 (width x height), with commas between several")
        found.append(Size(width, height))
    if len(set(found)) < len(found):
        raise ValueError("different sizes")
    return tuple(found)


def join_sizes(sizes: Sequence[Size]) -> str:
    """The text that names them."""
    return ",".join(map(str, sizes))
