"""Prompt rows from files and datasets, and the stream of batches: grouped, sharded, endless, resumable by counting."""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any, Protocol

from dmdr.errors import ConfigError
from dmdr.hub import is_hub_id, open_dataset, quiet_datasets
from dmdr.prompt_files import BINARY, TEXT, Row, TextFile, likely_column, open_file, refuse_arguments, suffix_of

BUFFER = 10_000  # rows among which a stream is shuffled
PLAIN = ("string", "large_string", "int", "uint", "float", "bool", "null")  # how the types of plain columns begin


class Rows(Protocol):
    """Prompt rows, each with a `prompt` and the same further columns; `str` says how many, and what was left out."""

    @property
    def size(self) -> int | None:
        """How many; None where nobody knows before the last is read."""

    def first(self, number: int) -> list[Row]:
        """The first rows, from the start again where there are fewer."""

    def shuffled(self, seed: int) -> Generator[Row]:
        """All rows without end, each epoch in another order. Who reads them closes them: they may hold open files."""


class Prompts:
    """Rows in memory (`Rows`).

    Args:
        rows: At least one.
        notes: What was left out, and other oddities.
    """

    def __init__(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        self.rows, self.notes = rows, notes

    def __str__(self) -> str:
        return f"{self.size:,}" + (f" ({', '.join(self.notes)})" if self.notes else "")

    @property
    def size(self) -> int:
        return len(self.rows)

    def first(self, number: int) -> list[Row]:
        return list(islice(cycle(self.rows), number))

    def shuffled(self, seed: int) -> Generator[Row]:
        import torch  # takes seconds, which who only reads prompts need not wait

        # The order of TRL's RepeatSampler, whose module would import transformers, datasets and pandas for it.
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from (self.rows[i] for i in torch.randperm(self.size, generator=generator).tolist())


class StreamedPrompts:
    """Rows that are read again and again as they are needed, and shuffled among the next `BUFFER` (`Rows`)."""

    size: int | None = None

    def __init__(self, source: "_Source") -> None:
        self._source = source

    def __str__(self) -> str:
        return "; ".join(filter(None, (f"streamed from {self._source.path}", self._source.left_out)))

    def first(self, number: int) -> list[Row]:
        with closing(self._epochs(self._source.examples)) as rows:
            return list(islice(rows, number))

    def shuffled(self, seed: int) -> Generator[Row]:
        # One file at a time. With several at a time, `datasets` starts a pool of threads for each pass, sleeps five
        # seconds where it ends, and can wait for ever if Python's garbage collector is what ends it.
        return self._epochs(self._source.examples.shuffle(seed=seed, buffer_size=BUFFER, max_buffer_input_shards=1))

    def _epochs(self, examples: Any) -> Generator[Row]:
        for epoch in count():
            examples.set_epoch(epoch)
            filled = False
            with closing(self._source.rows(examples)) as rows:
                for row in filter(None, rows):
                    filled = True
                    yield row
            if not filled:  # any more: there were some when the stream was opened
                raise ConfigError(f"--prompts: {self._source.path} holds no prompt")


def read_prompts(path: str, *, repeated: bool = False, **where: Any) -> Prompts:
    """All rows of a file, a folder or a dataset on the hub.

    Args:
        path: A file (.txt with one prompt a line, .jsonl, .json, .csv or .tsv in UTF-8, also compressed as .gz, .bz2 or
            .xz, .parquet or .arrow), a folder that `datasets` reads or saved, or the id of a dataset on the hub,
            `org/name`. Blank lines are no rows. What a row lacks and others have is None.
        repeated: Keep a row as often as it is there, not just once.
        where: `column` of the prompts, and `config` and `split` of a dataset.

    Raises:
        ConfigError: If it is missing or damaged, has no such column or split, or holds no prompt.
    """
    source = _Source(path, **where)
    found = list(source.rows(source.examples))
    filled = [row for row in found if row]
    if not filled:
        raise ConfigError(f"--prompts: {path} holds no prompt")
    columns = dict.fromkeys(name for row in filled for name in row)
    lacking = sum(len(row) < len(columns) for row in filled)
    filled = [columns | row for row in filled]
    rows = filled if repeated else list({json.dumps(row, sort_keys=True): row for row in filled}.values())
    notes = [
        _counted(len(filled) - len(rows), "duplicate", "left out"),
        _counted(len(found) - len(filled), "empty line", "left out"),
        _counted(sum(not row["prompt"].strip() for row in rows), "empty prompt", "kept"),
        _counted(lacking, "row", "filled up with null"),
        source.left_out,
    ]
    return Prompts(rows, list(filter(None, notes)))


def stream_prompts(path: str, **where: Any) -> StreamedPrompts:
    """The same rows for sets that do not fit; duplicates stay.

    Raises:
        ConfigError: As `read_prompts`, of what the first row shows; of the others when they are reached, also if one
            has a column that the first lacks.
    """
    from datasets import Dataset

    source = _Source(path, streaming=True, **where)
    if isinstance(source.examples, Dataset):
        source.examples = source.examples.to_iterable_dataset()
    with closing(source.rows(source.examples)) as rows:
        if not any(rows):  # of an empty stream there is no first row to wait for
            raise ConfigError(f"--prompts: {path} holds no prompt")
    return StreamedPrompts(source)


def split_columns(rows: Sequence[Row]) -> tuple[list[str], dict[str, list[Any]]]:
    """The prompts of some rows, and their further columns by name."""
    return [row["prompt"] for row in rows], {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


class PromptStream:
    """Endless batches of prompt rows: shuffled by epoch, each prompt `group_size` times in a row.

    All processes walk the same global order and take their own slice of each batch, so that the batches do not depend
    on how many processes there are.

    Args:
        prompts: Prompt rows.
        batch_size: Rows per global batch; a multiple of `group_size` and of the number of processes.
        group_size: Images per prompt.
        seed: Seed of the order.
        process_index, num_processes: This process's place.
    """

    def __init__(
        self,
        prompts: Rows,
        batch_size: int,
        *,
        group_size: int = 1,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.prompts, self.batch_size, self.group_size, self.seed = prompts, batch_size, group_size, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.consumed = 0
        self._rows = prompts.shuffled(seed)

    def __next__(self) -> list[Row]:
        prompts = islice(self._rows, self.batch_size // self.group_size)
        batch = [row for row in prompts for _ in range(self.group_size)]
        self.consumed += 1
        share = self.batch_size // self.num_processes
        return batch[self.process_index * share : (self.process_index + 1) * share]

    def first(self, batches: int) -> list[Row]:
        """The rows of the first global batches, each once per group; moves nothing."""
        with closing(self.prompts.shuffled(self.seed)) as rows:
            return list(islice(rows, batches * self.batch_size // self.group_size))

    def skip_to(self, consumed: int) -> None:
        """Continue as if `consumed` batches had been read from the start."""
        self.close()
        self._rows = self.prompts.shuffled(self.seed)
        for _ in islice(self._rows, consumed * self.batch_size // self.group_size):
            pass
        self.consumed = consumed

    def close(self) -> None:
        """Let go of the files that are open for reading; `skip_to` opens them again."""
        self._rows.close()


# --- Sources ----------------------------------------------------------------------------------------------------------


class _Source:
    """What `--prompts` names, opened: examples of text and numbers, and how they become rows.

    Attributes:
        examples: `datasets.IterableDataset`, a `Dataset` where there was one on disk, or a `TextFile` that is not
            streamed; may be read again and again.
        left_out: Columns without text or numbers, for people.
    """

    def __init__(
        self,
        path: str,
        *,
        column: str = "prompt",
        config: str | None = None,
        split: str = "train",
        streaming: bool = False,
    ) -> None:
        self.path, self.column = path, column
        self.left_out = ""
        with self._refusing():
            self.examples = _open(path, column, config, split, streaming)
        if self.examples.features is not None:
            self._select(self.examples.features)

    def _select(self, features: Any) -> None:
        """Leave out columns that are neither text nor numbers; pictures would be decoded for nothing."""
        self._require_column(features)
        kept = [name for name, feature in features.items() if name == self.column or is_plain(feature)]
        if self.column != "prompt" and "prompt" in kept:
            kept.remove("prompt")
        if left_out := [name for name in features if name not in kept]:
            self.left_out = f"column{'s' * (len(left_out) > 1)} {', '.join(left_out)} left out"
        refuse_arguments(set(kept) - {self.column}, f"--prompts: {self.path}")
        self.examples = self.examples.select_columns(kept)

    def rows(self, examples: Iterable[Row]) -> Generator[Row]:
        """The examples with their prompts under `prompt`; an empty line is an empty row."""
        with self._refusing(), closing(iter(examples)) as reader:  # type: ignore[type-var]
            for example in reader:
                if example:
                    self._require_column(example)
                    prompt = example[self.column]
                    if not isinstance(prompt, str | None):
                        raise ConfigError(
                            f"--prompts: the column '{self.column}' of {self.path} is no text: {prompt!r:.80}"
                        )
                    others = {name: value for name, value in example.items() if name != self.column}
                    example = others | {"prompt": prompt or ""}
                yield example

    def _require_column(self, names: Iterable[str]) -> None:
        if self.column not in names:
            other = likely_column(self.column, names)
            raise ConfigError(
                f"--prompts: {self.path} has no column '{self.column}'; give the column of the prompts with "
                f"--prompt_column: {', '.join(names)}{f'; most likely it is {other}' if other else ''}"
            )

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What goes wrong, in one line."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # of datasets, Arrow, the hub and the network
            from datasets.exceptions import DatasetGenerationError  # here, as reading text needs no datasets

            cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
            said = str(cause or error).strip().partition("\n")[0]
            what = "cannot be read" if Path(self.path).exists() else "no such file, and the hub says"
            raise ConfigError(f"--prompts: {self.path}: {what}: {said}") from error


def _open(path: str, column: str, config: str | None, split: str, streaming: bool) -> Any:
    """The rows that a path or id names; what lies on this machine is read where it is, without a copy."""
    place = Path(path)
    if (place.is_file() or (place / "state.json").is_file()) and (config or split != "train"):
        raise ConfigError(
            f"--prompts: {path} has no configurations or splits; leave out --dataset_config, --dataset_train_split"
        )
    if place.is_file() and suffix_of(path) in TEXT and not streaming:
        return TextFile(path, column)
    if not place.exists() and (not is_hub_id(path) or suffix_of(path) in (*TEXT, *BINARY)):
        raise ConfigError(f"--prompts: no such file: {path}")
    if place.is_file():
        with quiet_datasets():
            return open_file(path, column, streaming=streaming)
    how = "--prompts", "choose with --dataset_train_split"
    # Files on this machine are read where they are, without a copy.
    return open_dataset(path, config, split, streaming=streaming or place.is_dir(), how=how)


def is_plain(feature: Any) -> bool:
    """Whether a column of a dataset holds text, numbers, or lists or tables of them, by its feature."""
    from datasets import ClassLabel, LargeList, List, Value

    if isinstance(feature, dict):
        return all(map(is_plain, feature.values()))
    if isinstance(feature, List | LargeList):
        return is_plain(feature.feature)
    return isinstance(feature, Value | ClassLabel) and feature.dtype.startswith(PLAIN)


def _counted(number: int, noun: str, fate: str) -> str:
    return f"{number:,} {noun}{'s' * (number > 1)} {fate}" if number else ""
