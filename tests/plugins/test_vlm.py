"""A vision-language model as a judge: what is read from an answer, and a real server that answers as OpenAI's does."""

import asyncio
import base64
import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.images import to_pil
from dmdr.remote.http import RemoteError
from dmdr.rewards import Rewards
from dmdr.run.run import train
from dmdr.settings.parse import parse
from dmdr.testing import check_reward
from dmdr_vlm import VLM
from dmdr_vlm.answers import Unreadable, choice_of, number_in, probability_of_yes, text_of
from serving import serving

CPU = torch.device("cpu")
NUMBER: dict[str, Any] = {"answer": "number", "question": "Rate it.", "scale": [0, 10]}
UNIFIED = Path(__file__).parents[2] / "examples" / "reward_servers" / "unified_reward" / "reward.yaml"


def logprobs(**chances: float) -> dict[str, Any]:
    """As OpenAI's reference has them, of the first token; `_` in a name stands for a space."""
    top = [
        {"token": token.replace("_", " "), "logprob": math.log(chance), "bytes": list(token.encode())}
        for token, chance in chances.items()
    ]
    return {"content": [top[0] | {"top_logprobs": top}], "refusal": None}


def choice(text: str | None, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"} | more


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 300, "completion_tokens": 1, "total_tokens": 301}
    about = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "judge", "usage": usage}
    return about | {"choices": [choice(text, **more)]}


# --- Reading an answer ------------------------------------------------------------------------------------------------


def test_yes_is_the_sum_over_its_wordings() -> None:
    answer = choice("Yes", logprobs=logprobs(Yes=0.5, No=0.2, _yes=0.1, yes=0.05, Yesterday=0.02))
    assert probability_of_yes(answer) == pytest.approx(0.65)
    assert probability_of_yes(choice("No", logprobs=logprobs(No=0.9, Maybe=0.1))) == 0
    sampled = logprobs(Yes=0.25)  # some servers list it among the alternatives, some do not
    sampled["content"][0]["top_logprobs"] = [{"token": "No", "logprob": math.log(0.7), "bytes": None}]
    assert probability_of_yes(choice("Yes", logprobs=sampled)) == pytest.approx(0.25)
    certain = logprobs(Yes=1.0)
    certain["content"][0]["top_logprobs"] = [{"token": "Yes", "logprob": 1e-7}, {"token": "No", "logprob": -9999.0}]
    certain["content"][0]["logprob"] = 1e-7
    assert probability_of_yes(choice("Yes", logprobs=certain)) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "no log-probabilities"),
        ({"content": None}, "no log-probabilities"),
        ({"content": []}, "no log-probabilities"),
        ({"content": [{"token": "Yes", "logprob": -0.1}]}, "no log-probabilities"),
        (logprobs(The=0.9, A=0.1), "begins with neither yes nor no"),
        ({"content": [{"token": "Yes", "logprob": None, "top_logprobs": []}]}, "is no number"),
        ({"content": [{"token": "Yes", "logprob": math.nan, "top_logprobs": []}]}, "is no number"),
        ({"content": [{"token": "Yes", "logprob": -1, "top_logprobs": [{"token": "No"}]}]}, "is no number"),
    ],
)
def test_an_answer_without_yes_or_no(given: Any, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        probability_of_yes(choice("Yes", logprobs=given))


def test_a_number_is_read_from_a_text() -> None:
    assert number_in("7", None, [0, 10]) == 7
    assert number_in("**Rating:** 7.5.", None, [0, 10]) == 7.5
    assert number_in("gpt-4o and v1.5 say -3", None, [-5, 5]) == -3
    final = re.compile(r"Final Score: *([\d.]+)")
    assert number_in("fox (object): 1\nFinal Score: 4.2", final, [1, 5]) == 4.2
    assert number_in("3 of 5", re.compile(r"^\d"), [1, 5]) == 3
    assert number_in("a: 1\nb: 2\nc: 4.5", re.compile(r": ([\d.]+)"), [1, 5]) == 2.5


@pytest.mark.parametrize(
    ("text", "pattern", "said"),
    [
        ("no idea", None, "holds no number"),
        ("7/10", None, "holds 2 numbers"),
        ("11", None, "not between 1 and 10"),
        ("0.5", None, "not between 1 and 10"),
        ("Score: nan", r"Score: (\w+)", "not between 1 and 10"),
        ("Score: high", r"Score: (\w+)", "is no number"),
        ("Score 7", r"Score: (\w+)", "holds no number"),
    ],
)
def test_a_text_without_a_number(text: str, pattern: str | None, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        number_in(text, None if pattern is None else re.compile(pattern), [1, 10])


@pytest.mark.parametrize("body", [b"", b"<html>", b"[" * 10**5, b"{}", b'{"choices": []}', b'{"choices": [1]}', b"[1]"])
def test_a_body_without_an_answer(body: bytes) -> None:
    with pytest.raises(Unreadable):
        choice_of(body)
    with pytest.raises(Unreadable, match="no text"):
        text_of(choice(None))


# --- A server ---------------------------------------------------------------------------------------------------------

Reply = Callable[[Image.Image, str, dict[str, Any]], Response | dict[str, Any]]


@contextmanager
def judging(
    reply: Reply, models: Sequence[str] = ("judge",), key: str | None = None
) -> Iterator[tuple[str, list[Any]]]:
    """The base URL of a server that answers as OpenAI's does, and the bodies that it was sent after the first."""
    asked: list[Any] = []

    def may(request: Any) -> bool:
        return key is None or request.headers.get("authorization") == f"Bearer {key}"

    async def listed(request: Any) -> Response:
        data = [{"id": name, "object": "model", "created": 1, "owned_by": "us"} for name in models]
        return JSONResponse({"object": "list", "data": data})

    async def completions(request: Any) -> Response:
        body = await request.json()
        if not may(request):
            about = {"message": "Incorrect API key provided: sk-1***.", "type": "invalid_request_error", "code": "key"}
            return JSONResponse({"error": about}, 401)
        (image, text) = body["messages"][0]["content"]
        kind, data = image["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        assert request.headers["content-type"] == "application/json"
        asked.append(body)
        found = await asyncio.to_thread(reply, Image.open(BytesIO(base64.b64decode(data))), text["text"], body)
        return found if isinstance(found, Response) else JSONResponse(found)

    routes = [Route("/v1/models", listed), Route("/v1/chat/completions", completions, methods=["POST"])]
    with serving(Starlette(routes=routes)) as url:
        yield f"{url}/v1", asked


def redness(image: Image.Image, question: str, body: dict[str, Any]) -> dict[str, Any]:
    """Says yes with the probability of the mean red."""
    chance = 0.01 + 0.98 * float(np.asarray(image)[..., 0].mean()) / 255
    return completion("Yes", logprobs=logprobs(Yes=chance, No=1 - chance))


def wanted(images: Tensor) -> Tensor:
    eight_bit = torch.stack([torch.from_numpy(np.array(image))[..., 0].double().mean() for image in to_pil(images)])
    return (0.01 + 0.98 * eight_bit / 255).float()


def judge(url: str, **options: Any) -> VLM:
    made = VLM(**{"base_url": url} | options)
    made.prepare(CPU, torch.float32)
    return made


def pixels(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def test_it_keeps_the_contract_of_rewards() -> None:
    with judging(redness) as (url, _):
        check_reward(VLM(base_url=url))


def test_each_image_is_asked_about_with_its_own_question() -> None:
    question = '"{prompt}" by {artist}: {"json": 1}? \\1'
    with judging(redness) as (url, asked):
        reward = judge(f"{url}/", question=question, extra_body='{"seed": 7, "top_logprobs": 5}')
        images = pixels().requires_grad_()
        scores = reward(images, ["a fox", "{artist}", "b\\g<0>"], artist=["me", 3, None], other=[None] * 3)
    assert torch.allclose(scores[:2], wanted(images)[:2]) and scores[2].isnan()
    assert scores.dtype == torch.float32 and not scores.requires_grad
    texts = sorted(body["messages"][0]["content"][1]["text"] for body in asked[1:])
    assert texts == ['"a fox" by me: {"json": 1}? \\1', '"{artist}" by 3: {"json": 1}? \\1']
    kept = {name: value for name, value in asked[1].items() if name != "messages"}
    assert kept == {
        "model": "judge",
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 5,
        "seed": 7,
    }
    assert reward.columns == ("artist",)


def test_a_column_that_the_prompts_lack_is_named() -> None:
    with judging(redness) as (url, _), pytest.raises(ConfigError, match="'vlm' needs the prompts to have a column 'a'"):
        Rewards({"vlm": (1.0, VLM(base_url=url, question="{a}?"))}, there=["b"]).prepare(CPU, torch.float32)


def test_numbers_have_a_scale(caplog: pytest.LogCaptureFixture) -> None:
    said = iter(["7", "7", "12", "none", "8.5", "11"])  # the first is to the grey image
    with judging(lambda *_: completion(next(said))) as (url, asked):
        reward = judge(url, **NUMBER, max_concurrency=1)
        scores = reward(pixels(5), ["a"] * 5)
    found = sorted(scores[scores.isfinite()].tolist())
    assert found == [7, 8.5]
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"{url}: an image has no score: a number is not between 0 and 10",
        f"{url}: an image has no score: the answer holds no number",
    ]
    assert asked[1]["max_tokens"] == 512 and "logprobs" not in asked[1]


def test_what_another_try_may_change_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    busy = JSONResponse({"error": {"message": "Rate limit reached", "type": "tokens"}}, 429, {"Retry-After": "1"})
    down = JSONResponse({"object": "error", "message": "engine is dead"}, 500)
    replies = iter([redness, lambda *_: busy, lambda *_: down, redness])
    with judging(lambda *asked: next(replies)(*asked)) as (url, asked):
        scores = judge(url)(pixels(1), ["a"])
    assert torch.allclose(scores, wanted(pixels(1))) and len(asked) == 4
    assert caplog.records[0].getMessage() == f"reward server {url}: 429 Rate limit reached; trying again for 600 s"


def test_an_image_that_is_refused_or_answered_badly_has_no_score(caplog: pytest.LogCaptureFixture) -> None:
    refused = JSONResponse({"error": {"message": "content policy", "code": "content_policy_violation"}}, 400)
    broken = Response(b'{"choices": [', media_type="application/json")
    replies = iter([redness, lambda *_: refused, lambda *_: broken, lambda *_: completion("Yes"), redness])
    with judging(lambda *asked: next(replies)(*asked)) as (url, _):
        scores = judge(url, max_concurrency=1)(pixels(4), ["a"] * 4)
    assert scores.isnan().sum() == 3
    told = {record.getMessage().split(": ", 2)[2] for record in caplog.records}
    assert told == {
        "the server answers 400 content policy",
        "the answer has no choices in JSON",
        "the answer has no log-probabilities",
    }


def test_several_are_asked_at_a_time_and_not_more() -> None:
    inside, most, lock, together = 0, 0, threading.Lock(), threading.Barrier(3, timeout=10)

    def reply(*asked: Any) -> dict[str, Any]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        if "grey" not in asked[1]:
            together.wait()  # which ends only if three are asked at a time
        with lock:
            inside -= 1
        return redness(*asked)

    with judging(reply) as (url, _):
        scores = judge(url, max_concurrency=3)(pixels(6), ["a"] * 6)
    assert most == 3 and torch.allclose(scores, wanted(pixels(6)))


def test_a_server_that_hangs_is_given_up() -> None:
    gate = threading.Event()

    def reply(*asked: Any) -> dict[str, Any]:
        if "grey" not in asked[1]:
            gate.wait(10)
        return redness(*asked)

    with judging(reply) as (url, _):
        reward = judge(url, request_timeout=0.3, reward_timeout=0.5)
        with pytest.raises(RemoteError, match=r"has not answered for 0.5 s: no answer in time"):
            reward(pixels(1), ["a"])
        gate.set()


# --- What is refused before a run begins ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"answer": "maybe"}, "answer must be 'yes_or_no' or 'number', not 'maybe'"),
        ({"answer": "number", "scale": [0, 1]}, "question is missing"),
        (NUMBER | {"scale": None}, "scale must be the least and the largest number of an answer, not None"),
        (NUMBER | {"scale": [5, 1]}, r"scale must be .* not \[5, 1\]"),
        (NUMBER | {"scale": [0, math.nan]}, "scale must be"),
        (NUMBER | {"max_tokens": 0}, "max_tokens must be at least 1"),
        (NUMBER | {"pattern": "("}, "is no regular expression"),
        (NUMBER | {"pattern": "(a)(b)"}, "must have one group"),
        ({"scale": [1, 5]}, "scale is of answer 'number' only"),
        ({"pattern": "x"}, "pattern is of answer 'number' only"),
        ({"extra_body": "{"}, "extra_body is no JSON"),
        ({"extra_body": "[1]"}, "extra_body must be a JSON object"),
        ({"max_concurrency": 0}, "max_concurrency must be above 0"),
        ({"request_timeout": -1}, "request_timeout must be above 0"),
        ({"base_url": "judge:8000"}, "base_url must be a URL such as"),
        ({"base_url": "http://me:s3cret@judge/v1"}, "may hold only host, port and path"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        VLM(**options)
    assert "s3cret" not in str(raised.value)


def test_a_server_that_cannot_judge_is_refused_at_once() -> None:
    with judging(redness) as (url, _), pytest.raises(ConfigError, match="/models answers 404 Not Found and lists no"):
        judge(url.removesuffix("/v1"))
    with pytest.raises(ConfigError, match=f"nothing answers at {url}: Connection refused"):
        judge(url)
    with judging(redness, ("a", "b")) as (url, _):
        with pytest.raises(ConfigError, match="has 2 models; say which with the option 'model': a, b"):
            judge(url)
        assert judge(url, model="b")(pixels(1), ["a"]).isfinite().all()
    with judging(lambda *_: completion("Yes")) as (url, _), pytest.raises(ConfigError, match="no log-probabilities of"):
        judge(url)
    with judging(lambda *_: Response("hello")) as (url, _), pytest.raises(ConfigError, match="not as OpenAI's chat"):
        judge(url)
    text_only = JSONResponse({"object": "error", "message": "judge is not a multimodal model", "code": 400}, 400)
    with (
        judging(lambda *_: text_only) as (url, _),
        pytest.raises(ConfigError, match="400 judge is not a multimodal model, to a question about a grey image"),
    ):
        judge(url)
    with pytest.raises(RuntimeError, match="call prepare"):
        VLM()(pixels(1), ["a"])


def test_the_key_is_in_the_environment_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with judging(redness, key="s3cret") as (url, _):
        with pytest.raises(ConfigError, match=r"the environment variable JUDGE_KEY, .* is not set"):
            judge(url, api_key_env="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "s3\ncret")
        with pytest.raises(ConfigError, match="the token in JUDGE_KEY holds characters"):
            judge(url, api_key_env="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "other")
        with pytest.raises(ConfigError, match="answers 401 Incorrect API key"):
            judge(url, api_key_env="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "s3cret")
        reward = judge(url, api_key_env="JUDGE_KEY")
        assert torch.allclose(reward(pixels(), ["a"] * 3), wanted(pixels()))
    assert "s3cret" not in repr(reward) + repr(reward._server) + caplog.text


# --- In a run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_trained_on_its_answers(tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    with judging(redness, key="s3cret") as (url, asked):
        run = train(
            model="toy",
            rl="grpo",
            reward="vlm as judge",
            num_generations=4,
            stage1_steps=1,
            stage2_steps=2,
            judge_base_url=url,
            judge_api_key_env="JUDGE_KEY",
            sample_weight="none",
            output_dir=str(tmp_path / "run"),
        )
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["reward/judge"] < 1 and len(asked) >= 9
    for file in run.rglob("*.*"):
        assert not file.is_file() or b"s3cret" not in file.read_bytes(), file


def test_it_has_no_gradient_to_follow(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the gradient of the reward, and 'vlm' is not"):
        train(model="toy", rl="refl", reward="vlm", output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_unified_reward_is_asked_as_published() -> None:
    settings = parse(["--model=toy", "--rl=grpo", "--num_generations=2", f"--config={UNIFIED}"])
    reward = settings.of("rewards")[0].build()
    assert isinstance(reward, VLM) and reward.columns == ()
    said = "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 2.25\nStyle Score (1-5): 3.5"  # as its authors show it
    assert reward._pattern is not None and reward.scale == [1, 5]
    assert number_in(said, reward._pattern, reward.scale) == 2.75
