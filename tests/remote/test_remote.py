"""A reward behind an address: the wire format, the server, the client, and the names that are addresses."""

import asyncio
import os
import pickle
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from safetensors.torch import save
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from dmdr.errors import ConfigError, TrainingError
from dmdr.images import to_pil
from dmdr.protocols import Reward
from dmdr.remote import http as http_module
from dmdr.remote import server as server_module
from dmdr.remote.client import RemoteReward
from dmdr.remote.http import RemoteError
from dmdr.remote.server import Scorer, application, serve
from dmdr.remote.wire import SERVICE, TOKEN, VERSION, Request, eight_bits, merge, read_scores
from dmdr.rewards import RewardError, Rewards
from dmdr.settings import registry
from dmdr.settings.parse import parse
from dmdr.testing import check_reward
from serving import serving

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "zwei \u201calte\u201c Boote\n& ein Hund", ""]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


def pixels(count: int = 3, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def asked(count: int = 1, height: int = 8, value: int = 0, **columns: Any) -> Request:
    images = torch.full((count, 3, height, 8), value, dtype=torch.uint8)
    return Request(images, [str(value)] * count, {name: [cell] * count for name, cell in columns.items()})


def redness(images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
    return images[:, 0].mean((1, 2))


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python process that serves, and its address."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server, server.stdout.readline().split()[-1]
        finally:
            server.kill()


def client(url: str, **options: Any) -> RemoteReward:
    reward: RemoteReward = registry.load("rewards", url)(**options)
    reward.prepare(CPU, torch.float32)
    return reward


def post(url: str, body: Any, **headers: str) -> requests.Response:
    return requests.post(f"{url}/score", data=body, headers=headers, timeout=20)


def health(url: str, **headers: str) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{url}/health", headers=headers, timeout=20).json()
    return found


def wait_until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Gate:
    """A reward whose calls wait until they are let through; says how many images each had."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.open = threading.Event()

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        self.calls.append(len(images))
        assert self.open.wait(10)
        return [float(prompt) for prompt in prompts]


# --- The wire format --------------------------------------------------------------------------------------------------


def test_a_request_comes_out_as_it_went_in() -> None:
    columns = {"label": [1, 2, 3], "more": [None, {"a": [0.1]}, "\u00fc"]}
    sent = Request(eight_bits(pixels(3, 5, 7)), PROMPTS, columns)
    read = Request.read(sent.to_bytes())
    assert torch.equal(read.images, sent.images) and read.images.dtype == torch.uint8
    assert (read.prompts, read.columns) == (PROMPTS, columns)
    halves = merge([read[:1], read[1:]])
    assert torch.equal(halves.images, sent.images) and (halves.prompts, halves.columns) == (PROMPTS, columns)


def test_images_are_what_a_user_would_save() -> None:
    images = torch.cat([torch.linspace(-0.2, 1.2, 3 * 64 * 4), (torch.arange(256) + 0.5) / 255]).view(1, -1, 8, 8)
    images = images[:, : images.shape[1] // 3 * 3].reshape(-1, 3, 8, 8)
    images[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    saved = torch.stack([torch.from_numpy(np.array(image)) for image in to_pil(images)]).permute(0, 3, 1, 2)
    assert torch.equal(eight_bits(images), saved)
    assert torch.equal(eight_bits(images.half().requires_grad_()), eight_bits(images.half().float()))


GOOD = {"version": str(VERSION), "prompts": '["a"]', "columns": "{}"}
IMAGE = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"images": IMAGE}, None, "version None of the protocol, not 1"),
        ({"images": IMAGE}, GOOD | {"version": "2"}, "version 2 of the protocol, not 1"),
        ({}, GOOD, "the tensor images alone, not none"),
        ({"images": IMAGE, "more": IMAGE + 1}, GOOD, "the tensor images alone"),
        ({"images": IMAGE.float()}, GOOD, r"torch.uint8 \[B, 3, H, W\], not torch.float32 \[1, 3, 4, 4\]"),
        ({"images": IMAGE[0]}, GOOD, r"not torch.uint8 \[3, 4, 4\]"),
        ({"images": IMAGE[:, :1].contiguous()}, GOOD, r"not torch.uint8 \[1, 1, 4, 4\]"),
        ({"images": IMAGE[:0]}, GOOD | {"prompts": "[]"}, r"not torch.uint8 \[0, 3, 4, 4\]"),
        ({"images": IMAGE[..., :0].contiguous()}, GOOD, r"not torch.uint8 \[1, 3, 4, 0\]"),
        ({"images": IMAGE}, GOOD | {"prompts": '["a", "b"]'}, "1 images, but 2 prompts"),
        ({"images": IMAGE}, GOOD | {"prompts": "[1]"}, "prompts must all be text"),
        ({"images": IMAGE}, GOOD | {"prompts": '"a"'}, "'prompts' must be a list in JSON"),
        ({"images": IMAGE}, GOOD | {"prompts": "[" * 10**5}, "'prompts' must be a list in JSON"),
        ({"images": IMAGE}, {"version": "1", "columns": "{}"}, "'prompts' must be a list in JSON"),
        ({"images": IMAGE}, GOOD | {"columns": "[]"}, "'columns' must be an object of lists in JSON"),
        ({"images": IMAGE}, GOOD | {"columns": '{"label": 1}'}, "'columns' must be an object of lists in JSON"),
        ({"images": IMAGE}, GOOD | {"columns": '{"label": [1, 2]}'}, "1 images, but 2 label"),
        ({"images": IMAGE}, GOOD | {"columns": '{"prompts": [1]}'}, "no column may be called 'prompts'"),
    ],
)
def test_a_body_that_is_no_request(tensors: dict[str, Tensor], metadata: dict[str, str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Request.read(save(tensors, metadata))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", random.Random(0).randbytes(64), pickle.dumps({"images": 1}), (2**62).to_bytes(8, "little") + b"{}"],
)
def test_a_body_that_is_no_safetensors_file(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"the body is no safetensors file \(\w+\)"):
        Request.read(body)
    with pytest.raises(ValueError, match="no safetensors"):
        Request.read(asked().to_bytes()[:-1])


def test_a_column_that_json_cannot_hold() -> None:
    with pytest.raises(ValueError, match="the columns label cannot be sent as JSON: Object of type Tensor"):
        Request(IMAGE, ["a"], {"label": torch.tensor([1])}).to_bytes()


def test_scores_are_read_strictly() -> None:
    scores = read_scores(b'{"scores": [0.1, null, 3]}', 3)
    assert scores[0] == 0.1 and scores[1] != scores[1] and scores[2] == 3.0
    bad = [
        "",
        "[1, 2]",
        '{"scores": [1]}',
        '{"scores": 2}',
        '{"scores": [1, "2"]}',
        '{"scores": [1, true]}',
        "[" * 10**5,
    ]
    for body in bad:
        with pytest.raises(ValueError, match="the answer does not hold 2 scores"):
            read_scores(body.encode(), 2)


# --- Merging ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def busy(gate: Gate) -> Iterator[Scorer]:
    """A scorer that is at its first request, up to four images a batch."""
    scorer = Scorer(gate, max_batch_size=4)
    scorer.submit(asked())
    wait_until(lambda: gate.calls)
    yield scorer
    scorer.close()


def results(answers: list[Future[Any]]) -> list[Any]:
    return [answer.exception(10) or answer.result() for answer in answers]


def test_requests_that_fit_are_scored_together(busy: Scorer, gate: Gate) -> None:
    waiting = [
        asked(1, value=1),
        asked(2, value=2, height=16),  # of another size: a batch of its own, with the last
        asked(2, value=3),
        asked(1, value=4, label=7),  # with another column: a batch of its own
        asked(2, value=5),  # one too many for the first
        asked(1, value=6),
        asked(1, value=7, height=16),
    ]
    answers = [busy.submit(request) for request in waiting]
    gate.open.set()
    assert results(answers) == [[1.0], [2.0] * 2, [3.0] * 2, [4.0], [5.0] * 2, [6.0], [7.0]]
    assert gate.calls == [1, 4, 3, 1, 2]
    assert busy.batches == 5


def test_a_large_request_is_split(busy: Scorer, gate: Gate) -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 2, 2)
    answer = busy.submit(Request(images, [str(i) for i in range(10)], {}))
    gate.open.set()
    assert answer.result(10) == list(range(10))
    assert gate.calls == [1, 4, 4, 2]


def test_only_the_guilty_one_of_a_batch_fails(gate: Gate) -> None:
    def score(images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        if "2" in prompts and gate.open.is_set():
            raise RuntimeError("no\ntwo")
        return gate(images, prompts)

    scorer = Scorer(score, max_batch_size=8)
    answers = [scorer.submit(asked())]
    wait_until(lambda: gate.calls)
    answers += [scorer.submit(asked(value=value)) for value in (1, 2, 3)]
    gate.open.set()
    first, one, two, three = results(answers)
    assert (first, one, three) == ([0.0], [1.0], [3.0])
    assert isinstance(two, HTTPException) and (two.status_code, two.detail) == (500, "RuntimeError: no two")
    scorer.close()


def test_what_nobody_waits_for_is_not_scored(busy: Scorer, gate: Gate) -> None:
    left, kept = busy.submit(asked(2, value=1)), busy.submit(asked(value=2))
    assert left.cancel()
    assert [len(job.asked) for job in busy._waiting] == [1]  # its memory is free at once
    gate.open.set()
    assert kept.result(10) == [2.0]
    assert gate.calls == [1, 1]


LIST = "it must return a list with a number or None for each image"


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (torch.tensor([0.5, float("nan")]), [0.5, None]),
        (torch.tensor([0.5, 1.0], dtype=torch.bfloat16), [0.5, 1.0]),
        (np.array([0.5, np.inf]), [0.5, None]),
        ((None, 1), [None, 1.0]),
        ([1.0], "TypeError: the reward returned 1 scores for 2 images"),
        (None, f"TypeError: the reward returned NoneType; {LIST}"),
        ({"a": 1, "b": 2}, f"TypeError: the reward returned dict; {LIST}"),
        ({0.5, 1.0}, f"TypeError: the reward returned set; {LIST}"),
        ("12", f"TypeError: the reward returned str; {LIST}"),
        (["0.5", 1], "TypeError: the reward returned no number for image 0, but '0.5'"),
        ([1j, 1], "TypeError: the reward returned no number for image 0, but 1j"),
        (torch.zeros(2, 1), "TypeError: the reward returned no number for image 0, but [0.0]"),
    ],
)
def test_what_a_reward_may_return(scores: Any, found: Any) -> None:
    scorer = Scorer(lambda images, prompts: scores, max_batch_size=4)
    answer = results([scorer.submit(asked(2))])[0]
    assert (answer.detail if isinstance(answer, HTTPException) else answer) == found
    scorer.close()


def test_a_panic_is_an_answer_too() -> None:
    def score(images: Tensor, prompts: list[str]) -> list[float]:
        assert not torch.is_grad_enabled()
        assert images.dtype == torch.float32
        raise SystemExit("out")

    scorer = Scorer(score, max_batch_size=4)
    for _ in range(2):  # the thread has survived
        assert str(results([scorer.submit(asked())])[0]) == "500: SystemExit: out"
    scorer.close()


# --- The server -------------------------------------------------------------------------------------------------------


def test_health_says_who_it_is_and_what_it_did() -> None:
    with serving(application(redness, name="red", max_request_mb=1.5, max_queue=9)) as url:
        assert post(url, asked(3, value=51).to_bytes()).json() == {"scores": [pytest.approx(0.2)] * 3}
        assert health(url) == {
            "service": SERVICE,
            "version": VERSION,
            "authorized": True,
            "name": "red",
            "max_batch_size": 32,
            "max_queue": 9,
            "max_request_bytes": 3 * 2**19,
            "request_timeout": 120.0,
            "columns": [],
            "requests": 1,
            "images": 3,
            "queue": 0,
            "batches": 1,
        }
        assert requests.get(f"{url}/other", timeout=20).json() == {"error": "Not Found"}
        assert requests.get(f"{url}/score", timeout=20).status_code == 405


def labelled(images: Tensor, prompts: list[str], label: list[int], weight: Any = None, *, size: Any) -> list[int]:
    return label


def test_the_columns_that_it_needs_are_asked_for_at_the_start() -> None:
    with serving(application(labelled)) as url:
        assert health(url)["columns"] == ["label", "size"]
        reward = registry.load("rewards", url)()
        rewards = Rewards({"far": (1.0, reward)}, there=("label", "other"))
        with pytest.raises(
            ConfigError, match=r"^reward 'far' needs the prompts to have a column 'size'; they have label,"
        ):
            rewards.prepare(CPU, torch.float32)
        Rewards({"far": (1.0, reward)}, there=("label", "size")).prepare(CPU, torch.float32)
        Rewards({"far": (1.0, reward)}).prepare(CPU, torch.float32)  # nobody knows the prompts yet
        answer = post(url, asked().to_bytes())
        assert (answer.status_code, answer.json()) == (
            400,
            {"error": "the reward needs the prompts to have a column 'label'"},
        )
    with serving(application(labelled, columns=("x",))) as url:
        assert health(url)["columns"] == ["x"]
    assert server_module._required(min) == ()


def test_no_column_takes_the_place_of_an_argument() -> None:
    with pytest.raises(ValueError, match=r"^no column may be called 'self'$"):
        Request(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ["a"], {"self": [1]})


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /sco",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-",
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\na",
    ],
)
def test_half_a_request_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.2)
    with serving(application(redness)) as url, ExitStack() as stack:
        port = int(url.rpartition(":")[2])
        many = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(20)]
        for each in many:
            each.sendall(sent)
        for each in many:
            while each.recv(4096):  # the answer, if there is one, and then the end
                pass
        assert post(url, asked().to_bytes()).status_code == 200


def test_a_request_that_is_scored_for_long_is_no_half_one(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.1)
    threading.Timer(0.4, gate.open.set).start()
    with serving(application(gate)) as url, requests.Session() as session:
        for _ in range(2):  # on one connection
            body = asked(1).to_bytes()
            assert session.post(f"{url}/score", data=body, timeout=20).status_code == 200


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "trapped"),)

    with serving(application(redness)) as url:
        answer = post(url, pickle.dumps(Trap()))
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("the body is no safetensors file")
    assert not list(tmp_path.iterdir())


def test_the_token_is_asked_for() -> None:
    with serving(application(redness, token="s3cret")) as url:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret"}):
            answer = post(url, asked().to_bytes(), **headers)
            assert (answer.status_code, list(answer.json())) == (401, ["error"])
            assert health(url, **headers) == {"service": SERVICE, "version": VERSION, "authorized": False}
        known = {"Authorization": "Bearer s3cret"}
        assert post(url, asked().to_bytes(), **known).status_code == 200
        assert health(url, **known)["requests"] == 1


def test_a_body_may_not_be_larger_than_the_limit() -> None:
    with serving(application(redness, max_request_mb=0.01)) as url:
        assert post(url, asked(10).to_bytes()).status_code == 200
        large = asked(100).to_bytes()
        for body in (large, (large[start : start + 1000] for start in range(0, len(large), 1000))):  # also in chunks
            answer = post(url, body)
            assert (answer.status_code, answer.json()) == (413, {"error": "a request may have at most 0.01 MB"})
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n")  # and no more
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        assert health(url)["queue"] == 0


def test_a_reward_that_raises_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = [ValueError("no\nsuch label"), KeyError("x")]

    def score(images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        if errors:
            raise errors.pop(0)
        return [1.0]

    with serving(application(score)) as url:
        answers = [post(url, asked().to_bytes()) for _ in range(3)]
        assert health(url)["requests"] == 1
    assert [answer.status_code for answer in answers] == [422, 500, 200]
    assert [answer.json() for answer in answers] == [
        {"error": "no such label"},
        {"error": "KeyError: 'x'"},
        {"scores": [1.0]},
    ]
    assert [record.getMessage() for record in caplog.records if record.name == "dmdr"] == ["the reward failed"]


def test_a_full_queue_says_when_to_come_again(gate: Gate) -> None:
    with serving(application(gate, max_queue=2)) as url, ThreadPoolExecutor() as pool:
        answers = [pool.submit(post, url, asked(value=value).to_bytes()) for value in (1, 2)]
        wait_until(lambda: health(url)["queue"] == 2)
        third = post(url, asked().to_bytes())
        assert (third.status_code, third.headers["Retry-After"]) == (503, "1")
        assert third.json() == {"error": "2 requests wait already"}
        gate.open.set()
        assert sorted(answer.result().json()["scores"][0] for answer in answers) == [1.0, 2.0]
        assert post(url, asked(value=3).to_bytes()).json() == {"scores": [3.0]}
        assert health(url)["requests"] == 3


def test_a_request_whose_time_is_up_is_not_scored(gate: Gate) -> None:
    with serving(application(gate, request_timeout=1)) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(post, url, asked().to_bytes())
        wait_until(lambda: gate.calls)
        answer = post(url, asked(5).to_bytes())
        assert (answer.status_code, answer.json()) == (504, {"error": "not scored within 1 s"})
        assert first.result().status_code == 504
        gate.open.set()
        assert post(url, asked(2).to_bytes()).status_code == 200
        assert gate.calls == [1, 2]
        assert health(url)["queue"] == 0


def test_cancelled_requests_never_end_the_scoring() -> None:
    scorer = Scorer(lambda images, prompts: [0.0] * len(prompts), max_batch_size=4)
    for _ in range(5000):
        scorer.submit(Request(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [""], {})).cancel()
    last = scorer.submit(Request(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [""], {}))
    assert last.result(timeout=10) == [0.0]
    scorer.close()


def test_a_request_whose_client_has_left_is_not_scored(gate: Gate) -> None:
    with serving(application(gate)) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(post, url, asked().to_bytes())
        wait_until(lambda: gate.calls)
        with pytest.raises(requests.Timeout):
            requests.post(f"{url}/score", data=asked(5).to_bytes(), timeout=0.2)
        wait_until(lambda: health(url)["queue"] == 1)
        gate.open.set()
        assert first.result().status_code == 200
        assert post(url, asked(2).to_bytes()).status_code == 200
        assert gate.calls == [1, 2]


def test_a_server_that_cannot_finish_says_that_it_leaves(gate: Gate) -> None:
    with ThreadPoolExecutor() as pool:
        with serving(application(gate), patience=1) as url:
            answers = [pool.submit(post, url, asked(value=value).to_bytes()) for value in (1, 2)]
            wait_until(lambda: gate.calls and health(url)["queue"] == 2)
        for answer in answers:
            assert (answer.result().status_code, answer.result().json()) == (
                503,
                {"error": "the server is shutting down"},
            )


def test_limits_are_above_zero() -> None:
    for name in ("max_batch_size", "max_queue", "max_request_mb", "request_timeout"):
        with pytest.raises(ConfigError, match=f"{name} must be above 0, not 0"):
            application(redness, **{name: 0})


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            serve(redness, port=port)
    with pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1 port 70000: "):
        serve(redness, port=70000)


SCRIPT = """
import sys, time

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "diffusers", "accelerate", "trl", "peft", "requests", "tenacity"):
            raise ImportError(name)

sys.meta_path.insert(0, Refusing())
from dmdr.remote.server import serve

found = {name for name in sys.modules if name.split(".")[0] == "dmdr"}
assert found == {"dmdr", "dmdr.errors", "dmdr.remote", "dmdr.remote.wire", "dmdr.remote.server"}, found

def score(images, prompts, **columns):
    print("scoring", flush=True)
    time.sleep(0.5)
    return images.mean((1, 2, 3))

serve(score, "0.0.0.0", port=0)
print("left")
"""


def test_a_script_among_strangers_finishes_what_it_was_asked_before_it_leaves() -> None:
    with process("-c", SCRIPT) as (server, url), ThreadPoolExecutor() as pool:
        assert server.stdout is not None and server.stderr is not None
        url = url.replace("0.0.0.0", "127.0.0.1")
        answer = pool.submit(post, url, asked(value=255).to_bytes())
        assert server.stdout.readline() == "scoring\n"
        server.send_signal(signal.SIGTERM)
        assert answer.result().json() == {"scores": [1.0]}
        assert server.wait(10) == 0
        assert server.stdout.read() == "left\n"
        assert server.stderr.read().splitlines() == [
            f"anyone can use the server at {url.replace('127.0.0.1', '0.0.0.0')}: it asks for no token; set {TOKEN}"
        ]


LOAD = """
from dmdr.remote.server import serve

def score(images, prompts, number):
    # Only an image with its own prompt and column has a score, and it is its own.
    found = (images[:, 0, 0, 0] * 255 + 256 * 255 * images[:, 1, 0, 0]).round().tolist()
    return [i + 0.5 if prompt == f"image {i:.0f}" and i == n else None for i, prompt, n in zip(found, prompts, number)]

serve(score, port=0, max_queue=6)
"""


def test_eight_clients_under_load_get_their_own_answers_once() -> None:
    def ask(reward: RemoteReward, start: int) -> list[float]:
        answers = []
        for i in range(start, 2000, 8):
            image = torch.tensor([i % 256, i // 256, 0]).view(1, 3, 1, 1).expand(-1, -1, 4, 4) / 255
            answers.append(reward(image, [f"image {i}"], number=[i]).item())
        return answers

    with process("-c", LOAD) as (_, url), ThreadPoolExecutor(8) as pool:
        rewards = [client(url) for _ in range(8)]
        found = list(pool.map(ask, rewards, range(8)))
        assert found == [[i + 0.5 for i in range(start, 2000, 8)] for start in range(8)]
        about = health(url)
    assert (about["requests"], about["images"], about["queue"]) == (2000, 2000, 0)
    assert about["batches"] <= 2000


# --- The client -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_images_as_they_would_be_saved() -> None:
    seen: dict[str, Any] = {}

    def score(images: Tensor, prompts: list[str], **columns: Any) -> list[float | None]:
        seen.update(columns, prompts=prompts)
        return [*redness(images, prompts)[:-1].tolist(), None]

    images = pixels()
    with serving(application(score)) as url:
        reward = client(url)
        assert isinstance(reward, Reward)
        scores = reward(images.requires_grad_(), PROMPTS, label=[1, None, "x"])
        local = redness(eight_bits(images).float() / 255, PROMPTS)
        assert torch.equal(scores[:2], local[:2])  # bit for bit
        assert scores[2].isnan() and scores.dtype == torch.float32 and not scores.requires_grad
        assert seen == {"prompts": PROMPTS, "label": [1, None, "x"]}
        assert torch.equal(reward.submit(images, tuple(PROMPTS)).result()[:2], scores[:2])
        with pytest.raises(ValueError, match="3 images, but 2 prompts"):
            reward(images, PROMPTS[:2])


def test_it_keeps_the_contract_of_rewards() -> None:
    with serving(application(redness)) as url:
        check_reward(registry.load("rewards", f"remote:{url}")())


def test_a_batch_above_the_servers_limit_goes_in_parts() -> None:
    images = pixels(11)
    with serving(application(redness, max_request_mb=0.001)) as url:
        scores = client(url)(images, ["a"] * 11, label=list(range(11)))
        assert torch.equal(scores, redness(eight_bits(images).float() / 255, []))
        assert health(url)["requests"] > 3
        with pytest.raises(RemoteError, match=f"{url} answers 413 a request may have at most 0.001 MB"):
            client(url)(pixels(1, 32, 32), ["a"])


@contextmanager
def answering(*answers: Response) -> Iterator[tuple[str, list[float]]]:
    """A server that gives these answers one by one, then the last again, and when it was asked."""
    left, times = queue.SimpleQueue[Response](), []
    for each in answers:
        left.put(each)

    async def score(request: Any) -> Response:
        await request.body()
        times.append(time.monotonic())
        return answers[-1] if left.empty() else left.get()

    async def health(request: Any) -> Response:
        about = {"service": SERVICE, "version": VERSION, "authorized": True, "max_request_bytes": 10**6}
        return JSONResponse(about)

    with serving(Starlette(routes=[Route("/health", health), Route("/score", score, methods=["POST"])])) as url:
        yield url, times


def error(status: int, **headers: str) -> Response:
    return JSONResponse({"error": "sorry"}, status, {name.replace("_", "-"): value for name, value in headers.items()})


SCORES = JSONResponse({"scores": [0.25, None]})


def test_a_busy_server_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    state = random.getstate()
    with answering(error(503), error(504, Retry_After="1"), Response("<html>", 502), SCORES) as (url, times):
        scores = client(url)(pixels(2), ["a", "b"])
    assert scores[0] == 0.25 and scores[1].isnan()
    assert len(times) == 4 and times[2] - times[1] >= 1
    assert [record.getMessage() for record in caplog.records] == [
        f"reward server {url}: 503 sorry; trying again for 600 s",
        f"reward server {url}: answers again after {times[-1] - times[0]:.0f} s",
    ]
    assert random.getstate() == state


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500])
def test_a_server_that_refuses_is_not_asked_again(status: int) -> None:
    with answering(error(status)) as (url, times), pytest.raises(RemoteError) as raised:
        client(url)(pixels(2), ["a", "b"])
    assert str(raised.value) == f"{url} answers {status} sorry"
    assert isinstance(raised.value, TrainingError) and len(times) == 1


def test_an_answer_that_is_none() -> None:
    for answer in (Response("<html>"), JSONResponse({"scores": [1]}), JSONResponse([1, 2])):
        with (
            answering(answer) as (url, _),
            pytest.raises(RemoteError, match=f"{url}: the answer does not hold 2 scores"),
        ):
            client(url)(pixels(2), ["a", "b"])
    packed = Response("plain", headers={"content-encoding": "gzip"})
    with answering(packed) as (url, _), pytest.raises(RemoteError, match=f"{url}: Error -3 while decompressing"):
        client(url)(pixels(2), ["a", "b"])
    elsewhere = RedirectResponse("http://example.invalid/")
    with answering(elsewhere) as (url, _), pytest.raises(RemoteError, match=f"{url} answers 307 Temporary Redirect"):
        client(url)(pixels(2), ["a", "b"])


def test_a_server_that_comes_back_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with serving(application(redness)) as url:
        reward = client(url)
    answer = reward.submit(pixels(), PROMPTS)
    wait_until(lambda: caplog.records)
    assert caplog.records[0].getMessage() == f"reward server {url}: Connection refused; trying again for 600 s"
    with serving(application(redness), port=int(url.rpartition(":")[2])):
        assert torch.equal(answer.result(30), redness(eight_bits(pixels()).float() / 255, []))
    assert len(caplog.records) == 2


def test_a_server_that_stays_away_is_named_in_one_line() -> None:
    with serving(application(redness)) as url:
        rewards = Rewards({url: (1.0, client(url, reward_timeout=0.5))})
    started = time.monotonic()
    with pytest.raises(RewardError) as raised:
        rewards.each(pixels(), PROMPTS)
    assert 0.5 <= time.monotonic() - started < 5
    assert str(raised.value).endswith(f"{url} has not answered for 0.5 s: Connection refused")
    assert "\n" not in str(raised.value)


def test_a_server_that_hangs_is_given_up(gate: Gate) -> None:
    with serving(application(gate)) as url:
        reward = client(url, request_timeout=0.2, reward_timeout=0.4)
        with pytest.raises(RemoteError, match=r"has not answered for 0.4 s: no answer in time"):
            reward(pixels(1), ["1"])
        gate.open.set()
        assert reward(pixels(1), ["1"]).item() == 1


def test_a_server_that_answers_byte_by_byte_is_given_up() -> None:
    async def drops() -> AsyncIterator[bytes]:
        for _ in range(12):
            await asyncio.sleep(0.1)
            yield b" "

    with answering(*(StreamingResponse(drops()) for _ in range(3))) as (url, _):
        reward = client(url, request_timeout=0.3, reward_timeout=0.4)
        with pytest.raises(RemoteError, match=r"has not answered for 0.4 s: no answer in time"):
            reward(pixels(2), ["a", "b"])


def test_no_more_is_read_than_scores_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "LARGEST", 200)
    with (
        answering(Response(" " * 201)) as (url, _),
        pytest.raises(RemoteError, match="answers with more than 200 bytes"),
    ):
        client(url)(pixels(2), ["a", "b"])


def test_what_is_no_reward_server_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(application(redness, token="s3cret")) as url:
        with pytest.raises(ConfigError, match=f"{url} asks for a token, but {TOKEN} is not set"):
            client(url)
        monkeypatch.setenv(TOKEN, "other")
        with pytest.raises(ConfigError, match=f"{url} asks for a token, but {TOKEN} is wrong"):
            client(url)
        monkeypatch.setenv(TOKEN, "s3\ncret")
        with pytest.raises(ConfigError, match="holds characters that HTTP does not allow") as raised:
            client(url)
        assert "cret" not in str(raised.value)
        monkeypatch.setenv(TOKEN, "s3cret")
        reward = client(url)
        assert reward(pixels(), PROMPTS).shape == (3,)
        assert "s3cret" not in repr(reward)
    with pytest.raises(ConfigError, match=f"nothing answers at {url}: Connection refused"):
        client(url)

    abouts = [Response("hello"), JSONResponse({"service": SERVICE, "version": 7})]

    async def other(request: Any) -> Response:
        return abouts.pop(0)

    with serving(Starlette(routes=[Route("/health", other)])) as url:
        for message in ("answers 200, but is no reward server", "uses version 7 of the protocol, not 1"):
            with pytest.raises(ConfigError, match=f"^reward '{url}': {url} {message}"):
                Rewards({url: (1.0, registry.load("rewards", url)())}).prepare(CPU, torch.float32)


def test_no_proxy_stands_before_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(application(redness)) as url:
        assert client(url)(pixels(), PROMPTS).shape == (3,)


def test_a_reward_is_prepared_first() -> None:
    with pytest.raises(RuntimeError, match="call prepare"):
        registry.load("rewards", "http://127.0.0.1:9")()(pixels(), PROMPTS)
    with pytest.raises(ConfigError, match="--request_timeout must be above 0, not 0"):
        registry.load("rewards", "http://127.0.0.1:9")(request_timeout=0)


# --- Names as addresses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("https://judge.example/hps/", "https://judge.example/hps"),
        ("remote:http://judge:1", "http://judge:1"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_address_is_a_class(name: str, url: str) -> None:
    found = registry.load("rewards", name)
    assert issubclass(found, RemoteReward) and found.url == url
    assert found() == found(600.0, 120.0) and not found.differentiable


@pytest.mark.parametrize(
    "name", ["remote", "http", "remote:", "http:score", "remote:127.0.0.1:8000", "http://", "http://a:b", "http://[x"]
)
def test_a_name_that_is_no_address(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        registry.load("rewards", name)
    assert str(raised.value) == f"reward '{name}' needs the URL of its server, such as http://127.0.0.1:8000"


@pytest.mark.parametrize("url", ["http://user:s3cret@judge", "http://judge?token=s3cret", "http://judge/#s3cret"])
def test_an_address_holds_no_secret(url: str) -> None:
    with pytest.raises(ConfigError, match=f"put a token into {TOKEN}") as raised:
        registry.load("rewards", url)
    assert "s3cret" not in str(raised.value)


def test_files_and_modules_are_found_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text("def score(images, prompts, **columns): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    # A module of the name of a plugin that knows no addresses, and a path with a drive.
    for name in (f"{tmp_path}/toy.py:score", "toy:score"):
        assert registry.load("rewards", name).__name__ == "FunctionReward"
    with pytest.raises(ConfigError, match=r"'C:\\judge.py:score' cannot be imported: .*no such file"):
        registry.load("rewards", r"C:\judge.py:score")


def test_a_plugin_with_a_setting_called_at_knows_no_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = (
        "from dataclasses import dataclass\n@dataclass\nclass Spot:\n    at: float = 0.5\n    differentiable = False\n"
    )
    source += (
        "    prepare = lambda self, device, dtype: None\n    __call__ = lambda self, images, prompts, **columns: None\n"
    )
    (tmp_path / "spot_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    spot = registry.Plugin("rewards", "spot", "spot_module:Spot", "spots", "1")
    monkeypatch.setattr(registry, "offers", lambda group: [spot])
    assert registry.load("rewards", "spot")().at == 0.5


def test_a_run_names_it_in_a_sum_and_again_from_its_settings(tmp_path: Path) -> None:
    reward = "0.5*http://127.0.0.1:8000+toy"
    settings = parse(["--model=toy", "--rl=grpo", "--num_generations=2", f"--reward={reward}", "--reward_timeout=9"])
    remote, toy = settings.of("rewards")
    assert (remote.name, remote.weight, toy.name) == ("http://127.0.0.1:8000", 0.5, "toy")
    assert remote.options == {"reward_timeout": 9.0, "request_timeout": 120.0}
    file = tmp_path / "config.yaml"
    file.write_text(settings.as_yaml())
    again = parse([f"--config={file}"])
    assert again.as_yaml() == settings.as_yaml()
    assert again.of("rewards")[0].build(request_timeout=1) == again.of("rewards")[0].cls(9.0, 120.0)
