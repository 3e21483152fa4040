"""How a benchmark's images lie in a folder (`benchmarks.Layout`): which file is which image, read and written."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from dmdr import images
from dmdr.benchmarks import Layout
from dmdr.errors import ConfigError
from dmdr.evaluation import image_folder
from dmdr.evaluation.pictures import Archive, Files, Pictures, Quarters
from dmdr.prompts import Row

ABOUT = "metadata.jsonl"  # of one prompt, in its folder
ID = "item_id"  # column that names a prompt's grid
ReadRows = Callable[[str], Sequence[Row]]  # the rows of a file or dataset in the benchmark's own layout


# --- Writing ----------------------------------------------------------------------------------------------------------


def files(layout: Layout, prompts: int, each: int) -> list[str]:
    """Where images are drawn to: `each` of the first prompt, then of the next."""
    if layout == "flat":
        return image_folder.names(prompts * each)
    return [f"{row:05d}/samples/{k:04d}.png" for row in range(prompts) for k in range(each)]


def complete(layout: Layout, folder: Path, rows: Sequence[Row], each: int) -> None:
    """Write what belongs beside images that have been drawn: the prompt rows, and grids.

    Args:
        layout: Of the benchmark.
        folder: Of the images.
        rows: Of each prompt.
        each: Images of a prompt.
    """
    if layout == "flat":
        image_folder.write_index(folder, [row for row in rows for _ in range(each)])
        return
    for number, row in enumerate(rows):
        images.write_atomically(folder / f"{number:05d}" / ABOUT, (json.dumps(row) + "\n").encode())
    if layout == "grids":
        paths = [folder / name for name in files(layout, len(rows), each)]
        for number, row in enumerate(rows):
            grid = _grid(paths[number * each : (number + 1) * each])
            images.save(grid, folder / "grids" / f"{row[ID]}.png")


def _grid(paths: Sequence[Path]) -> Image.Image:
    """Four images as 2 x 2, without gaps."""
    with Image.open(paths[0]) as first:
        width, height = first.size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            grid.paste(image, (i % 2 * width, i // 2 * height))
    return grid


# --- Reading ----------------------------------------------------------------------------------------------------------


def find(
    place: Path, layout: Layout, prompts: str | None, read_rows: ReadRows, *, column: str, unread: bool, kept: Path
) -> tuple[Pictures, list[Row]]:
    """The images of a folder or an .npz file, and the prompt row of each.

    Where `prompts` is not given, the rows are those that lie beside the images.

    Args:
        place: The folder or file.
        layout: Of the benchmark; images may also lie flat.
        prompts: Where the prompt rows are.
        read_rows: Reads them, as the benchmark does.
        column: That of the prompts in an index.
        unread: Nobody reads the prompts: images without any are taken.
        kept: File to which prompt rows that lie apart, one beside each prompt's images, are gathered.

    Raises:
        ConfigError: If an image is missing or cannot be read, or prompts are missing or do not match the images.
    """
    given = None if prompts is None else list(read_rows(prompts))
    if place.suffix == ".npz":
        archive = Archive(place)
        return archive, _in_order(place, len(archive), given, prompts, unread)
    if numbered := sorted(_numbered(place)):
        return _samples(place, numbered, given, prompts, read_rows, kept)
    if index := image_folder.find_index(str(place)):
        paths, own = image_folder.indexed_images(index, column)
        rows = own if given is None else _repeated(given, len(paths), place, prompts)
        for path, told, row in zip(paths, own, rows, strict=True) if given is not None else ():
            _match(path, told["prompt"], row["prompt"], prompts)
        if given is None and not unread:
            rows = [dict(row) for row in read_rows(str(index))]  # the benchmark knows what a row must have
            rows = [{name: value for name, value in row.items() if name != "file_name"} for row in rows]
        return Files(place, paths), rows
    if layout == "grids":
        return _grids(place, given, prompts)
    paths = image_folder.find_images(str(place))
    return Files(place, paths), _in_order(place, len(paths), given, prompts, unread)


def _numbered(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.name.isdecimal() and (path / "samples").is_dir()]


def _samples(
    place: Path,
    folders: Sequence[Path],
    given: Sequence[Row] | None,
    prompts: str | None,
    read_rows: ReadRows,
    kept: Path,
) -> tuple[Pictures, list[Row]]:
    told = []
    for folder in folders:
        try:
            told.append(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder / ABOUT} cannot be read: {error}") from error
        if not isinstance(told[-1], dict):
            raise ConfigError(f"{folder / ABOUT} holds no prompt row, a JSON object with a 'prompt'")
    if given is None:
        images.write_atomically(kept, "".join(json.dumps(row) + "\n" for row in told).encode())
        given = list(read_rows(str(kept)))
    if len(given) != len(folders):
        raise ConfigError(f"{place} holds images of {len(folders)} prompts, but --prompts {prompts} has {len(given)}")
    paths, rows = [], []
    for folder, said, row in zip(folders, told, given, strict=True):
        _match(folder, said.get("prompt"), row["prompt"], prompts)
        found = image_folder.find_images(str(folder / "samples"))
        paths += found
        rows += [dict(row)] * len(found)
    return Files(place, paths), rows


def _grids(place: Path, given: Sequence[Row] | None, prompts: str | None) -> tuple[Pictures, list[Row]]:
    if given is None:
        raise ConfigError(f"--prompts is missing: {place} holds grids of images and no prompts")
    found = image_folder.find_images(str(place))
    there = {path.stem: path for path in found}
    if len(there) < len(found):
        raise ConfigError(f"{place} holds several grids of one name, with other suffixes")
    names = [str(row[ID]) for row in given]
    if missing := [name for name in names if name not in there]:
        raise ConfigError(f"{place} has no grid of {missing[0]}, which --prompts {prompts} names")
    if unknown := sorted(there.keys() - set(names)):
        raise ConfigError(f"{there[unknown[0]]}: --prompts {prompts} names no such prompt")
    return Quarters([there[name] for name in names]), [dict(row) for row in given for _ in range(4)]


def _in_order(place: Path, count: int, given: Sequence[Row] | None, prompts: str | None, unread: bool) -> list[Row]:
    if given is not None:
        return _repeated(given, count, place, prompts)
    if unread:
        return [{"prompt": ""}] * count
    raise ConfigError(f"--prompts is missing: {place} holds images and no prompts")


def _repeated(given: Sequence[Row], count: int, place: Path, prompts: str | None) -> list[Row]:
    """The rows, each as often as there are images of it."""
    each, left = divmod(count, len(given))
    if left or not each:
        said = f"{place} holds {count} images, but --prompts {prompts} has {len(given)} prompts"
        raise ConfigError(f"{said} (blank lines do not count)")
    return [dict(row) for row in given for _ in range(each)]


def _match(where: Path, told: object, asked: object, prompts: str | None) -> None:
    def plain(text: object) -> str:
        return re.sub(r"\s+", " ", str(text)).strip()

    if plain(told) != plain(asked):
        said = f"is an image of {json.dumps(told)}, but --prompts {prompts} has {json.dumps(asked)} there"
        raise ConfigError(f"{where} {said}")
