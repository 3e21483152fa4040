"""Prompt embeddings on disk, shared by processes and runs, so that the text encoders need not stay in memory.

A shard is a safetensors file of some prompts. It is written under another name and renamed, so that a writer that is
killed leaves no half shard. Processes write shards of their own and never change one: no locks.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dmdr.backends.texts import LENGTH
from dmdr.errors import ConfigError

SHARD = 64  # prompts encoded at a time and kept in one file
OPEN = 64  # shards kept open; the operating system keeps in memory what is read often

Rows = dict[str, Tensor]


class PromptCache:
    """Embeddings by prompt, in one folder for each way of embedding.

    Args:
        folder: Of this model, its encoders, their precision and the text length; made when it is first written to.
        embed: B distinct prompts -> embeddings by name, each [B, ...], of shapes that depend on no prompt.
        padded: Names of embeddings [B, L, ...] that are zero after each prompt's own `length`, with their L. Only what
            is before that is stored.
    """

    def __init__(
        self,
        folder: Path,
        embed: Callable[[Sequence[str]], Rows],
        padded: Mapping[str, int] | None = None,
    ) -> None:
        self.folder, self._embed, self._padded = folder, embed, padded or {}
        self._where: dict[str, Path] = {}  # key of a prompt -> its shard
        self._read: set[Path] = set()
        self._open = lru_cache(OPEN)(_open)

    def fill(self, prompts: Sequence[str], *, show: bool = False) -> None:
        """Encode and store what is missing.

        Args:
            prompts: Any; duplicates cost nothing.
            show: With a progress bar.

        Raises:
            ConfigError: If the disk has no room for them.
        """
        missing = self.missing(prompts)
        for start in tqdm(range(0, len(missing), SHARD), desc="encode prompts", disable=not show, leave=False):
            part = missing[start : start + SHARD]
            rows = self._rows({name: tensor.cpu() for name, tensor in self._embed(part).items()})
            if start == 0:
                stored = sum(tensor.nbytes for row in rows for tensor in row.values())
                self._require_room(stored // len(part) * len(missing))
            self._write(part, rows)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The distinct ones that are not stored."""
        distinct = dict.fromkeys(prompts)
        if any(_key(prompt) not in self._where for prompt in distinct):
            self._look()
        return [prompt for prompt in distinct if _key(prompt) not in self._where]

    def __call__(self, prompts: Sequence[str]) -> Rows:
        """Embeddings of B distinct prompts on the CPU, each [B, ...]; encodes and stores what is missing."""
        self.fill(prompts)
        rows = []
        for key in map(_key, prompts):
            file, names = self._open(self._where[key])
            rows.append({name: self._whole(name, file.get_tensor(f"{key}/{name}")) for name in names})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _rows(self, embeddings: Rows) -> list[Rows]:
        """Those of each prompt, without padding."""
        count = len(next(iter(embeddings.values())))
        rows = [{name: tensor[i] for name, tensor in embeddings.items()} for i in range(count)]
        for row in rows:
            row |= {name: row[name][: row[LENGTH]] for name in self._padded}
        return rows

    def _whole(self, name: str, stored: Tensor) -> Tensor:
        if name not in self._padded:
            return stored
        return torch.cat([stored, stored.new_zeros(self._padded[name] - len(stored), *stored.shape[1:])])

    def _look(self) -> None:
        """Learn of shards that other processes and runs have written meanwhile."""
        try:
            shards = sorted(set(self.folder.glob("*.safetensors")) - self._read)
        except OSError as error:
            raise ConfigError(f"--prompt_cache {self.folder} cannot be read: {error}") from error
        for shard in shards:
            file, _ = self._open(shard)
            self._where.update((name.partition("/")[0], shard) for name in file.keys())  # noqa: SIM118
            self._read.add(shard)

    def _write(self, prompts: Sequence[str], rows: Sequence[Rows]) -> None:
        stored = zip(map(_key, prompts), rows, strict=True)
        tensors = {f"{key}/{name}": tensor.clone() for key, row in stored for name, tensor in row.items()}
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = shard.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, partial)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.rename(shard)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"--prompt_cache {self.folder} cannot be written: {error}") from error
        self._where.update((_key(prompt), shard) for prompt in prompts)
        self._read.add(shard)

    def _require_room(self, wanted: int) -> None:
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if wanted > free:
            raise ConfigError(
                f"the prompt embeddings take {wanted / 2**30:.1f} GiB and {place} has {free / 2**30:.1f} GiB left; "
                "name another folder with --prompt_cache, or keep the text encoders in memory with --prompt_cache off"
            )


def _open(shard: Path) -> tuple[Any, tuple[str, ...]]:
    """A shard, and the names of a prompt's embeddings in it.

    Raises:
        ConfigError: If it is damaged.
    """
    try:
        file = safe_open(shard, framework="pt")
        return file, tuple(dict.fromkeys(name.partition("/")[2] for name in file.keys()))  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--prompt_cache: {shard} is damaged; delete it") from error


def _key(prompt: str) -> str:
    return blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
