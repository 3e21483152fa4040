"""Differentiable image preprocessing: from [B, 3, H, W] in [0, 1] to the input of a network.

Clamps and roundings pass gradients straight through (Bengio et al. 2013, arXiv:1308.3432): `torch.clamp` has none
beyond its bounds, and in recent releases none at them, so that saturated pixels of an image could never change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr.errors import ConfigError
from dmdr.rewards import once

CLIP_NORM = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
BICUBIC = 3  # as Pillow numbers it

Geometry = Literal["squash", "longest", "shortest"]
Method = Literal["float", "exact", "unclamped"]
Offset = Literal["round", "floor"]


@dataclass(frozen=True)
class Preprocess:
    """What one network is fed.

    Attributes:
        size, geometry, edge, offset: See `fit`.
        mean, std: Of the three channels.
    """

    size: int
    geometry: Geometry = "shortest"
    edge: int | None = None
    offset: Offset = "round"
    mean: tuple[float, ...] = CLIP_NORM[0]
    std: tuple[float, ...] = CLIP_NORM[1]

    def __call__(self, images: Tensor, method: Method = "float") -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, size, size]; rewards of one sum that are fed alike share it."""
        how = self
        if images.shape[-1] == images.shape[-2] and self.edge in (None, self.size):
            how = replace(self, geometry="squash", edge=None, offset="round")  # all the same for a square
        return once(
            images,
            (how, method),
            lambda: normalise(
                fit(images, how.size, how.geometry, method, edge=how.edge, offset=how.offset), how.mean, how.std
            ),
        )

    @classmethod
    def of_processor(cls, config: Mapping[str, Any], defaults: "Preprocess", what: str) -> "Preprocess":
        """What transformers' `preprocessor_config.json` says; `defaults` where it is silent.

        Raises:
            ConfigError: If it does anything but a bicubic resize of the shortest edge, a square crop in the centre, and
                the normalisation of three channels.
        """
        try:
            size = _side(config.get("crop_size") or defaults.size, "height", "width")
            grown = size * (defaults.edge or defaults.size) // defaults.size
            edge = _side(config.get("size") or grown, "shortest_edge")
            mean, std = (
                tuple(float(x) for x in config.get(key) or default)
                for key, default in (("image_mean", defaults.mean), ("image_std", defaults.std))
            )
            usual = (
                all(config.get(name, True) for name in STEPS)
                and not config.get("do_pad")
                and config.get("resample", BICUBIC) == BICUBIC
                and abs(config.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-3
                and edge >= size
                and len(mean) == len(std) == 3
            )
        except (TypeError, ValueError):
            usual = False
        if not usual:
            raise ConfigError(f"{what}: these settings of its image processor are not supported: {dict(config)}")
        return replace(defaults, size=size, edge=edge, offset="floor", mean=mean, std=std)


def fit(
    images: Tensor,
    size: int,
    geometry: Geometry,
    method: Method = "float",
    edge: int | None = None,
    offset: Offset = "round",
) -> Tensor:
    """Bring images to a square.

    Args:
        images: [B, 3, H, W] in [0, 1], any floating dtype.
        size: Side of the square, in pixels.
        geometry: "squash" ignores the aspect ratio; "longest" scales the longest edge to `size` and pads with black;
            "shortest" scales the shortest edge to `edge` and crops the centre.
        method: How `resize` treats values.
        edge: Length of the shortest edge before the crop, in pixels, >= size; None for `size`.
        offset: Of the crop, where half a pixel is left: "round" as torchvision (to even), "floor" as transformers.

    Returns:
        [B, 3, size, size], at least float32.

    Raises:
        ValueError: If `images` are no such tensor.

    Source: torchvision's Resize (which truncates the long edge) and CenterCrop; HPSv2's ResizeMaxSize, which
        open_clip's "longest" equals but for ties of rounding. Deviates from it: an image whose longest edge is
        `size` already is padded too.
    """
    images = _checked(images)
    height, width = images.shape[-2:]
    if geometry == "squash":
        return resize(images, size, size, method)
    if geometry == "longest":
        scale = size / max(height, width)
        new_height, new_width = (max(1, round(side * scale)) for side in (height, width))
        top, left = (size - new_height) // 2, (size - new_width) // 2
        images = resize(images, new_height, new_width, method)
        return F.pad(images, (left, size - new_width - left, top, size - new_height - top))
    edge = edge or size
    new_height, new_width = (int(edge * side / min(height, width)) for side in (height, width))
    half = round if offset == "round" else int
    top, left = half((new_height - size) / 2), half((new_width - size) / 2)
    return resize(images, new_height, new_width, method)[..., top : top + size, left : left + size]


def resize(images: Tensor, height: int, width: int, method: Method = "float") -> Tensor:
    """Bicubic, antialiased resize.

    Args:
        images: [B, 3, H, W] in [0, 1], float32 or float64.
        height, width: The new size, in pixels.
        method: "float" is one pass, clamped to [0, 1]. "exact" gives what Pillow gives for the 8-bit image, with the
            gradient of "float": it rounds to 8 bits before, between and after a horizontal and a vertical pass.
            "unclamped" is "float" without the clamp: bicubic overshoots at edges.

    Returns:
        [B, 3, height, width], same dtype.

    "float" differs from "exact" by about 0.2 of 255 on average. Behind a ViT-H/14 and a ViT-L/14 with random weights,
    at 224 pixels, that moved dot products with unit features by at most 1.6e-4 for images like photographs (1/f noise)
    and 8.6e-4 for bars of pure black and white, from 512 x 512, 768 x 512 and 1024 x 1024.

    Source: Pillow's ImagingResample (src/libImaging/Resample.c), as of every release before 13. Pillow 13 begins with
        the vertical pass where the height shrinks much more than the width (its pull request 9549), which published
        scores did not: such images differ from it by about 0.3 of 255 on average.
    """
    if method == "exact":
        images = quantise(_bicubic(quantise(images), images.shape[-2], width))
        return quantise(_bicubic(images, height, width))
    images = _bicubic(images, height, width)
    return clamp(images) if method == "float" else images


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel. [B, 3, H, W]"""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def clamp(images: Tensor) -> Tensor:
    """Clamp to [0, 1], with the gradient of the identity."""
    return _straight_through(images.clamp(0, 1), images)


def quantise(images: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to multiples of 1/255, with the gradient of the identity."""
    return _straight_through((images.clamp(0, 1) * 255).round() / 255, images)


def _straight_through(value: Tensor, images: Tensor) -> Tensor:
    return value.detach() + (images - images.detach())  # the bracket is exactly 0, so the value is exactly `value`


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def _checked(images: Tensor) -> Tensor:
    """At least float32: antialiased interpolation knows no half precision on the CPU."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}; expected floating point [B, 3, H, W] in [0, 1]"
        )
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _side(size: Any, *keys: str) -> int:
    """Pixels: transformers writes 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}.

    Raises:
        ValueError: If it has other keys than these, or is no square.
    """
    if isinstance(size, dict) and set(size) != set(keys):
        raise ValueError(f"{size} has not the keys {', '.join(keys)}")
    sides = size.values() if isinstance(size, dict) else size if isinstance(size, (list, tuple)) else [size]
    (side,) = {int(side) for side in sides}
    return side
