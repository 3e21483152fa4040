"""Images that are read when they are asked for, a few at a time: files, quarters of files, an archive, a dataset."""

import zipfile
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from dmdr.errors import ConfigError, one_line
from dmdr.evaluation.image_folder import find_images
from dmdr.hub import is_hub_id, open_dataset
from dmdr.images import read_image
from dmdr.prompts import Row, is_plain


class Pictures(Protocol):
    """N images."""

    def __len__(self) -> int:
        """N."""

    def name(self, index: int) -> str:
        """What an image is called."""

    def read(self, index: int) -> Tensor:
        """An image, [3, H, W] uint8.

        Raises:
            ConfigError: If it is damaged.
        """

    def stamp(self, index: int) -> str:
        """A text that changes when the image's file does."""


def _stamp(path: Path) -> str:
    about = path.stat()
    return f"{path.absolute()} {about.st_size} {about.st_mtime_ns}"


@dataclass(frozen=True)
class Files:
    """An image a file, in a folder or in folders below it."""

    folder: Path
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index].relative_to(self.folder).as_posix()

    def read(self, index: int) -> Tensor:
        return read_image(self.paths[index])

    def stamp(self, index: int) -> str:
        return _stamp(self.paths[index])


@dataclass(frozen=True)
class Quarters:
    """Four images a file: top left, top right, bottom left, bottom right."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return 4 * len(self.paths)

    def name(self, index: int) -> str:
        return f"{self.paths[index // 4].name}#{index % 4}"

    def read(self, index: int) -> Tensor:
        path = self.paths[index // 4]
        grid = read_image(path)
        height, width = grid.shape[1] // 2, grid.shape[2] // 2
        if grid.shape[1:] != (2 * height, 2 * width):
            raise ConfigError(f"{path} is no grid of 2 x 2 images: it has {grid.shape[2]} x {grid.shape[1]} pixels")
        row, column = divmod(index % 4, 2)
        return grid[:, row * height : (row + 1) * height, column * width : (column + 1) * width]

    def stamp(self, index: int) -> str:
        return f"{_stamp(self.paths[index // 4])} {index % 4}"


@dataclass(frozen=True)
class Archive:
    """The `arr_0` [N, H, W, 3] uint8 of an .npz file, as ADM's evaluation suite keeps samples; it is never read whole.

    Raises:
        ConfigError: If there is no such array, or it is compressed.
    """

    path: Path

    @cached_property
    def _array(self) -> tuple[int, tuple[int, ...]]:
        """Where its numbers begin in the file, and its shape."""
        if not zipfile.is_zipfile(self.path):
            raise ConfigError(f"{self.path} {'is no .npz file' if self.path.exists() else 'is not there'}")
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                packed = archive.getinfo("arr_0.npy").compress_type != zipfile.ZIP_STORED
                version = npy.read_magic(member)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, fortran, dtype = read(member)
                header = member.tell()
                with self.path.open("rb") as file:  # the local header, whose extra field differs from the directory's
                    file.seek(archive.getinfo("arr_0.npy").header_offset + 26)
                    name, extra = np.frombuffer(file.read(4), "<u2").tolist()
                start = archive.getinfo("arr_0.npy").header_offset + 30 + name + extra + header
        except KeyError as error:
            raise ConfigError(f"{self.path} holds no array 'arr_0' of images") from error
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{self.path} cannot be read: {one_line(error)}") from error
        if packed:
            raise ConfigError(f"{self.path} is compressed: write it with numpy.savez, so that images can be read alone")
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran or not shape[0]:
            what = f"{dtype} {list(shape)}{' in column order' if fortran else ''}"
            raise ConfigError(f"{self.path}: 'arr_0' must be uint8 [N, height, width, 3], not {what}")
        return start, shape

    def __len__(self) -> int:
        return self._array[1][0]

    def name(self, index: int) -> str:
        return f"{self.path.name}#{index}"

    def read(self, index: int) -> Tensor:
        start, (_, *shape) = self._array
        size = int(np.prod(shape))
        with self.path.open("rb") as file:
            file.seek(start + index * size)
            data = file.read(size)
        if len(data) < size:
            raise ConfigError(f"{self.path} is damaged: it ends before image {index}")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape).permute(2, 0, 1)

    def stamp(self, index: int) -> str:
        return f"{_stamp(self.path)} {index}"


@dataclass(frozen=True)
class Dataset:
    """The images of a dataset: a folder that `datasets` reads or saved, or an id on the hub.

    Attributes:
        flag: What named it.

    Raises:
        ConfigError: If it cannot be read, or has not one column of images.
    """

    place: str
    split: str
    flag: str

    @cached_property
    def _whole(self) -> tuple[Any, str]:
        """The dataset, and the name of its column of images."""
        try:
            dataset = open_dataset(self.place, None, self.split, streaming=False, how=(self.flag, "write NAME:SPLIT"))
        except ConfigError:
            raise
        except Exception as error:  # of datasets, Arrow, the hub and the network
            what = "cannot be read" if Path(self.place).exists() else "no such folder, and the hub says"
            raise ConfigError(f"{self.flag}: {self.place}: {what}: {one_line(error)}") from error
        from datasets import Image

        found = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
        if len(found) != 1:
            what = f"has {len(found) or 'no'} columns of images; it must have one"
            raise ConfigError(f"{self.flag}: {self.place} {what}: {', '.join(dataset.features)}")
        return dataset, found[0]

    @cached_property
    def _images(self) -> tuple[Any, str]:
        """The images as files, and the name of their column."""
        from datasets import Image

        dataset, column = self._whole
        return dataset.select_columns([column]).cast_column(column, Image(decode=False)), column

    def rows(self) -> list[Row]:
        """What the other columns say of each image, in text and numbers."""
        dataset, _ = self._whole
        return list(dataset.select_columns([name for name, kind in dataset.features.items() if is_plain(kind)]))

    def __len__(self) -> int:
        return len(self._images[0])

    def name(self, index: int) -> str:
        return f"{self.place}:{self.split}#{index}"

    def read(self, index: int) -> Tensor:
        dataset, column = self._images
        image = dataset[index][column]
        return read_image(BytesIO(image["bytes"]) if image["bytes"] else Path(image["path"]), self.name(index))

    def stamp(self, index: int) -> str:
        return f"{self._files} {index}"

    @cached_property
    def _files(self) -> list[str]:
        return [_stamp(Path(file["filename"])) for file in self._images[0].cache_files]


def pictures_in(place: str | Path, flag: str = "--reference_images", *, checked: bool = True) -> Pictures:
    """The images of an .npz file, of a folder, of the folders in it, such as one a class, or of a dataset.

    Args:
        place: A path, or a dataset: a folder that `datasets` reads or saved, or an id on the hub, where a split other
            than `train` comes after a colon: `owner/name:validation[:5000]`.
        flag: What named it, for messages.
        checked: Look at the header of each file.

    Raises:
        ConfigError: If there are none, or one is damaged.
    """
    path = Path(place)
    if path.suffix == ".npz":
        return Archive(path)
    name, _, split = str(place).partition(":")
    if _is_dataset(path) or (not path.exists() and (Path(name).is_dir() if split else is_hub_id(name))):
        return Dataset(name, split or "train", flag)
    if not path.is_dir():
        raise ConfigError(f"{flag}: no such folder: {place}")
    below = sorted(path for path in path.iterdir() if path.is_dir())
    return Files(path, [path for folder in below or [path] for path in find_images(str(folder), checked=checked)])


def _is_dataset(folder: Path) -> bool:
    """Whether a folder holds tables rather than files of images."""
    places = (folder, folder / "data")  # of files as the hub has them, or as `save_to_disk` writes them
    return any(next(place.glob(f"*.{kind}"), None) for place in places for kind in ("parquet", "arrow"))


def batches(pictures: Pictures, own: Sequence[int], size: int) -> Generator[tuple[list[int], Tensor]]:
    """Images of these indices, in order; a few batches at most are in memory.

    Who stops reading early closes it: threads read images ahead.

    Args:
        pictures: All images.
        own: Indices of those that are read.
        size: Images per batch; fewer where the size of the images changes.

    Returns:
        B indices, and their images [B, 3, H, W] uint8.

    Raises:
        ConfigError: If an image is damaged.
    """
    with closing(read_ahead(pictures, own, size)) as images:
        for _, same in groupby(zip(own, images, strict=True), key=lambda pair: pair[1].shape):
            while part := list(islice(same, size)):
                yield [index for index, _ in part], torch.stack([image for _, image in part])


def read_ahead(pictures: Pictures, own: Sequence[int], count: int) -> Generator[Tensor]:
    """The images in order, of which threads decode the next `count` meanwhile."""
    with ThreadPoolExecutor() as pool:
        ahead: deque[Future[Tensor]] = deque()
        for index in own:
            ahead.append(pool.submit(pictures.read, index))
            if len(ahead) > count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
