"""What a remote reward and its server say to each other: a safetensors body asks, JSON answers. No pickle anywhere."""

import json
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

VERSION = 1
SERVICE = "dmdr-reward"  # how a server of ours introduces itself
TOKEN = "DMDR_REWARD_TOKEN"  # environment variable of the bearer token, for both


@dataclass(frozen=True, eq=False)
class Request:
    """Images to be scored, as one body.

    Attributes:
        images: [B, 3, H, W] uint8.
        prompts: B strings.
        columns: Further columns of the prompt rows, each of length B.

    Raises:
        ValueError: If these do not fit together; one line.
    """

    images: Tensor
    prompts: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        shape, dtype = list(self.images.shape), self.images.dtype
        if len(shape) != 4 or shape[1] != 3 or dtype != torch.uint8 or not self.images.numel():
            raise ValueError(f"images must be torch.uint8 [B, 3, H, W], not {dtype} {shape}")
        if not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError("prompts must all be text")
        if taken := sorted({"self", "images", "prompts"} & self.columns.keys()):  # arguments of every reward
            raise ValueError(f"no column may be called '{taken[0]}'")
        for name, column in {"prompts": self.prompts, **self.columns}.items():
            if len(column) != len(self):
                raise ValueError(f"{len(self)} images, but {len(column)} {name}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> "Request":
        columns = {name: column[part] for name, column in self.columns.items()}
        return Request(self.images[part], self.prompts[part], columns)

    def to_bytes(self) -> bytes:
        """The body that `read` reads.

        Raises:
            ValueError: If a column holds what JSON cannot.
        """
        try:
            columns = json.dumps({name: list(column) for name, column in self.columns.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(f"the columns {', '.join(self.columns)} cannot be sent as JSON: {error}") from error
        metadata = {"version": str(VERSION), "prompts": json.dumps(list(self.prompts)), "columns": columns}
        return save({"images": self.images.cpu().contiguous()}, metadata)

    @classmethod
    def read(cls, body: bytes) -> "Request":
        """The request of a body that anyone may have sent.

        Raises:
            ValueError: If it is none, or not of this version; one line.
        """
        try:
            tensors = load(body)
        except Exception as error:  # SafetensorError, and what torch says of a dtype that it lacks
            raise ValueError(f"the body is no safetensors file ({type(error).__name__})") from error
        # safetensors reads metadata from files only. It has just found this header to be a sound one.
        metadata = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")]).get("__metadata__") or {}
        if metadata.get("version") != str(VERSION):
            raise ValueError(f"the body uses version {metadata.get('version')} of the protocol, not {VERSION}")
        if tensors.keys() != {"images"}:
            raise ValueError(f"the body must hold the tensor images alone, not {', '.join(tensors) or 'none'}")
        return cls(tensors["images"], _list(metadata, "prompts"), _lists(metadata, "columns"))


def merge(requests: Sequence[Request]) -> Request:
    """Requests of one image size and the same columns as one."""
    images = torch.cat([request.images for request in requests])
    prompts = [prompt for request in requests for prompt in request.prompts]
    columns = {name: [cell for request in requests for cell in request.columns[name]] for name in requests[0].columns}
    return Request(images, prompts, columns)


def eight_bits(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as uint8, as a user would save them (`dmdr.images.to_pil`); NaN is black."""
    return (images.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def read_scores(body: bytes, count: int) -> list[float]:
    """The scores of an answer, NaN where it has null.

    Raises:
        ValueError: If the answer does not hold `count` scores.
    """
    scores = _json(body)
    scores = scores.get("scores") if isinstance(scores, dict) else None
    if not isinstance(scores, list) or len(scores) != count or not all(map(_is_score, scores)):
        raise ValueError(f"the answer does not hold {count} scores")
    return [math.nan if score is None else float(score) for score in scores]


def _is_score(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and not sys.float_info.max < abs(value) < math.inf)  # whole ones have any size


def numbers_of(scores: Any, count: int) -> list[float]:
    """What a reward returned for some images as numbers; NaN where it is None: an image that it cannot score.

    Args:
        scores: A list, tuple, array, tensor, series or iterator of numbers. What has no order of the images, such as a
            dict or a set, is none; nor is text.
        count: Of the images.

    Raises:
        TypeError: If it is not a number or None for each image; goes on from what the reward is called.
    """
    listed = hasattr(scores, "tolist") or isinstance(scores, Sequence | Iterator)
    found = (scores.tolist() if hasattr(scores, "tolist") else list(scores)) if listed else None
    if not isinstance(found, list) or isinstance(scores, str | bytes | bytearray):
        raise TypeError(f"returned {type(scores).__name__}; it must return a list with a number or None for each image")
    if len(found) != count:
        raise TypeError(f"returned {len(found)} scores for {count} images")
    return [_number(score, i) for i, score in enumerate(found)]


def _number(score: Any, i: int) -> float:
    kind = getattr(getattr(score, "dtype", None), "kind", "f")  # numpy's text and complex numbers become floats, too
    if score is None:
        return math.nan
    try:
        if isinstance(score, complex) or kind not in "biuf":
            raise TypeError
        return float(score.__float__())  # float() takes text, too
    except Exception as error:  # each type has its own
        raise TypeError(f"returned no number for image {i}, but {reprlib.repr(score)}") from error


def _list(metadata: Mapping[str, str], name: str) -> list[Any]:
    value = _json(metadata.get(name, ""))
    if not isinstance(value, list):
        raise ValueError(f"the metadata '{name}' must be a list in JSON")
    return value


def _lists(metadata: Mapping[str, str], name: str) -> dict[str, list[Any]]:
    value = _json(metadata.get(name, ""))
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        raise ValueError(f"the metadata '{name}' must be an object of lists in JSON")
    return value


def _json(text: str | bytes) -> Any:
    """The value; None for what is no JSON, or is nested too deeply to be anything good."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
