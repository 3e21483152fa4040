"""What a benchmark was told about images, kept on disk in shards: nothing is asked twice, and memory stays flat."""

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dmdr import images
from dmdr.benchmarks import Benchmark
from dmdr.errors import ConfigError, MissingFile, TrainingError
from dmdr.evaluation.pictures import Pictures, batches
from dmdr.prompts import Row

SHARD = 64  # images whose answers lie in one file
STAMP, TEXTS, NAMES = "stamp", "texts", "names"  # what a file holds beside its tensors

Given = Mapping[str, Tensor | Sequence[str]]


@dataclass(frozen=True)
class StoredRows:
    """A tensor that lies in several files (`metrics.Rows`)."""

    files: Sequence[Path]
    name: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        for file in self.files:
            with safe_open(file, "pt") as stored:
                yield stored.get_tensor(self.name)

    def __getitem__(self, index: Tensor) -> Tensor:
        order = index.argsort()
        found, ordered = [], index[order]
        for shard in (ordered // SHARD).unique().tolist():
            with safe_open(self.files[shard], "pt") as stored:
                found.append(stored.get_tensor(self.name)[ordered[ordered // SHARD == shard] - shard * SHARD])
        return torch.cat(found)[order.argsort()]

    def whole(self) -> Tensor:
        return torch.cat(list(self))


class Store:
    """The answers about N images (`benchmarks.Answers`), in a folder of shards, each written when it is complete.

    Args:
        folder: Where the files lie.
        stamps: Of each shard, what its answers depend on; those that depend on something else are asked for again.
    """

    def __init__(self, folder: Path, count: int, stamps: Sequence[str]) -> None:
        self.folder, self.count, self.stamps = folder, count, stamps

    @classmethod
    def of(cls, folder: Path, pictures: Pictures, rows: Sequence[Row], settings: Mapping[str, Any]) -> "Store":
        """That of these images and their prompt rows, asked about with these settings."""
        stamps, said = [], json.dumps(settings, sort_keys=True, default=str)
        for start in range(0, len(pictures), SHARD):
            digest = hashlib.sha256(said.encode())
            for i in range(start, min(start + SHARD, len(pictures))):
                digest.update(json.dumps([pictures.stamp(i), rows[i]], sort_keys=True, default=str).encode())
            stamps.append(digest.hexdigest())
        return cls(folder, len(pictures), stamps)

    def __len__(self) -> int:
        return self.count

    def file(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * SHARD, min((shard + 1) * SHARD, self.count))

    def due(self) -> list[int]:
        """The shards that are not there yet."""
        return [shard for shard, stamp in enumerate(self.stamps) if self._about(shard).get(STAMP) != stamp]

    def write(self, shard: int, given: Given) -> None:
        """Keep the answers about all images of a shard."""
        tensors = {name: value.cpu().contiguous() for name, value in given.items() if isinstance(value, Tensor)}
        texts = {name: list(value) for name, value in given.items() if not isinstance(value, Tensor)}
        about = {STAMP: self.stamps[shard], TEXTS: json.dumps(texts), NAMES: json.dumps(list(given))}
        images.write_atomically(self.file(shard), save(tensors, about))

    def names(self) -> tuple[list[str], list[str]]:
        """Of the tensors with one number an image, and of the texts."""
        about = self._about(0)
        texts = list(json.loads(about[TEXTS]))
        with safe_open(self.file(0), "pt") as stored:
            tensors = [name for name in json.loads(about[NAMES]) if name not in texts]
            return [name for name in tensors if len(stored.get_slice(name).get_shape()) == 1], texts

    def tensor(self, name: str) -> StoredRows:
        """As `Answers`."""
        with safe_open(self.file(0), "pt") as stored:
            if name not in stored.keys():  # noqa: SIM118
                raise KeyError(name)
        return StoredRows([self.file(shard) for shard in range(len(self.stamps))], name, self.count)

    def texts(self, name: str) -> list[str]:
        """As `Answers`."""
        return [text for shard in range(len(self.stamps)) for text in json.loads(self._about(shard)[TEXTS])[name]]

    def _about(self, shard: int) -> dict[str, str]:
        """What a file says beside its tensors; nothing where there is none, or it is damaged."""
        with suppress(OSError, SafetensorError), safe_open(self.file(shard), "pt") as stored:
            return dict(stored.metadata() or {})
        return {}


def ask(
    benchmark: Benchmark,
    title: str,
    store: Store,
    pictures: Pictures,
    rows: Sequence[Row],
    shards: Sequence[int],
    *,
    batch_size: int,
    device: torch.device,
) -> Generator[int]:
    """Ask about the images of some shards, batch by batch, and keep what is said.

    Who stops reading early closes it: threads read images ahead.

    Args:
        benchmark: Prepared for `device`.
        title: What users call it.
        store: Where the answers are kept.
        pictures, rows: All images and their prompt rows.
        shards: Those that this process asks about.
        batch_size: Images at a time.

    Returns:
        After each batch, how many images it had.

    Raises:
        ConfigError: If an image is damaged.
        TrainingError: If the benchmark breaks its contract.
    """
    own = [i for shard in shards for i in store.indices(shard)]
    waiting, found = iter(shards), dict[int, tuple[Given, int]]()
    first: Given = {}
    shard = next(waiting, None)
    with closing(batches(pictures, own, batch_size)) as parts:
        for indices, pixels in parts:
            given = answers_about(benchmark, title, pixels.to(device).float() / 255, [rows[i] for i in indices])
            first = first or given
            _same_form(title, first, given)
            found |= {index: (given, row) for row, index in enumerate(indices)}
            while shard is not None and all(i in found for i in store.indices(shard)):
                store.write(shard, _joined([found.pop(i) for i in store.indices(shard)]))
                shard = next(waiting, None)
            yield len(indices)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, which moves scores in the third digit: a GPU's answers are those of a CPU up to rounding.

    A run, or drawing, computes in TF32 before and after.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def prepare(benchmark: Benchmark, title: str, device: torch.device, dtype: torch.dtype) -> None:
    """Load a benchmark's networks.

    Raises:
        ConfigError: If it refuses its settings, or a file.
    """
    try:
        benchmark.prepare(device, dtype)
    except MissingFile as error:
        what = f"{error.what}; download it and give its local path with --{error.option}"
        raise ConfigError(f"benchmark '{title}': {what}") from error
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"benchmark '{title}': {' '.join(str(error).split())}") from error


@torch.no_grad()
def answers_about(benchmark: Benchmark, title: str, images: Tensor, rows: Sequence[Row]) -> Given:
    """What a benchmark says of images [B, 3, H, W] in [0, 1], on the CPU.

    Raises:
        TrainingError: If it breaks its contract.
    """
    with exact_float32():
        given: Mapping[str, Any] = benchmark.answers(images, rows)
    _check(title, given, len(images))
    return {name: value.cpu() if isinstance(value, Tensor) else list(value) for name, value in given.items()}


def after_each_other(parts: Sequence[Given]) -> Given:
    """The answers about several batches as those about all."""
    joined: dict[str, Any] = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        joined[name] = torch.cat(values) if isinstance(first, Tensor) else [text for each in values for text in each]  # type: ignore[arg-type]
    return joined


def _joined(found: Sequence[tuple[Given, int]]) -> Given:
    """The answers about some images, each given as a row of a batch's."""
    joined: dict[str, Any] = {}
    for name, first in found[0][0].items():
        rows = [given[name][row] for given, row in found]
        joined[name] = torch.stack(rows) if isinstance(first, Tensor) else rows  # type: ignore[arg-type]
    return joined


def _same_form(title: str, first: Given, given: Given) -> None:
    """Refuse answers that cannot be kept beside others: names, shapes and dtypes are the same in each batch."""

    def form(answers: Given) -> dict[str, str]:
        return {
            name: f"{value.dtype} [B{''.join(f', {n}' for n in value.shape[1:])}]"
            if isinstance(value, Tensor)
            else "text"
            for name, value in answers.items()
        }

    if form(first) != form(given):
        raise TrainingError(
            f"benchmark '{title}' answers in another form than before: {form(given)}, not {form(first)}"
        )


def _check(title: str, given: Mapping[str, Any], count: int) -> None:
    """Refuse answers that are not one for each image."""
    for name, value in given.items():
        texts = isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
        if not texts and not (isinstance(value, Tensor) and value.ndim):
            what = f"'{name}' is a {type(value).__name__}; expected a tensor [B, ...], or a text for each image"
            raise TrainingError(f"benchmark '{title}': {what}")
        if len(value) != count:
            raise TrainingError(f"benchmark '{title}': {len(value)} answers '{name}' about {count} images")
        if name in ("image", "prompt"):
            raise TrainingError(f"benchmark '{title}': an answer is called '{name}', as a column of the CSV file is")
    if not given:
        raise TrainingError(f"benchmark '{title}' gives no answer")
