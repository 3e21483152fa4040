"""Sums of names as users write them: `--reward "0.3*hps+0.3*clip"`, `--rl "grpo as fast + 0.1*refl"`."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from dmdr.errors import ConfigError
from dmdr.settings.fields import HEAVIEST

_QUOTED = r"""'[^']*'|"[^"]*\""""
_NAME = re.compile(r"[\w./~][\w./:~-]*")
_WEIGHT = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf(?:inity)?)", re.IGNORECASE)
_TERM = re.compile(
    rf"(?:(?P<weight>[^'\"*]*)\*)?\s*(?P<name>{_QUOTED}|[^'\"*]*?)(?:\s+as\s+(?P<label>[^'\"*]*))?", re.DOTALL
)
_LABEL = re.compile(r"[a-zA-Z][a-zA-Z0-9_]*")
_CURVES = ("total", "dmd", "fake")  # which the log has beside those of the terms
# A + inside quotes or in the exponent of a weight (1e+2*hps) does not end a term.
_PIECE = re.compile(rf"{_QUOTED}|(?<![\w.])[0-9.]+[eE]\+[0-9]+(?=\s*\*)|.", re.DOTALL)


class Term(NamedTuple):
    """A term of a sum.

    Attributes:
        weight: Positive and finite; 1 where none is written.
        name: Of the plugin, without quotes.
        label: What the term is called in flags and in the log: the name where none is written.
    """

    weight: float
    name: str
    label: str


def parse_sum(text: str, what: str = "reward") -> list[Term]:
    """The terms of a weighted sum of names.

        sum = term {"+" term};  term = [weight "*"] name ["as" label]

    A name that holds `+`, `*` or a space is quoted with ' or ". Spaces around weights and names do not count. A label
    has letters, digits and _.

    Args:
        text: E.g. `0.3*hps+clip`, `0.5*my_file.py:score as mine+1e-3*hps`, `'my file.py:score'`.
        what: What the names are, for messages: "reward" or "objective".

    Returns:
        In the order written; their labels are distinct.

    Raises:
        ConfigError: A ValueError of one line, with the problem and its place (characters count from 1).
    """
    if not text.strip():
        raise ConfigError(f"the {what} expression is empty; write a name, or a sum such as 0.5*first+second")
    terms: dict[str, Term] = {}
    for at, written in _split(text):
        try:
            term = _parse(written, what)
            if term.label in terms:
                cure = "write it once, with the sum of the weights, or give one a label, as in NAME as LABEL"
                raise ValueError(f"{term.label!r} is named twice; {cure}")
        except ValueError as error:
            raise ConfigError(f"{what} expression {text!r}: {error} (at character {at + 1})") from None
        terms[term.label] = term
    return list(terms.values())


def _split(text: str) -> Iterator[tuple[int, str]]:
    """Each term, stripped, after its place in the text."""
    cuts = [piece.start() for piece in _PIECE.finditer(text) if piece[0] == "+"]
    for start, end in zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(text)], strict=True):
        term = text[start:end]
        yield start + len(term) - len(term.lstrip()), term.strip()


def _parse(term: str, what: str) -> Term:
    """One term; a ValueError says what is wrong with it."""
    if re.search("['\"]", re.sub(_QUOTED, "", term)):
        raise ValueError("unbalanced quote")
    match = _TERM.fullmatch(term)
    if match is None:
        raise ValueError(f"{term!r} cannot be read; write NAME, WEIGHT*NAME or NAME as LABEL")
    written, name, label = match["weight"], match["name"].strip(), match["label"]
    quoted = name[:1] in ("'", '"')
    name = name[1:-1].strip() if quoted else name
    if not name:
        raise ValueError("empty term" if written is None else f"no {what} after the weight")
    if not quoted and not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name; put a name with spaces or signs other than _ . - / : ~ in quotes")
    if label is not None and not _LABEL.fullmatch(label):
        raise ValueError(f"{label!r} is no label; a label has letters, digits and _, as in NAME as first_2")
    if label in _CURVES:
        raise ValueError(f"a curve of the log already has the name {label!r}; choose another label")
    label = label or name
    if written is None:
        return Term(1.0, name, label)
    if not _WEIGHT.fullmatch(written.strip()):
        raise ValueError(f"{written.strip()!r} is no weight; write a number first, as in 0.5*name")
    weight = float(written)
    if not 0 < weight <= HEAVIEST:
        raise ValueError(f"the weight {written.strip()} of {name!r} must be above 0 and at most {HEAVIEST}")
    return Term(weight, name, label)
