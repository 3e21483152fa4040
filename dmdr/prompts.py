"""The stream of prompts: grouped, sharded, endless, and resumable by counting."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dmdr.errors import ConfigError

Row = dict[str, Any]
ARGUMENTS = {"self", "images", "prompts"}  # of a reward, which is given the further columns by name


def read_prompts(path: str, *, repeated: bool = False) -> list[Row]:
    """One prompt a line or, of a `.jsonl` file, one JSON object a line: `prompt`, and further columns of any kind.

    Args:
        path: The file, UTF-8. Blank lines are skipped.
        repeated: Keep a row as often as it is there, not just once.

    Raises:
        ConfigError: If the file is missing, not text, or holds no prompt; if a line is no such object, or its keys are
            not those of the first.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--prompts: no such file: {path}")
    try:
        # Not splitlines, for which a form feed or a U+2028 within a prompt ends a line, too.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts: {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    filled = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not filled:
        raise ConfigError(f"--prompts: {path} holds no prompt; write one a line")
    if file.suffix.lower() == ".jsonl":
        rows = [_row_of(line, f"--prompts: {path} line {number}") for number, line in filled.items()]
        for number, row in zip(filled, rows, strict=True):
            if row.keys() != rows[0].keys():
                keys, first = ", ".join(sorted(row)), ", ".join(sorted(rows[0]))
                raise ConfigError(f"--prompts: {path} line {number} has the keys {keys}, but the first has {first}")
    else:
        rows = [{"prompt": line} for line in filled.values()]
    return rows if repeated else list({json.dumps(row, sort_keys=True): row for row in rows}.values())


def _row_of(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f"{where} is no object with a text under the key 'prompt'")
    if taken := sorted(ARGUMENTS & row.keys()):
        raise ConfigError(f"{where}: '{taken[0]}' cannot name a column; it is an argument of every reward")
    return row


def split_columns(rows: Sequence[Row]) -> tuple[list[str], dict[str, list[Any]]]:
    """The prompts of some rows, and their further columns by name."""
    return [row["prompt"] for row in rows], {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


class PromptStream:
    """Endless batches of prompt rows: shuffled by epoch, each prompt `group_size` times in a row.

    All processes walk the same global order and take their own slice of each batch, so that the batches do not depend
    on how many processes there are.

    Args:
        rows: Prompt rows.
        batch_size: Rows per global batch; a multiple of `group_size` and of the number of processes.
        group_size: Images per prompt.
        seed: Seed of the order.
        process_index, num_processes: This process's place.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        *,
        group_size: int = 1,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.rows, self.batch_size, self.group_size, self.seed = rows, batch_size, group_size, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.consumed = 0
        self._indices = self._order()

    def _order(self) -> Iterator[int]:
        from trl.trainer.utils import RepeatSampler  # takes seconds, which who only reads prompts need not wait

        sampler = RepeatSampler(self.rows, mini_repeat_count=self.group_size, seed=self.seed)
        while True:
            yield from sampler

    def __next__(self) -> list[Row]:
        batch = [self.rows[next(self._indices)] for _ in range(self.batch_size)]
        self.consumed += 1
        share = self.batch_size // self.num_processes
        return batch[self.process_index * share : (self.process_index + 1) * share]

    def first(self, batches: int) -> list[Row]:
        """The rows of the first global batches, each once per group; moves nothing."""
        order = self._order()
        return [self.rows[next(order)] for _ in range(batches * self.batch_size)][:: self.group_size]

    def skip_to(self, consumed: int) -> None:
        """Continue as if `consumed` batches had been read from the start."""
        self._indices, self.consumed = self._order(), consumed
        for _ in range(consumed * self.batch_size):
            next(self._indices)
