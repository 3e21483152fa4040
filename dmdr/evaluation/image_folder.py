"""A folder of images, and the index that says the prompt row of each: written by `dmdr-sample`, read by `dmdr-eval`.

The index is the metadata file of the `imagefolder` layout of `datasets`, which loads the folder as it is: rows with a
`file_name`, the prompt and its other columns.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dmdr import images
from dmdr.errors import ConfigError
from dmdr.images import check_headers
from dmdr.prompts import Row, read_prompts

INDEX = "metadata.jsonl"
INDICES = (INDEX, "metadata.csv", "metadata.parquet")  # as `datasets` takes them


# --- Writing ----------------------------------------------------------------------------------------------------------


def check_place(folder: Path, rows: Sequence[Row]) -> None:
    """Refuse a folder whose index would lose images to that of the new ones, before these are drawn.

    Raises:
        ConfigError: If it has an index of other images, or is none, or the rows have a column that an index needs.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_dir {folder} is no folder")
    if any("file_name" in row for row in rows):
        raise ConfigError(f"--prompts: rename the column 'file_name': {INDEX} uses this name for the images")
    index = find_index(str(folder))
    new = dict(zip(names(len(rows)), (str(row["prompt"]) for row in rows), strict=True))
    if index and not (index.name == INDEX and _named(index).items() <= new.items()):
        what = f"{index} lists other images than the {len(rows)} of this command"
        raise ConfigError(f"--output_dir {folder}: {what}; give another folder, or empty this one")


def write_index(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the index of images that are there, one for each prompt row; returns the images' paths."""
    found = names(len(rows))
    lines = [json.dumps({"file_name": name} | row) + "\n" for name, row in zip(found, rows, strict=True)]
    images.write_atomically(folder / INDEX, "".join(lines).encode())
    return [folder / name for name in found]


def names(count: int) -> list[str]:
    """Of so many images' files."""
    return [f"{i:04d}.png" for i in range(count)]


def _named(index: Path) -> dict[str, str]:
    """The prompts of the images that an index names; its own name where it is no index of ours."""
    try:
        return {row["file_name"]: str(row["prompt"]) for row in _read_index(index, "prompt")}
    except ConfigError:
        return {index.name: ""}


# --- Reading ----------------------------------------------------------------------------------------------------------


def find_index(folder: str) -> Path | None:
    """The index of a folder, if it has one."""
    return next((path for name in INDICES if (path := Path(folder) / name).is_file()), None)


def indexed_images(index: Path, column: str) -> tuple[list[Path], list[Row]]:
    """The images that an index names, in its order, and their prompt rows.

    Args:
        index: The file.
        column: That of the prompts.

    Raises:
        ConfigError: If one of them is missing or cannot be read, or the folder holds images that it does not name.
    """
    rows = _read_index(index, column)
    paths = [index.parent / row.pop("file_name") for row in rows]
    there = set(find_images(str(index.parent)))
    if missing := [path for path in paths if path not in there]:
        raise ConfigError(f"{index} names {missing[0].name}, but this image is not in the folder")
    if unnamed := sorted(there - set(paths)):
        what = f"{len(unnamed)} of the images in its folder, such as {unnamed[0].name}"
        raise ConfigError(f"{index} does not name {what}; move them away, or delete this file")
    return paths, rows


def _read_index(index: Path, column: str) -> list[Row]:
    rows = read_prompts(str(index), column=column, repeated=True).rows
    for i, row in enumerate(rows, start=1):
        name = row.get("file_name")
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index} row {i} needs a 'file_name': an image in the same folder")
    return list(rows)


def find_images(folder: str, *, checked: bool = True) -> list[Path]:
    """The images that lie directly in a folder, by natural order of their names: 2.png before 10.png.

    Images are the files whose suffix Pillow opens, hidden ones aside.

    Args:
        folder: The folder.
        checked: Read the header of each.

    Raises:
        ConfigError: If there is no such folder, it holds none, or one of them cannot be read.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"no such folder: {folder}")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = (path for path in Path(folder).iterdir() if path.suffix.lower() in suffixes and path.is_file())
    paths = sorted((path for path in found if not path.name.startswith(".")), key=_natural)
    if not paths:
        raise ConfigError(f"{folder} holds no image")
    if checked:
        check_headers(paths)
    return paths


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.stem)  # text and number in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name
