"""Images and their scores: streamed through the rewards in batches, and summarised."""

import csv
import io
import math
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, islice
from pathlib import Path

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.evaluation.image_folder import read_image
from dmdr.images import can_hold_files
from dmdr.prompts import Row, split_columns
from dmdr.rewards import Rewards
from dmdr.statistics import standard_error

Part = tuple[list[int], dict[str, Tensor]]  # some of the images by index, and their scores: name -> [B]


def batches(paths: Sequence[Path], rows: Sequence[Row], size: int) -> Generator[tuple[Tensor, list[Row]]]:
    """Images with their rows, in order; a few batches at most are in memory.

    Args:
        paths, rows: As many of each.
        size: Images per batch; fewer where the size of the images changes.

    Returns:
        Batches [B, 3, H, W] uint8, each with B rows.
    """
    with closing(_read_ahead(paths, size)) as images:
        pairs = zip(images, rows, strict=True)
        for _, same in groupby(pairs, key=lambda pair: pair[0].shape):
            while part := list(islice(same, size)):
                yield torch.stack([image for image, _ in part]), [row for _, row in part]


def _read_ahead(paths: Sequence[Path], count: int) -> Generator[Tensor]:
    """The images in order, of which threads decode the next `count` meanwhile."""
    with ThreadPoolExecutor() as pool:
        ahead: deque[Future[Tensor]] = deque()
        for path in paths:
            ahead.append(pool.submit(read_image, path))
            if len(ahead) > count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def score_images(
    rewards: Rewards,
    paths: Sequence[Path],
    rows: Sequence[Row],
    own: Sequence[int],
    *,
    batch_size: int,
    device: torch.device,
) -> Generator[Part]:
    """The raw scores of a share of the images, batch by batch.

    Who stops reading early closes it: threads read images ahead.

    Args:
        rewards: Prepared for `device`.
        paths, rows: All images and their prompt rows, as many of each.
        own: Indices of those that are scored.
        batch_size: Images that are scored at a time.
        device: Where the rewards run.

    Returns:
        The next B indices, and name -> [B] float32 on the CPU; NaN where a reward could not score.

    Raises:
        ConfigError: If an image is damaged.
        RewardError: If a reward fails.
    """
    indices = iter(own)
    with closing(batches([paths[i] for i in own], [rows[i] for i in own], batch_size)) as parts:
        for images, part in parts:
            prompts, columns = split_columns(part)
            with torch.no_grad():
                scores = rewards.each(images.to(device).float() / 255, prompts, **columns)
            yield list(islice(indices, len(part))), {name: score.cpu() for name, score in scores.items()}


def joined(parts: Sequence[Part]) -> Part:
    """All parts as one, in the order of the images."""
    parts = sorted(parts, key=lambda part: part[0])
    indices = [index for part, _ in parts for index in part]
    return indices, {name: torch.cat([scores[name] for _, scores in parts]) for name in parts[0][1]}


def as_csv(paths: Sequence[Path], rows: Sequence[Row], scores: Mapping[str, Tensor]) -> bytes:
    """A line per image: its name, its prompt and its scores, empty where a reward cannot score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "prompt", *scores])
    columns = (values.tolist() for values in scores.values())
    for path, row, *values in zip(paths, rows, *columns, strict=True):
        cells = (f"{value:.9g}" if math.isfinite(value) else "" for value in values)  # 9 digits are all of a float32
        writer.writerow([path.name, row["prompt"], *cells])
    return text.getvalue().encode("utf-8", "backslashreplace")  # a file's name need not be text


def table(scores: Mapping[str, Tensor]) -> str:
    """A line per reward: mean and standard error over the images that it scored, and their number."""
    lines = [["reward", "mean", "standard error", "images"]]
    for name, values in scores.items():
        scored = values[values.isfinite()].double()
        figures = (f"{x:.5g}" if math.isfinite(x) else "-" for x in (scored.mean().item(), standard_error(scored)))
        lines.append([name, *figures, str(len(scored))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def require_writable(output: Path) -> None:
    """Refuse a place for a file that cannot be had, before anything is computed.

    Raises:
        ConfigError: If it is anything but a file, or cannot be made.
    """
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder")
    if output.exists() and not output.is_file():  # to write it atomically would replace /dev/null itself
        raise ConfigError(f"--output {output} is a device or a pipe; it must be a file")
    nearest = next(folder for folder in output.resolve().parents if folder.exists())
    if not can_hold_files(nearest):
        raise ConfigError(f"--output {output} cannot be written: {nearest} is no folder, or you may not write into it")
