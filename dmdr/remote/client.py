"""A reward that a server computes, perhaps with other libraries, on another GPU or machine: `--reward http://...`."""

import ipaddress
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import urlsplit

import requests
import torch
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential
from torch import Tensor

from dmdr.errors import ConfigError, TrainingError
from dmdr.remote.wire import SERVICE, TOKEN, VERSION, Request, eight_bits, read_scores

T = TypeVar("T")
logger = logging.getLogger("dmdr")

AGAIN = (429, 502, 503, 504)  # answers that another try may change
LARGEST = 2**26  # bytes of an answer: a million scores take a third of it
BACKOFF = wait_exponential(multiplier=0.2, max=10)
JITTER = random.Random()  # of our own: retries must not move the global generator that the run has seeded
_SCHEME = r"https?://"


class RemoteError(TrainingError):
    """A server that refuses, or has not answered for too long; one line that names it."""


class _Unanswered(Exception):
    """A try that may be repeated."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


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
        url = address if re.match(_SCHEME, address) else address.partition(":")[2]
        try:
            parts = urlsplit(url)
            good = re.match(_SCHEME, url) and parts.hostname and parts.port != 0
        except ValueError:  # brackets or a port that are none
            good = False
        if not good:
            raise ConfigError(f"reward '{address}' needs the URL of its server, such as http://127.0.0.1:8000")
        if "@" in parts.netloc or parts.query or parts.fragment:  # config.yaml would keep what is secret
            raise ConfigError(
                f"the URL of reward server {parts.hostname} may hold only host, port and path; put a token into {TOKEN}"
            )
        return type(cls.__name__, (cls,), {"url": url.rstrip("/"), "__doc__": cls.__doc__, "__module__": __name__})

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
        token = os.environ.get(TOKEN, "")
        if not (token.isascii() and token.isprintable()) or token != token.strip():
            raise ConfigError(f"the token in {TOKEN} holds characters that HTTP does not allow")
        self._token = token
        try:
            with self._session() as session:
                answer = self._exchange(session, "GET", "/health", min(10.0, self.request_timeout))
        except (requests.RequestException, TimeoutError) as error:
            raise ConfigError(f"nothing answers at {self.url}: {_reason(error)}") from error
        except RemoteError as error:
            raise ConfigError(str(error)) from error
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
        return _in_thread(lambda: torch.tensor(self._scores(asked), dtype=torch.float32, device=images.device))

    def _scores(self, asked: Request) -> list[float]:
        with self._session() as session:
            return [score for body, count in self._bodies(asked) for score in self._ask(session, body, count)]

    def _session(self) -> requests.Session:
        """A connection of this call alone: threads and forked processes share none, and it costs a millisecond."""
        session = requests.Session()
        session.trust_env = not _is_loopback(self.url)  # no proxy could reach our own loopback
        session.auth = self._sign
        return session

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

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
        """The server's scores, however often it takes to get them."""
        since: float | None = None  # the first failure

        def note(state: RetryCallState) -> None:
            nonlocal since
            if since is None:
                since = time.monotonic()
                patience = f"trying again for {self.reward_timeout:g} s"
                logger.warning("reward server %s: %s; %s", self.url, _failure(state), patience)

        def left() -> float:
            assert since is not None
            return max(since + self.reward_timeout - time.monotonic(), 0.0)

        def pause(state: RetryCallState) -> float:
            return min(max(BACKOFF(state) * JITTER.uniform(0.5, 1), _failure(state).retry_after), left())

        retrying = Retrying(
            retry=retry_if_exception_type(_Unanswered),
            after=note,
            wait=pause,
            stop=lambda state: not left(),
            reraise=True,
        )
        try:
            scores = retrying(
                lambda: self._try(
                    session, body, count, self.request_timeout if since is None else min(self.request_timeout, left())
                )
            )
        except _Unanswered as error:
            raise RemoteError(f"{self.url} has not answered for {self.reward_timeout:g} s: {error}") from error
        if since is not None:
            logger.warning("reward server %s: answers again after %.0f s", self.url, time.monotonic() - since)
        return scores

    def _try(self, session: requests.Session, body: bytes, count: int, seconds: float) -> list[float]:
        try:
            answer = self._exchange(session, "POST", "/score", min(max(seconds, 0.1), self.request_timeout), body)
        except (
            *(requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError),
            TimeoutError,
        ) as error:
            raise _Unanswered(_reason(error)) from error
        except requests.RequestException as error:  # such as a body that is not packed as its head says
            raise RemoteError(f"{self.url}: {_reason(error)}") from error
        line = f"{answer.status} {answer.object.get('error', answer.reason)}"
        if answer.status in AGAIN:
            after = answer.headers.get("Retry-After", "")
            raise _Unanswered(line, float(after) if after.isdecimal() else 0.0)
        if answer.status != 200:
            raise RemoteError(f"{self.url} answers {line}")
        try:
            return read_scores(answer.content, count)
        except ValueError as error:
            raise RemoteError(f"{self.url}: {error}") from error

    def _exchange(
        self, session: requests.Session, method: str, place: str, seconds: float, body: bytes | None = None
    ) -> "_Answer":
        """One request and its whole answer.

        The timeouts of requests are of silence alone: a server that sends a byte now and then would never be given up.

        Raises:
            requests.RequestException: If there is no answer.
            TimeoutError: If it is not complete in so many seconds; what still comes is read by nobody.
            RemoteError: If it is larger than any scores.
        """

        def act() -> _Answer:
            silence = min(10.0, self.request_timeout), seconds
            with session.request(
                method, f"{self.url}{place}", data=body, timeout=silence, allow_redirects=False, stream=True
            ) as answer:
                content = bytearray()
                for chunk in answer.iter_content(2**16):
                    content += chunk
                    if len(content) > LARGEST:
                        raise RemoteError(f"{self.url} answers with more than {LARGEST} bytes")
                return _Answer(answer.status_code, answer.reason, answer.headers, bytes(content))

        return _in_thread(act).result(seconds)


class _Answer(NamedTuple):
    """What a server has answered, all of it."""

    status: int
    reason: str
    headers: Mapping[str, str]
    content: bytes

    @property
    def object(self) -> dict[str, Any]:
        """The JSON object of its body, empty if it has none."""
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def _in_thread(act: Callable[[], T]) -> Future[T]:
    """What `act` returns, sooner or later.

    The thread is a daemon, unlike those of an executor: a second Ctrl-C must end a run that waits for its server.
    """
    answer: Future[T] = Future()

    def run() -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(act())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="dmdr-remote-reward", daemon=True).start()
    return answer


def _failure(state: RetryCallState) -> _Unanswered:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, _Unanswered)
    return error


def _reason(error: BaseException) -> str:
    """The innermost error: requests and urllib3 wrap it in five lines of their own."""
    if isinstance(error, requests.Timeout | TimeoutError):
        return "no answer in time"
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
