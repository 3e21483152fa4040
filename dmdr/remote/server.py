"""The server of a remote reward: one function of images behind an address.

    from dmdr.remote.server import serve

    def score(images, prompts, **columns):
        return [float(image.mean()) for image in images]

    serve(score, port=8000)

Of dmdr it imports only the errors and the wire format, so that it runs among libraries that the trainer could not live
with: `pip install --no-deps dmdr`, and starlette, uvicorn, safetensors and torch.
"""

import asyncio
import hmac
import inspect
import logging
import math
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import h11
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from dmdr.errors import ConfigError
from dmdr.remote.wire import SERVICE, TOKEN, VERSION, Request, merge, numbers_of

logger = logging.getLogger("dmdr")

Score = Callable[..., Any]
Scores = list[float | None]
HEADER_SECONDS = 10.0  # in which the head of a request must have come, or its connection is closed


@dataclass(eq=False)
class _Job:
    asked: Request
    answer: Future[Scores] = field(default_factory=Future)

    def fits(self, first: "_Job") -> bool:
        """Whether both can be scored in one batch."""
        ours, theirs = self.asked, first.asked
        return ours.images.shape[1:] == theirs.images.shape[1:] and ours.columns.keys() == theirs.columns.keys()


class Scorer:
    """One thread that does all the scoring, in batches merged from the requests that wait."""

    def __init__(self, score: Score, max_batch_size: int) -> None:
        self.score, self.max_batch_size = score, max_batch_size
        self.batches = 0
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, because a reward that hangs must not keep the process.
        threading.Thread(target=self._work, name="dmdr-scorer", daemon=True).start()

    def submit(self, asked: Request) -> Future[Scores]:
        """Score a request when its turn comes; its answer may be cancelled until then, and is then never scored."""
        job = _Job(asked)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        job.answer.add_done_callback(lambda answer: self._forget(job) if answer.cancelled() else None)
        return job.answer

    def close(self) -> None:
        """End the thread after the batch that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _forget(self, job: _Job) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _work(self) -> None:
        while not self._closed:
            if jobs := self._next():
                self._answer(jobs)

    def _next(self) -> list[_Job]:
        """The request that has waited longest, and what fits with it into one batch."""
        jobs: list[_Job] = []
        count = 0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            for job in list(self._waiting):
                if not jobs or (job.fits(jobs[0]) and count + len(job.asked) <= self.max_batch_size):
                    self._waiting.remove(job)  # a cancelled one, too: it must not be asked twice
                    if job.answer.set_running_or_notify_cancel():
                        jobs.append(job)
                        count += len(job.asked)
        return jobs

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            scores = iter(self._scores(merge([job.asked for job in jobs])))
        except BaseException as error:  # panics of Rust libraries are no Exceptions
            if len(jobs) > 1:  # only the guilty one shall fail
                for job in jobs:
                    self._answer([job])
            else:
                jobs[0].answer.set_exception(_refusal(error))
        else:
            for job in jobs:
                job.answer.set_result(list(islice(scores, len(job.asked))))

    def _scores(self, asked: Request) -> Scores:
        found: Scores = []
        for start in range(0, len(asked), self.max_batch_size):
            part = asked[start : start + self.max_batch_size]
            self.batches += 1
            with torch.no_grad():
                scores = self.score(part.images.float() / 255, list(part.prompts), **part.columns)
            try:
                numbers = numbers_of(scores, len(part))
            except TypeError as error:
                raise TypeError(f"the reward {error}") from error
            found += [number if math.isfinite(number) else None for number in numbers]  # as JSON has them
        return found


def _refusal(error: BaseException) -> HTTPException:
    """What the client is told of a reward that raised; a ValueError is about its images, the rest is ours."""
    line = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return HTTPException(422, line)
    logger.error("the reward failed", exc_info=error)
    return HTTPException(500, f"{type(error).__name__}: {line}")


@dataclass(eq=False)
class _Service:
    """The two addresses; its fields are the arguments of `application`."""

    score: Score
    name: str
    max_batch_size: int
    max_queue: int
    max_request_mb: float
    request_timeout: float
    token: str | None
    columns: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue", "max_request_mb", "request_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        self.max_request_bytes = int(self.max_request_mb * 2**20)
        self.requests = self.images = self.inside = 0

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.scorer = Scorer(self.score, self.max_batch_size)
        try:
            yield
        finally:
            self.scorer.close()

    async def health(self, request: HTTPRequest) -> Response:
        known = self._knows(request)
        about: dict[str, Any] = {"service": SERVICE, "version": VERSION, "authorized": known}
        if known:
            limits = ("name", "max_batch_size", "max_queue", "max_request_bytes", "request_timeout")
            about |= {name: getattr(self, name) for name in limits}
            about |= {
                "columns": list(self.columns),
                "requests": self.requests,
                "images": self.images,
                "queue": self.inside,
            }
            about |= {"batches": self.scorer.batches}
        return JSONResponse(about)

    async def answer(self, request: HTTPRequest) -> Response:
        if not self._knows(request):
            raise HTTPException(401, "this server asks for a bearer token; yours is wrong or missing")
        if self.inside >= self.max_queue:  # asked before the body is read: what waits is bounded in bytes, too
            raise HTTPException(503, f"{self.max_queue} requests wait already", {"Retry-After": "1"})
        self.inside += 1
        try:
            async with asyncio.timeout(self.request_timeout):
                asked = Request.read(await self._body(request))
                if lacking := [name for name in self.columns if name not in asked.columns]:
                    raise ValueError(f"the reward needs the prompts to have a column '{lacking[0]}'")
                scores = await _unless_gone(request, self.scorer.submit(asked))
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except TimeoutError:
            raise HTTPException(504, f"not scored within {self.request_timeout:g} s") from None
        except asyncio.CancelledError:  # by uvicorn, which would say 500, and that is for good
            raise HTTPException(503, "the server is shutting down") from None
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            self.inside -= 1
        self.requests += 1
        self.images += len(scores)
        return JSONResponse({"scores": scores})

    def _knows(self, request: HTTPRequest) -> bool:
        given = request.headers.get("authorization", "").encode("latin-1")
        return not self.token or hmac.compare_digest(given, f"Bearer {self.token}".encode())

    async def _body(self, request: HTTPRequest) -> bytes:
        """The body, of which nothing is kept once it is larger than the limit."""
        size, chunks = int(request.headers.get("content-length") or 0), []
        if size <= self.max_request_bytes:
            size = 0
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > self.max_request_bytes:
                    break
        if size > self.max_request_bytes:
            raise HTTPException(413, f"a request may have at most {self.max_request_mb:g} MB")
        return b"".join(chunks)


async def _unless_gone(request: HTTPRequest, job: Future[Scores]) -> Scores:
    """The answer, which is no longer wanted where its client leaves or its time is up."""
    answer = asyncio.wrap_future(job)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        gone.cancel()
        job.cancel()  # at once; through `answer` it would be a turn of the loop later
        answer.cancel()


async def _disconnected(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _as_line(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def application(
    score: Score,
    *,
    name: str = "reward",
    max_batch_size: int = 32,
    max_queue: int = 64,
    max_request_mb: float = 64.0,
    request_timeout: float = 120.0,
    token: str | None = None,
    columns: Sequence[str] | None = None,
) -> Starlette:
    """The reward server as an ASGI application.

    `POST /score` takes what `dmdr.remote.wire` writes. It answers 200 with the scores, or {"error": ...} of one line:
    400 for no such body, 401 for the token, 413 for the size, 422 where the reward raised a ValueError, 500 where it
    raised anything else; and, worth another try, 503 for a full queue or a server that leaves, 504 for time that is
    up. `GET /health` says which service and version this is, to anyone; name, limits, columns and counters only to
    those with the token.

    Args:
        score: As `serve` describes it; called in one thread only. A score must not depend on the rest of the batch, in
            which the images of several requests may meet.
        name: What it is called in /health.
        max_batch_size: Images of one call of `score`; larger requests are split.
        max_queue: Requests that may be read, wait or be scored at a time.
        max_request_mb: Size of a body, in MiB.
        request_timeout: Seconds until a request that is not scored is given up.
        token: Bearer token that a request must have; None for none.
        columns: Columns that the prompts must have; by default the parameters of `score` without a default.

    Raises:
        ConfigError: For a limit that is not above 0.
    """
    needed = _required(score) if columns is None else tuple(columns)
    service = _Service(score, name, max_batch_size, max_queue, max_request_mb, request_timeout, token, needed)
    routes = [Route("/health", service.health), Route("/score", service.answer, methods=["POST"])]
    return Starlette(routes=routes, lifespan=service.lifespan, exception_handlers={HTTPException: _as_line})


def _required(score: Score) -> tuple[str, ...]:
    """The columns that a function asks for by name and cannot do without."""
    try:
        parameters = inspect.signature(score).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return ()
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    columns = [*by_place[2:], *(p for p in parameters if p.kind is p.KEYWORD_ONLY)]
    return tuple(p.name for p in columns if p.default is p.empty)


class _Protocol(H11Protocol):
    """Closes a connection on which no whole head of a request comes in time: uvicorn would hold it for ever."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._calm()

    def _watch(self) -> None:
        """Wait for a head, from the connection's start or its first byte on; and for no body of what is answered."""
        answered = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is not h11.IDLE and not answered:
            self._calm()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _calm(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class _Server(uvicorn.Server):
    """Says where it is as soon as it is there."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in (sockets or ()) if self.started else ():
            print(f"reward server at {_url(bound)}", flush=True)


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(score: Score, host: str = "127.0.0.1", port: int = 8000, **settings: Any) -> None:
    """Serve a reward until Ctrl-C or SIGTERM, after which what has been asked is still answered.

    One line on stdout says the address, once there is an answer to be had.

    Args:
        score: `score(images, prompts, **columns)`: images [B, 3, H, W] float32 in [0, 1] on the CPU, B prompts and the
            further columns; B numbers, or None where it cannot score.
        host: Interface; anything but the loopback is open to others.
        port: TCP port; 0 for a free one.
        settings: What `application` takes: the name, the limits, the token, which is otherwise that of the environment
            variable DMDR_REWARD_TOKEN.

    Raises:
        ConfigError: If the port cannot be had, or a limit is not above 0.
    """
    settings.setdefault("token", os.environ.get(TOKEN) or None)
    app = application(score, **settings)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from error
    address = bound.getsockname()[0]
    if not settings.get("token") and address != "::1" and not address.startswith("127."):
        logger.warning("anyone can use the server at %s: it asks for no token; set %s", _url(bound), TOKEN)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(settings.get("request_timeout", 120.0)) + 1,  # by then, each is answered
    )
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        _Server(config).run(sockets=[bound])
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again once it has answered
    finally:
        bound.close()
        if main:
            signal.signal(signal.SIGTERM, before)
