"""Which text an image shall show, and how near the text that it shows comes to it."""

import re
from typing import Any, NamedTuple

from dmdr.errors import ConfigError

# Straight quotes first, as published; curly ones, English or German, where a prompt has no pair of straight ones.
QUOTED = (re.compile(r'"([^"]*)"'), re.compile(r"[“„]([^“”]*)[“”]"))


def target_of(prompt: str, text: Any = None) -> str | None:
    """The text that an image shall show.

    Args:
        prompt: Holds it between its first pair of double quotes, straight or, if it has none, curly.
        text: Of the row's column `text`; it counts instead, unless it is None or blank.

    Returns:
        None where there is none, or none but spaces.

    Raises:
        ConfigError: If the column holds something other than text.

    Source: the first pair of straight quotes is Flow-GRPO's (`prompt.split('"')[1]`). Deviates: curly quotes, and the
        column.
    """
    if not isinstance(text, str | None):
        raise ConfigError(f"the column 'text' must hold text, not {text!r:.80}")
    if text and text.strip():
        return text
    pairs = (pattern.search(prompt) for pattern in QUOTED)
    found = next((pair[1] for pair in pairs if pair), "")
    return found if found.strip() else None


class Agreement(NamedTuple):
    """How near a text that was read comes to the target, each in [0, 1]; NaN without a target.

    Attributes:
        published: Flow-GRPO's rule.
        strict: The same without what it gives away.
        exact: 1 if the two are the same, otherwise 0.
    """

    published: float
    strict: float
    exact: float


UNKNOWN = Agreement(*[float("nan")] * 3)


def agreement(read: str, target: str | None) -> Agreement:
    """Compare what was read with the target, both without spaces and in lower case: r and t, at edit distance d.

    published = 1 if r contains t, else 1 - min(d, |t|) / |t|
    strict    = 1 - d / max(|r|, |t|)
    exact     = 1 if r = t, else 0

    The published rule asks nothing for further text in the image; the strict one does.

    Source: Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): its paper has max(1 - d / |t|, 0), its code adds that r may
        contain t, and drops spaces and case.
    """
    if target is None:
        return UNKNOWN
    r, t = _plain(read), _plain(target)
    distance = levenshtein(r, t)
    published = 0 if t in r else min(distance, len(t))
    return Agreement(1 - published / len(t), 1 - distance / max(len(r), len(t)), float(r == t))


def levenshtein(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace that turns one text into the other.

    Source: Levenshtein 1966; computed row by row, after Wagner and Fischer 1974.
    """
    row = list(range(len(b) + 1))  # distances of what was taken of `a` so far, here nothing, to each beginning of `b`
    for i, letter in enumerate(a, 1):
        before, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != other)))
    return row[-1]


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()
