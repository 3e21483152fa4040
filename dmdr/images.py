"""Image tensors to files, as diffusers rounds them, and back; image grids; files that are complete or absent."""

import base64
import math
import os
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dmdr.errors import ConfigError

CELL = 48  # px; smaller images are enlarged to at least this
GAP = 2  # px of white between two cells


def _bytes(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, H, W, 3] uint8 on the CPU; NaN is black, so that a broken student can be shown."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], not {list(images.shape)}")
    pixels = images.detach().cpu().float().nan_to_num(0.0).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images as PIL images of mode RGB, by the rounding of a stock pipeline.

    Args:
        images: [B, 3, H, W], any float dtype, in [0, 1]; values outside are clamped.

    Raises:
        ValueError: `images` has another shape.

    Source: `VaeImageProcessor.numpy_to_pil` of diffusers: float32, times 255, round half to even, uint8.
    """
    return [Image.fromarray(pixels.numpy()) for pixels in _bytes(images)]


def image_grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """One picture of many, row by row, with thin white gaps; an incomplete last row is filled with white.

    Args:
        images: [B, 3, H, W] in [0, 1], B >= 1.
        columns: Images per row; by default as square as possible.
        scale: Whole factor of enlargement (nearest neighbour, so that pixels stay visible); by default the least that
            makes the shorter side 48 px or more, hence 1 for anything that large already.

    Raises:
        ValueError: No image, another shape, or a factor or a number of columns below 1.
    """
    pixels = _bytes(images)
    count, height, width, _ = pixels.shape
    if pixels.numel() == 0:
        raise ValueError(f"an image grid needs at least one image, not a tensor of {list(images.shape)}")
    columns = min(math.ceil(math.sqrt(count)) if columns is None else columns, count)
    scale = math.ceil(CELL / min(height, width)) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be 1 or more, not {columns} and {scale}")
    rows = math.ceil(count / columns)
    cell_height, cell_width = height * scale, width * scale
    size = (columns * (cell_width + GAP) - GAP, rows * (cell_height + GAP) - GAP)
    picture = Image.new("RGB", size, "white")
    for i, cell in enumerate(pixels):
        enlarged = Image.fromarray(cell.numpy()).resize((cell_width, cell_height), Image.Resampling.NEAREST)
        picture.paste(enlarged, (i % columns * (cell_width + GAP), i // columns * (cell_height + GAP)))
    return picture


def save(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write an image, atomically; the suffix of `path` names the format, its folder is made.

    Args:
        text: Keys and values that a PNG file shall hold beside the pixels.
    """
    buffer, told = BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        told.add_itxt(key, value)
    image.save(buffer, format=Image.registered_extensions()[path.suffix.lower()], pnginfo=told)
    write_atomically(path, buffer.getvalue())


def text_in(path: Path, key: str) -> str | None:
    """What a PNG file holds under a key beside the pixels; None where it is not there, damaged, or holds none."""
    try:
        with Image.open(path) as image:
            image.load()
            return getattr(image, "text", {}).get(key)
    except Exception:  # each decoder has its own
        return None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, whatever interrupts; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system; opened plainly, because `tempfile`
    # would give a mode that nobody else can read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:  # which names the temporary file, or none where the disk is full
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def can_hold_files(folder: Path) -> bool:
    """Whether a file can be made in this folder: tried, because permissions do not tell of read-only and odd places."""
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def embed(path: Path, max_width: int = 1600) -> tuple[str, int, int]:
    """An image file as a data URI, with the embedded width and height in pixels.

    A picture wider than `max_width` is made smaller and a JPEG: an image grid of 1024 px images is 30 MB as it is.

    Raises:
        OSError: There is no such file, or it is not a complete image.
    """
    data, kind = path.read_bytes(), path.suffix.lower().removeprefix(".")
    with Image.open(BytesIO(data)) as image:
        image.load()
        width, height = image.size
        if width > max_width:
            height, width = max(1, round(height * max_width / width)), max_width
            buffer = BytesIO()
            image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
            data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height


def read_image(file: Path | BinaryIO, name: object = None) -> Tensor:
    """An image as [3, H, W] uint8, converted to RGB as in published evaluations: alpha and EXIF rotation are ignored.

    Args:
        file: Its path, or its bytes.
        name: Of the image, where that is not the path.

    Raises:
        ConfigError: If it is damaged, or has more than 8 bits per channel.
    """
    name = name or file
    with _open(file, name) as image:
        try:
            pixels = np.array(image.convert("RGB"))
        except Exception as error:  # each decoder has its own
            raise _unreadable(name, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_headers(paths: Iterable[Path]) -> None:
    """Refuse files that are no images or have more than 8 bits per channel, by their headers.

    Raises:
        ConfigError: Names the first one.
    """
    for path in paths:
        _open(path, path).close()


def _open(file: Path | BinaryIO, name: object) -> Image.Image:
    try:
        image = Image.open(file)
    except Exception as error:  # each decoder has its own
        raise _unreadable(name, error) from error
    if image.mode.startswith(("I", "F")):
        image.close()
        raise ConfigError(f"{name} has more than 8 bits per channel; convert it to 8 bits first")
    return image


def _unreadable(name: object, error: Exception) -> ConfigError:
    if isinstance(error, Image.UnidentifiedImageError):
        return ConfigError(f"{name} is no image")
    return ConfigError(f"{name} cannot be read: {error}")
