"""The rows of one prompt file, whose suffix says the format; what is wrong with a text file has a line number.

Text is not left to `datasets`: its CSV reader takes the words NA and null for missing values, and fills up short lines;
its JSON reader names no line.
"""

import bz2
import csv
import glob
import gzip
import json
import lzma
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

from dmdr.errors import ConfigError

Row = dict[str, Any]
ARGUMENTS = {"self", "images", "prompts"}  # of a reward, which is given the further columns by name
TYPED = 10_000  # rows of a streamed table that say which of its columns are numbers
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
LIKELY = ("prompt", "caption", "prompts", "captions", "text")  # what published sets call the column of the prompts
NUMBER = re.compile(r"-?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # 007 and +49 are names


def suffix_of(path: str) -> str:
    """The suffix that says a file's format, in lower case, without that of its compression."""
    name = Path(path.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def is_prompt_file(text: str) -> bool:
    """Whether a text names a file, there or not, and is no prompt: by its suffix, or because it is there."""
    return suffix_of(text) in (*TEXT, *BINARY) or os.path.isfile(text)


@dataclass(frozen=True)
class TextFile:
    """The rows of a text file, which may be read again and again; blank lines are empty rows. Imports no `datasets`.

    Attributes:
        path, column: As of `open_file`.
        features: What a dataset knows of its columns, here nothing.
    """

    path: str
    column: str
    features: ClassVar[None] = None

    def __iter__(self) -> Iterator[Row]:
        return TEXT[suffix_of(self.path)](self.path, self.column, False)


def open_file(path: str, column: str, *, streaming: bool) -> Any:
    """A prompt file as a `datasets.IterableDataset`, which may be read again and again; blank lines are empty rows.

    Args:
        path: The file.
        column: That of the prompts, which are text even if all of them are digits.
        streaming: Nobody reads all rows before the first is used: those of the start say which columns there are.

    Raises:
        ConfigError: If its suffix is unknown; what is wrong with a row, when it is reached.
    """
    from datasets import IterableDataset, load_dataset

    suffix = suffix_of(path)
    if suffix in BINARY and not path.lower().endswith(tuple(COMPRESSED)):
        return load_dataset(suffix[1:], data_files=glob.escape(path), split="train", streaming=True)
    if suffix not in TEXT:
        raise ConfigError(
            f"--prompts: DMDR cannot read {path}: the name must end with {', '.join(TEXT)} "
            f"(each also with {', '.join(COMPRESSED)} after it), {' or '.join(BINARY)}"
        )
    given = {"path": path, "column": column, "streaming": streaming}
    return IterableDataset.from_generator(TEXT[suffix], None, given)


def refuse_arguments(names: Iterable[str], where: str) -> None:
    """Refuse columns that no reward could be given by name.

    Raises:
        ConfigError: If there is one.
    """
    if taken := sorted(ARGUMENTS & set(names)):
        raise ConfigError(f"{where}: rename the column '{taken[0]}'; rewards use this name for an argument")


def likely_column(column: str, names: Iterable[str]) -> str | None:
    """Which of the names is most likely meant by a column that is not among them; None if the user chose it."""
    by_name = {name.lower(): name for name in names}
    return next((by_name[name] for name in LIKELY if name in by_name), None) if column == "prompt" else None


def _decoded(path: str) -> Iterator[tuple[int, str]]:
    """Lines of UTF-8 with their ends, by number from 1.

    Not splitlines, for which a form feed or a U+2028 in a prompt ends one, too.
    """
    number = 0
    with COMPRESSED.get(Path(path).suffix.lower(), open)(path, "rb") as file:
        for raw in file:
            try:
                text = raw.decode("utf-8" if number else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"--prompts: {path} is not UTF-8 text: {error.reason} in line {number + 1}"
                ) from error
            for line in re.split(r"(?<=\r)(?=[^\n])", text):
                number += 1
                yield number, line


# --- Text -------------------------------------------------------------------------------------------------------------


def _lines(path: str, column: str, streaming: bool) -> Iterator[Row]:
    for _, line in _decoded(path):
        yield {"prompt": line.strip()} if line.strip() else {}


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json(path: str, column: str, streaming: bool) -> Iterator[Row]:
    """Objects as they are; of a stream with the keys of the first, null where they lack one.

    A list in .json that begins with a text is one of prompts, as HPSv2 has them.
    """
    columns: Row = {}
    texts: bool | None = None  # until the first value says so
    for where, value in _objects(path):
        if texts is None and value is not None:
            texts = isinstance(value, str) and suffix_of(path) == ".json"
        row = {column: value} if texts and isinstance(value, str) else value
        if row is not None:
            _check(row, column, where)
            columns = columns or dict.fromkeys(row)
            if streaming and (new := sorted(row.keys() - columns.keys())):
                raise ConfigError(
                    f"{where} has the key '{new[0]}', but the first row does not: in a stream the first row must "
                    "have all keys; add it there (null is enough)"
                )
        yield (columns | row if streaming else row) if row is not None else {}


def _objects(path: str) -> Iterator[tuple[str, Any]]:
    """The values of a file, one a line or in one list, by their place for messages; None for a blank line."""
    lines = _decoded(path)
    in_list = suffix_of(path) == ".json"  # until a line begins with something else
    for number, line in lines:
        in_list = in_list and line.lstrip()[:1] in ("", "[")
        if in_list and line.strip():
            values = _parsed("".join([line, *(rest for _, rest in lines)]), path, number)
            yield from ((f"--prompts: {path} row {i}", value) for i, value in enumerate(values, start=1))
        else:
            yield f"--prompts: {path} line {number}", _parsed(line, path, number) if line.strip() else None


def _parsed(text: str, path: str, first: int) -> Any:
    """A value, of text that begins in line `first`."""
    try:
        return json.loads(text.rstrip(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        line = first + getattr(error, "lineno", 1) - 1
        what = getattr(error, "msg", error)
        raise ConfigError(f"--prompts: {path} line {line} is no JSON: {what}") from error


def _once(pairs: Sequence[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is there twice")
    return row


def _check(row: Any, column: str, where: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        other = likely_column(column, row) if isinstance(row, dict) and column not in row else None
        hint = f"; its prompt seems to be under '{other}': give --prompt_column {other}" if other else ""
        raise ConfigError(f"{where} must be an object with text under the key '{column}'{hint}")
    if any("\ud800" <= letter <= "\udfff" for letter in row[column]):
        raise ConfigError(f"{where}: the prompt holds half a surrogate pair; remove it")
    refuse_arguments(row.keys() - {column}, where)


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


def _table(path: str, column: str, streaming: bool) -> Iterator[Row]:
    """Text, and numbers or truth values where all cells of a column are; empty cells among these are null."""
    records = _records(path, "\t" if suffix_of(path) == ".tsv" else ",")
    number, header = next(((number, cells) for number, cells in records if cells), (1, []))
    if twice := [name for name in header if header.count(name) > 1]:
        raise ConfigError(f"--prompts: {path} line {number} has two columns called '{twice[0]}'")
    refuse_arguments(set(header) - {column}, f"--prompts: {path} line {number}")
    known = list(islice(records, TYPED if streaming else None))
    cells_of = zip(*(cells for _, cells in known if len(cells) == len(header)), strict=True)
    kinds = [_text if name == column else _kind(cells) for name, cells in zip(header, cells_of, strict=False)]
    for number, cells in chain(known, records):
        if cells and len(cells) != len(header):
            raise ConfigError(
                f"--prompts: {path} line {number} has {len(cells)} cells, but its header has {len(header)}"
            )
        try:
            yield {name: kind(cell) for name, kind, cell in zip(header, kinds, cells, strict=False)}
        except ValueError as error:
            what = f"{error}, but the first {TYPED:,} rows of its column are"
            raise ConfigError(f"--prompts: {path} line {number}: {what}") from error


def _records(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Cells by the number of the line that they begin in; none of a blank line.

    In TSV, a line that would be badly quoted is not quoted at all: PartiPrompts has `"G I G G L E" painted ...`.
    """
    last = ""

    def lines() -> Iterator[str]:
        nonlocal last
        for _, last in _decoded(path):
            yield last

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if delimiter != "\t" or reader.line_num != number or last[-1:] not in ("\r", "\n"):
                raise ConfigError(f"--prompts: {path} line {number}: {error}") from error
            cells = last.rstrip("\r\n").split("\t")
        if cells is None:
            return
        yield number, cells


def _kind(cells: Iterable[str]) -> Callable[[str], Any]:
    """How the cells of a column are meant."""
    for kind in (_number, _truth):
        try:
            for cell in cells:
                kind(cell)
            return kind
        except ValueError:
            continue
    return _text


def _text(cell: str) -> str:
    return cell


def _number(cell: str) -> int | float | None:
    if not cell:
        return None
    if not NUMBER.fullmatch(cell.strip()) or not math.isfinite(float(cell)):
        raise ValueError(f"'{cell:.40}' is no number")
    return float(cell) if set(cell.lower()) & set(".e") else int(cell)


def _truth(cell: str) -> bool | None:
    if cell.lower() in ("true", "false", ""):
        return cell.lower() == "true" if cell else None
    raise ValueError(f"'{cell:.40}' is neither true nor false")


TEXT: dict[str, Callable[..., Iterator[Row]]] = {
    ".txt": _lines,
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
}
BINARY = (".parquet", ".arrow")
