"""A reward that a server computes, perhaps with other libraries, on another GPU or machine: `--reward http://...`."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar

import requests
import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.remote.http import SCHEME, RemoteError, Server, checked_token, checked_url, in_thread
from dmdr.remote.wire import SERVICE, TOKEN, VERSION, Request, eight_bits, read_scores


@dataclass
class RemoteReward:
    """A reward that a server computes: `--reward http://127.0.0.1:8000`, or remote: and its URL.

    The server is given 8-bit images, as a user would save them. A bearer token is read from the environment variable
    DMDR_REWARD_TOKEN.

    Attributes:
        columns: Those that the prompts must have, as the server says once it has been asked.
        reward_timeout: Seconds to go on trying a server that does not answer, before the run saves and stops.
        request_timeout: Seconds that one try may take.

    Raises:
        ConfigError: For a time that is not above 0.
    """

    differentiable: ClassVar[bool] = False
    url: ClassVar[str] = ""
    reward_timeout: float = 600.0
    request_timeout: float = 120.0
    columns: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)

    @classmethod
    def at(cls, address: str) -> type["RemoteReward"]:
        """The class of the reward at an address.

        Args:
            address: A URL, or a URL after a name and a colon.

        Raises:
            ConfigError: If it holds no URL of a server.
        """
        given = address if re.match(SCHEME, address) else address.partition(":")[2]
        wanted = f"reward '{address}' needs the URL of its server, such as http://127.0.0.1:8000"
        url = checked_url(given, wanted, TOKEN)
        return type(cls.__name__, (cls,), {"url": url, "__doc__": cls.__doc__, "__module__": __name__})

    def __post_init__(self) -> None:
        for name in ("reward_timeout", "request_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name} must be above 0, not {getattr(self, name)}")
        self._limit: int | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Ask the server who it is, and how much it takes.

        Raises:
            ConfigError: If nothing answers, or not a reward server that speaks to us.
        """
        token = checked_token(os.environ.get(TOKEN, ""), TOKEN)
        self._server = Server(self.url, self.reward_timeout, self.request_timeout, token)
        answer = self._server.greet("/health")
        about = answer.object
        if about.get("service") != SERVICE:
            raise ConfigError(f"{self.url} answers {answer.status}, but is no reward server")
        if about.get("version") != VERSION:
            raise ConfigError(f"{self.url} uses version {about.get('version')} of the protocol, not {VERSION}")
        if not about.get("authorized"):
            raise ConfigError(f"{self.url} asks for a token, but {TOKEN} {'is wrong' if token else 'is not set'}")
        try:
            self._limit = int(about["max_request_bytes"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{self.url} does not give its limits on /health") from error
        columns = about.get("columns", [])  # which a server of an earlier version does not say
        if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
            raise ConfigError(f"{self.url} does not give its columns on /health as a list of names")
        self.columns = tuple(columns)

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1], prompts and further columns -> [B] float32, NaN where the server cannot score.

        Raises:
            RemoteError: If the server refuses, or does not answer within `reward_timeout` seconds.
            ValueError: If the columns cannot be sent.
        """
        return self.submit(images, prompts, **columns).result()

    def submit(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Future[Tensor]:
        """The same, without waiting for it.

        Raises:
            RuntimeError: If `prepare` was not called.
            ValueError: If the columns do not fit the images.
        """
        if self._limit is None:
            raise RuntimeError("RemoteReward has no server yet; call prepare(device, dtype) first")
        asked = Request(eight_bits(images).cpu(), prompts, dict(columns))
        return in_thread(lambda: torch.tensor(self._scores(asked), dtype=torch.float32, device=images.device))

    def _scores(self, asked: Request) -> list[float]:
        with self._server.session() as session:
            return [score for body, count in self._bodies(asked) for score in self._ask(session, body, count)]

    def _bodies(self, asked: Request) -> Iterator[tuple[bytes, int]]:
        """What is sent, each with its number of images: halved until it is within the server's limit."""
        body = asked.to_bytes()
        assert self._limit is not None
        if len(body) <= self._limit or len(asked) == 1:
            yield body, len(asked)
        else:
            half = len(asked) // 2
            yield from self._bodies(asked[:half])
            yield from self._bodies(asked[half:])

    def _ask(self, session: requests.Session, body: bytes, count: int) -> list[float]:
        answer = self._server.ask(session, "/score", body)
        if answer.status != 200:
            raise RemoteError(f"{self.url} answers {answer}")
        try:
            return read_scores(answer.content, count)
        except ValueError as error:
            raise RemoteError(f"{self.url}: {error}") from error
