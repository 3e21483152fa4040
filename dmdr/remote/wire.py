"""What a remote reward and its server say to each other: a safetensors body asks, JSON answers. No pickle anywhere."""

import json
import math
from collections.abc import Mapping, Sequence
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
        if taken := {"images", "prompts"} & self.columns.keys():
            raise ValueError(f"no column may be called '{taken.pop()}'")
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
            raise ValueError(f"the body speaks version {metadata.get('version')} of the protocol, not {VERSION}")
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
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


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
