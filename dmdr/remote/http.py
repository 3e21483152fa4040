"""A server that is asked over HTTP until it answers: limits of the whole time, retries, no secret in any message."""

import ipaddress
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import requests
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential

from dmdr.errors import ConfigError, TrainingError

T = TypeVar("T")
logger = logging.getLogger("dmdr")

AGAIN = (429, 502, 503, 504)  # answers that another try may change
LARGEST = 2**26  # bytes of an answer: a million scores take a third of it
BACKOFF = wait_exponential(multiplier=0.2, max=10)
JITTER = random.Random()  # of our own: retries must not move the global generator that the run has seeded
SCHEME = r"https?://"


class RemoteError(TrainingError):
    """A server that refuses, or has not answered for too long; one line that names it."""


class _Unanswered(Exception):
    """A try that may be repeated."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Answer(NamedTuple):
    """What a server has answered, all of it.

    Attributes:
        status, reason, headers, content: Of the HTTP response.
    """

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

    def __str__(self) -> str:
        """The status, and what the server says of it: `{"error": ...}`, a text or an object with a message."""
        said = self.object.get("error") or self.object.get("message") or self.reason
        said = said.get("message", self.reason) if isinstance(said, dict) else said
        return f"{self.status} {' '.join(str(said).split()):.500}"


def checked_url(url: str, wanted: str, secret: str) -> str:
    """A URL of a server without the slash at its end.

    Args:
        url: As the user wrote it.
        wanted: What to say if it is none.
        secret: The environment variable for a token.

    Raises:
        ConfigError: If it is no URL, or holds more than host, port and path: config.yaml would keep what is secret.
    """
    try:
        parts = urlsplit(url)
        good = re.match(SCHEME, url) and parts.hostname and parts.port != 0
    except ValueError:  # brackets or a port that are none
        good = False
    if not good:
        raise ConfigError(wanted)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"the URL of reward server {parts.hostname} may hold only host, port and path; put a token into {secret}"
        )
    return url.rstrip("/")


def checked_token(token: str, name: str) -> str:
    """A token that an HTTP header can hold.

    Args:
        token: May be empty.
        name: The environment variable that has it.

    Raises:
        ConfigError: If it holds other characters; names the variable only.
    """
    if not (token.isascii() and token.isprintable()) or token != token.strip():
        raise ConfigError(f"the token in {name} holds characters that HTTP does not allow")
    return token


@dataclass(frozen=True)
class Server:
    """Where it is, and how long it is waited for.

    Attributes:
        url: Without a slash at its end.
        reward_timeout: Seconds to go on trying a server that does not answer.
        request_timeout: Seconds that one try may take.
        token: Bearer token; empty for none.
        again: HTTP statuses after which it is tried again.
    """

    url: str
    reward_timeout: float
    request_timeout: float
    token: str = field(default="", repr=False)
    again: Sequence[int] = AGAIN

    def session(self) -> requests.Session:
        """A connection of one call alone: threads and forked processes share none, and it costs a millisecond."""
        session = requests.Session()
        session.trust_env = not _is_loopback(self.url)  # no proxy could reach our own loopback
        session.auth = self._sign
        return session

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def ask(self, session: requests.Session, place: str, body: bytes, kind: str | None = None) -> Answer:
        """The answer to a POST, however often it takes to get one that another try would not change.

        Args:
            session: Of `session`.
            place: Path after the URL.
            body: What is sent.
            kind: Its content type.

        Raises:
            RemoteError: If there is none in `reward_timeout` seconds, or one that cannot be read.
        """
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
            answer = retrying(
                lambda: self._try(
                    *(session, place, body, kind),
                    self.request_timeout if since is None else min(self.request_timeout, left()),
                )
            )
        except _Unanswered as error:
            raise RemoteError(f"{self.url} has not answered for {self.reward_timeout:g} s: {error}") from error
        if since is not None:
            logger.warning("reward server %s: answers again after %.0f s", self.url, time.monotonic() - since)
        return answer

    def _try(self, session: requests.Session, place: str, body: bytes, kind: str | None, seconds: float) -> Answer:
        try:
            answer = self.exchange(
                session, "POST", place, min(max(seconds, 0.1), self.request_timeout), body=body, kind=kind
            )
        except (
            *(requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError),
            TimeoutError,
        ) as error:
            raise _Unanswered(reason_of(error)) from error
        except requests.RequestException as error:  # such as a body that is not packed as its head says
            raise RemoteError(f"{self.url}: {reason_of(error)}") from error
        if answer.status in self.again:
            after = answer.headers.get("Retry-After", "")
            raise _Unanswered(str(answer), float(after) if after.isdecimal() else 0.0)
        return answer

    def exchange(
        self,
        session: requests.Session,
        method: str,
        place: str,
        seconds: float,
        *,
        body: bytes | None = None,
        kind: str | None = None,
    ) -> Answer:
        """One request and its whole answer.

        The timeouts of requests are of silence alone: a server that sends a byte now and then would never be given up.

        Args:
            session: Of `session`.
            method, place: HTTP method and path after the URL.
            seconds: That it may take.
            body, kind: What is sent, and its content type.

        Raises:
            requests.RequestException: If there is no answer.
            TimeoutError: If it is not complete in so many seconds; what still comes is read by nobody.
            RemoteError: If it is larger than any scores.
        """

        def act() -> Answer:
            silence = min(10.0, self.request_timeout), seconds
            with session.request(
                method,
                f"{self.url}{place}",
                data=body,
                headers={"Content-Type": kind} if kind else None,
                timeout=silence,
                allow_redirects=False,
                stream=True,
            ) as answer:
                content = bytearray()
                for chunk in answer.iter_content(2**16):
                    content += chunk
                    if len(content) > LARGEST:
                        raise RemoteError(f"{self.url} answers with more than {LARGEST} bytes")
                return Answer(answer.status_code, answer.reason, answer.headers, bytes(content))

        return in_thread(act).result(seconds)

    def greet(self, place: str) -> Answer:
        """The answer to a GET, tried once and not for long: before a run begins.

        Args:
            place: Path after the URL.

        Raises:
            ConfigError: If nothing answers.
        """
        try:
            with self.session() as session:
                return self.exchange(session, "GET", place, min(10.0, self.request_timeout))
        except (requests.RequestException, TimeoutError) as error:
            raise ConfigError(f"nothing answers at {self.url}: {reason_of(error)}") from error
        except RemoteError as error:
            raise ConfigError(str(error)) from error


def in_thread(act: Callable[[], T]) -> Future[T]:
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


def reason_of(error: BaseException) -> str:
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
