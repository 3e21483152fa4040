"""The stream of prompts: grouped, sharded, endless, and resumable by counting."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trl.trainer.utils import RepeatSampler

from dmdr.errors import ConfigError

Row = dict[str, Any]


def read_prompts(path: str) -> list[Row]:
    """One prompt a line; blank lines are skipped, repeated ones kept once.

    Raises:
        ConfigError: If the file is missing, not text, or holds no prompt.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--prompts: no such file: {path}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts: {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    prompts = dict.fromkeys(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"--prompts: {path} holds no prompt; write one a line")
    return [{"prompt": prompt} for prompt in prompts]


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
        sampler = RepeatSampler(self.rows, mini_repeat_count=self.group_size, seed=self.seed)
        while True:
            yield from sampler

    def __next__(self) -> list[Row]:
        batch = [self.rows[next(self._indices)] for _ in range(self.batch_size)]
        self.consumed += 1
        share = self.batch_size // self.num_processes
        return batch[self.process_index * share : (self.process_index + 1) * share]

    def skip_to(self, consumed: int) -> None:
        """Continue as if `consumed` batches had been read from the start."""
        self._indices, self.consumed = self._order(), consumed
        for _ in range(consumed * self.batch_size):
            next(self._indices)
