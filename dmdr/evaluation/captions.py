"""Real images and what they show: by an index, text files beside them, the columns of a dataset, or class folders."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmdr.errors import ConfigError
from dmdr.evaluation.image_folder import find_index
from dmdr.evaluation.pictures import Archive, Dataset, Files, Pictures, pictures_in
from dmdr.images import check_headers
from dmdr.prompt_files import TEXT, Row, TextFile, likely_column, refuse_arguments, suffix_of

logger = logging.getLogger("dmdr")

ByLabel = Mapping[Any, Sequence[Row]] | None
FLAG = "--real_images"
HOW = "write them into metadata.jsonl, or into NAME.txt beside NAME.png"


@dataclass(frozen=True)
class Captioned:
    """N images, and a prompt row of each: its caption under `prompt`, and further columns."""

    pictures: Pictures
    rows: Sequence[Row]


def captioned(place: str, column: str | None, by_label: ByLabel, *, checked: bool = True) -> Captioned:
    """The images of a folder or a dataset with their captions; no image is read.

    Args:
        place: A folder as `datasets` calls an imagefolder, with captions in its index (`metadata.jsonl` or `.csv`); a
            folder with a text file NAME.txt beside each image; a folder of class folders; or a dataset, as of
            `pictures_in`.
        column: That of the captions; by default the first of those that published sets have.
        by_label: The run's own prompt rows by their label, of which an image gets the first that has a label and no
            caption; None of streamed prompts. The label of a class folder is its place in the order of names, as
            `datasets` counts.
        checked: Look at the header of each file.

    Raises:
        ConfigError: If there are no images, one has no caption, or a file is damaged.
    """
    index = find_index(place)
    if index and suffix_of(str(index)) in TEXT:
        told = _index_rows(index)
        paths = [Path(place) / row.pop("file_name") for row in told]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise ConfigError(f"{FLAG}: {index} names {missing}, which is not there")
        if checked:
            check_headers(paths)
        return Captioned(Files(Path(place), paths), _rows(told, column, by_label, str(index)))
    pictures = pictures_in(place, FLAG, checked=checked)
    if isinstance(pictures, Dataset):
        return Captioned(pictures, _rows(pictures.rows(), column, by_label, place))
    if isinstance(pictures, Archive):
        raise ConfigError(f"{FLAG} {place}: an .npz file has no captions; give a folder or a dataset")
    assert isinstance(pictures, Files)
    if column:
        raise ConfigError(f"--caption_column is not read: {place} has neither a metadata.jsonl nor a metadata.csv")
    texts = [path.with_suffix(".txt") for path in pictures.paths]
    if any(text.is_file() for text in texts):
        return Captioned(pictures, [{"prompt": _text(text)} for text in texts])
    folders = sorted({path.parent for path in pictures.paths})
    if folders == [Path(place)]:
        raise ConfigError(f"{FLAG}: the images in {place} have no captions; {HOW}")
    labels = {folder: label for label, folder in enumerate(folders)}
    return Captioned(
        pictures, _rows([{"label": labels[path.parent]} for path in pictures.paths], None, by_label, place)
    )


def _index_rows(index: Path) -> list[Row]:
    try:
        found = [row for row in TextFile(str(index), "file_name") if row]
    except ConfigError as error:
        raise ConfigError(f"{FLAG}: {str(error).removeprefix('--prompts: ')}") from error
    if not found or not all(isinstance(row.get("file_name"), str) for row in found):
        raise ConfigError(f"{FLAG}: {index} must have rows with a 'file_name' each")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = "is not there, though other images have one" if not file.exists() else f"cannot be read: {error}"
        raise ConfigError(f"{FLAG}: the caption {file} {what}") from error


def _rows(told: Sequence[Row], column: str | None, by_label: ByLabel, where: str) -> list[Row]:
    """The prompt rows of what is told of the images."""
    names = dict.fromkeys(name for row in told for name in row)
    caption = column or likely_column("prompt", names)
    if caption is not None and caption not in names:
        raise ConfigError(f"--caption_column {column}: {where} has {', '.join(names) or 'no columns'}")
    if caption is None and "label" not in names:
        has = f"has {', '.join(names)}: name the column with --caption_column" if names else HOW
        raise ConfigError(f"{FLAG}: {where} has no captions; {has}")
    refuse_arguments(names, f"{FLAG}: {where}")
    if caption is None:
        return _of_labels([row["label"] for row in told], by_label, where)
    found = []
    for number, row in enumerate(told, start=1):
        if not isinstance(row.get(caption), str):
            said = f"is no text for image {number}: {row.get(caption)!r:.80}"
            raise ConfigError(f"{FLAG}: the column '{caption}' of {where} {said}")
        found.append({name: row.get(name) for name in names if name != caption} | {"prompt": row[caption]})
    return found


def _of_labels(labels: Sequence[Any], by_label: ByLabel, where: str) -> list[Row]:
    """The prompt row of each label."""
    if by_label is None:
        raise ConfigError(f"{FLAG}: {where} has labels, whose prompts are those of --prompts: do not stream these")
    for number, label in enumerate(labels, start=1):
        if label not in by_label:
            what = f"no captions, and image {number} has the label {label}, of which --prompts has no row"
            raise ConfigError(f"{FLAG}: {where} has {what}")
    if several := sorted(label for label in set(labels) if len(by_label[label]) > 1):
        logger.warning("%s: images get the first of the prompts of their label: %s", FLAG, several)
    return [dict(by_label[label][0]) for label in labels]
